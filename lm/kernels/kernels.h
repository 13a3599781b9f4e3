/* What the kernels call of one another. */
#pragma once
#include <stdint.h>

/* The new tokens of one sequence. `slots` are those of the cache for its `length` committed and `entries` other entries;
   the last `tokens` of these are the new ones. */
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
} Attention;

/* Whether the processor has vectors of 16 numbers. */
int treeline_wide_vectors(void);

typedef void GroupedLinear(const uint8_t *tiles, int64_t bits, const float *bias, const float *inputs, float *outputs,
                           int64_t tokens, int64_t features_in, int64_t features_out, int64_t threads);

GroupedLinear treeline_grouped_linear, treeline_grouped_linear_wide, treeline_grouped_linear_narrow;

void treeline_attend(const Batch *batch, const Attention *layer, float *keys, float *values, const float *query,
                     int64_t query_stride, const float *key, int64_t key_stride, const float *value,
                     int64_t value_stride, float *output);

void treeline_rms_norm(int64_t tokens, int64_t size, const float *hidden, const float *added, float *total,
                       const float *weight, float epsilon, float *out, int threads);

void treeline_rotate(int64_t tokens, int64_t heads, int64_t head_dim, float *rows, int64_t stride, const float *turns,
                     int threads);

void treeline_silu_times(int64_t tokens, int64_t size, const float *gate_up, float *out, int threads);
