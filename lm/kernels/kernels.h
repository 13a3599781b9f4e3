/* Shared declarations of the kernels. */
#pragma once
#include <stdint.h>

/* The new tokens of one sequence. `slots` are the cache slots of its `length` committed and `entries` other entries;
   the last `tokens` of the latter are the new ones. */
typedef struct {
    int64_t start, tokens, length, entries;
    const int64_t *slots, *depths; /* [length + entries], [entries] */
    const uint8_t *visible;        /* [tokens, entries] */
} Span;

typedef struct {
    int64_t count, threads;
    const Span *spans;
} Batch;

/* How a layer attends. */
typedef struct {
    int64_t kv_heads, group, key_dim, value_dim;
    int64_t window; /* 0: none */
    float scale, softcap; /* 0: none */
    int64_t wide;         /* with vectors of 16; value_dim is a multiple */
} Attention;

/* How a product is computed: in float32 by vectors of 8 or 16, or in integers by these instructions. */
enum { FLOAT32, FLOAT32_WIDE, AVX2, AVX_VNNI, AVX512_VNNI, NEON };

/* Whether the processor can run it. */
int treeline_runs(int kernel);

/* Layout of a group in a tile (tiles.h): scale [ROWS], minimum [ROWS], then words [GROUP * bits / 32][ROWS] of packed
   codes, the first input's lowest. Scales are float32 or float16. With float16 and 8 bits there is no minimum: it is
   -128 * scale. Without scales codes are bfloat16. */
typedef struct {
    int32_t bits;  /* of a code: 4, 8 or 16 */
    int32_t scale; /* bytes of a scale: 4 or 2, or 0 with 16 bits; not 2 with 16 bits */
} Format;

/* Tiles of ROWS outputs, each of features_in / GROUP groups; rows beyond features_out are padding. */
typedef struct {
    const uint8_t *tiles;
    const float *bias; /* or NULL */
    Format format;
    int64_t features_in, features_out, kernel;
} Linear;

/* Every thread of a team calls the functions below, except `treeline_norm_row`: they share the work and end at a
   barrier. */

/* outputs [tokens, features_out] = inputs [tokens, features_in] * weight^T + bias.
   room [`treeline_room` bytes]: memory for the rounded inputs. */
typedef void Product(const Linear *linear, const float *inputs, float *outputs, int64_t tokens, void *room);

Product treeline_team_linear, treeline_float_linear_narrow, treeline_float_linear_wide, treeline_integer_linear;

int64_t treeline_room(const Linear *linear, int64_t tokens);

void treeline_team_attend(const Batch *batch, const Attention *layer, float *keys, float *values, const float *query,
                          int64_t query_stride, const float *key, int64_t key_stride, const float *value,
                          int64_t value_stride, float *output);

void treeline_norm_row(int64_t size, const float *hidden, const float *added, float *total, const float *weight,
                       float epsilon, float *out);

void treeline_team_rms_norm(int64_t tokens, int64_t size, const float *hidden, const float *added, float *total,
                            const float *weight, float epsilon, float *out);

void treeline_team_rotate(int64_t tokens, int64_t heads, int64_t head_dim, float *rows, int64_t stride,
                          const float *turns);

void treeline_team_silu_times(int64_t tokens, int64_t size, const float *gate_up, float *out);
