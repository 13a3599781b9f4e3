/* Computes one unit of work. Compiled twice: see tile_wide.c. */
#include <math.h>
#include <stdlib.h>

#include "../vector_math.h"
#include "tile.h"

typedef float v4f __attribute__((vector_size(16)));
typedef uint64_t v4l __attribute__((vector_size(32)));

#ifdef WIDE
#include <immintrin.h>
#define ATTEND treeline_attend_tile_wide
#define WIDTH 16 /* numbers in a vector */
#define ROWS 6   /* of queries at a time: ROWS * COLUMNS sums fill the registers */
#else
#define ATTEND treeline_attend_tile_narrow
#define WIDTH 8
#define ROWS 3
#endif
#define COLUMNS 4 /* vectors of sums of a row, at a time */
#define ENTRIES 64 /* entries whose keys or values, of one head, stay in the L1 cache */
#define BLOCK (WIDTH / LANES * COLUMNS) /* entries scored at a time: one per vector, or two */

typedef float vf __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));

INLINE vf load(const float *from) { return *(const vf *)from; }

INLINE vf splat(float x) { return x - (vf){0}; }

#ifdef WIDE
/* 8 dimensions of two entries, side by side. */
INLINE vf two(const float *first, const float *second)
{
    return (vf)_mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(first)), _mm256_loadu_ps(second), 1);
}

/* Entries 0 and 4, 1 and 5, ...: low halves hold the sums of entries 0 to 3, high ones of 4 to 7. */
INLINE vf key_of(const float **keys, int column, int64_t i) { return two(keys[column] + i, keys[column + COLUMNS] + i); }

INLINE vf query_of(const float *query) { return (vf)_mm512_broadcast_f32x8(_mm256_loadu_ps(query)); }

/* Writes the sums over the low halves of four vectors, then over the high ones, added in the order of 8 lanes. */
INLINE void write_sums(const vf *sums, float *to)
{
    __m512 a = (__m512)sums[0], b = (__m512)sums[1], c = (__m512)sums[2], d = (__m512)sums[3];
    __m512 ab = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
    __m512 cd = _mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d);
    __m512 abcd = _mm512_shuffle_ps(ab, cd, 0x44) + _mm512_shuffle_ps(ab, cd, 0xee);
    v4f quarters[4];
    memcpy(quarters, &abcd, sizeof quarters);
    v4f both[2] = {quarters[0] + quarters[1], quarters[2] + quarters[3]};
    memcpy(to, both, sizeof both);
}
#else
INLINE vf key_of(const float **keys, int column, int64_t i) { return load(keys[column] + i); }

INLINE vf query_of(const float *query) { return load(query); }

/* Writes the lane sum of each of four vectors, always added in the same order. */
INLINE void write_sums(const vf *sums, float *to)
{
    v8f a = sums[0], b = sums[1], c = sums[2], d = sums[3];
    v8f ab = shuffle8(a, b, 0, 8, 1, 9, 4, 12, 5, 13) + shuffle8(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
    v8f cd = shuffle8(c, d, 0, 8, 1, 9, 4, 12, 5, 13) + shuffle8(c, d, 2, 10, 3, 11, 6, 14, 7, 15);
    v8f abcd = shuffle8(ab, cd, 0, 1, 8, 9, 4, 5, 12, 13) + shuffle8(ab, cd, 2, 3, 10, 11, 6, 7, 14, 15);
    v4f halves[2];
    memcpy(halves, &abcd, sizeof halves);
    v4f all = halves[0] + halves[1];
    memcpy(to, &all, sizeof all);
}
#endif

/* scores [rows, stride]: products of `rows` queries with `count` keys, a multiple of BLOCK. */
INLINE void score(int rows, const float **queries, const float **keys, int count, int64_t dim, float *scores,
                  int64_t stride)
{
    for (int entry = 0; entry < count; entry += BLOCK) {
        vf sums[ROWS][COLUMNS] = {0};
        for (int64_t i = 0; i < dim; i += LANES) {
            vf key[COLUMNS];
            for (int c = 0; c < COLUMNS; c++)
                key[c] = key_of(keys + entry, c, i);
            for (int r = 0; r < rows; r++)
                for (int c = 0; c < COLUMNS; c++)
                    sums[r][c] += query_of(queries[r] + i) * key[c];
        }
        for (int r = 0; r < rows; r++)
            write_sums(sums[r], scores + r * stride + entry);
    }
}

/* output [rows, vectors * WIDTH] += weights [rows, stride] times `count` values, one by one. */
INLINE void mix(int rows, int vectors, const float *weights, int64_t stride, const float **values, int count,
                int64_t offset, float **output)
{
    vf sums[ROWS][COLUMNS];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < vectors; c++)
            sums[r][c] = load(output[r] + offset + c * WIDTH);
    for (int entry = 0; entry < count; entry++) {
        vf weight[ROWS];
        for (int r = 0; r < rows; r++)
            weight[r] = splat(weights[r * stride + entry]);
        for (int c = 0; c < vectors; c++) {
            vf value = load(values[entry] + offset + c * WIDTH);
            for (int r = 0; r < rows; r++)
                sums[r][c] += weight[r] * value;
        }
    }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < vectors; c++)
            *(vf *)(output[r] + offset + c * WIDTH) = sums[r][c];
}

INLINE void mix_all(int rows, const float *weights, int64_t stride, const float **values, int count, int64_t dim,
                    float **output)
{
    int64_t offset = 0;
    for (; offset + COLUMNS * WIDTH <= dim; offset += COLUMNS * WIDTH)
        mix(rows, COLUMNS, weights, stride, values, count, offset, output);
    for (; offset < dim; offset += WIDTH)
        mix(rows, 1, weights, stride, values, count, offset, output);
}

/* Calls the version compiled for this number of rows. */
#ifdef WIDE
#define FOR_ROWS(f, ...) switch (rows) { case 1: f(1, __VA_ARGS__); break; case 2: f(2, __VA_ARGS__); break; \
    case 3: f(3, __VA_ARGS__); break; case 4: f(4, __VA_ARGS__); break; case 5: f(5, __VA_ARGS__); break; \
    default: f(6, __VA_ARGS__); }
#else
#define FOR_ROWS(f, ...) switch (rows) { case 1: f(1, __VA_ARGS__); break; case 2: f(2, __VA_ARGS__); break; \
    default: f(3, __VA_ARGS__); }
#endif

static void mix_rows(int rows, const float *weights, int64_t stride, const float **values, int count, int64_t dim,
                     float **output)
{
    FOR_ROWS(mix_all, weights, stride, values, count, dim, output)
}

static void score_rows(int rows, const float **queries, const float **keys, int count, int64_t dim, float *scores,
                       int64_t stride)
{
    FOR_ROWS(score, queries, keys, count, dim, scores, stride)
}

/* Hides what a new token does not see in its row of scores [stride] of the tile's entries. */
static void hide(const Tile *tile, int64_t token, const Attention *layer, float *scores, int64_t stride)
{
    const Span *span = tile->span;
    int64_t start = span->length - tile->first, seen = tile->end - tile->first;
    int64_t oldest = layer->window ? position(span, token) - layer->window + 1 - span->length : 0;
    const uint8_t *visible = span->visible + token * span->entries;
    for (int64_t i = first_seen(span, token, layer->window) - tile->first; i-- > 0;)
        scores[i] = -INFINITY;
    for (int64_t i = start; i < seen; i++)
        scores[i] = visible[i - start] && span->depths[i - start] >= oldest ? scores[i] : -INFINITY;
    for (int64_t i = seen; i < stride; i++)
        scores[i] = -INFINITY;
}

/* Turns a row's raw scores into weights, the largest of which is 1; returns one over their sum. */
static float weigh(const Attention *layer, float *scores, int64_t stride)
{
    v8f scale = splat8(layer->scale), softcap = splat8(layer->softcap);
    if (layer->softcap > 0) {
        for (int64_t i = 0; i < stride; i += LANES) {
            v8f x = load8(scores + i), capped = softcap * tanh8(x * scale / softcap);
            store8(scores + i, select8(x == splat8(-INFINITY), x, capped));
        }
        scale = splat8(1.0f);
    }
    float most = largest8(scores, stride);
    const float unit = 1 << 30; /* the integer that stands for 1 */
    v4l even = {0}, odd = {0};
    for (int64_t i = 0; i < stride; i += LANES) {
        v8f weights = exp8((load8(scores + i) - splat8(most)) * scale);
        store8(scores + i, weights);
        v4l units = (v4l)__builtin_convertvector(weights * splat8(unit) + splat8(0.5f), v8i);
        even += units & UINT32_MAX;
        odd += units >> 32;
    }
    v4l sums = even + odd;
    return unit / (float)(sums[0] + sums[1] + sums[2] + sums[3]);
}

void ATTEND(const Tile *tile, const Attention *layer, int64_t kv_head, const Data *data, float *scores)
{
    const Span *span = tile->span;
    int64_t group = layer->group, heads = layer->kv_heads * group, count = tile->tokens * group;
    int64_t key_dim = layer->key_dim, key_size = layer->kv_heads * key_dim;
    int64_t value_dim = layer->value_dim, value_size = layer->kv_heads * value_dim;
    int64_t seen = tile->end - tile->first, stride = padded(seen), first_row = span->start + tile->token;
    const int64_t *slots = span->slots + tile->first;
    const float *queries = data->query + first_row * data->query_stride + kv_head * group * key_dim;
    float *output = data->output + (first_row * heads + kv_head * group) * value_dim, *shares = scores + count * stride;
    const float *from[ENTRIES];

    for (int64_t entry = 0; entry < seen; entry += ENTRIES) {
        int64_t left = seen - entry;
        int size = left < ENTRIES ? padded(left) : ENTRIES;
        for (int i = 0; i < size; i++) /* what fills up the last vector is hidden later */
            from[i] = data->keys + slots[entry + (i < left ? i : left - 1)] * key_size + kv_head * key_dim;
        for (int64_t row = 0; row < count; row += ROWS) {
            const float *some[ROWS];
            int height = count - row < ROWS ? count - row : ROWS;
            for (int r = 0; r < height; r++)
                some[r] = queries + (row + r) / group * data->query_stride + (row + r) % group * key_dim;
            score_rows(height, some, from, size, key_dim, scores + row * stride + entry, stride);
        }
    }
    for (int64_t row = 0; row < count; row++) {
        hide(tile, tile->token + row / group, layer, scores + row * stride, stride);
        shares[row] = weigh(layer, scores + row * stride, stride);
        memset(output + (row / group * heads + row % group) * value_dim, 0, value_dim * sizeof(float));
    }
    for (int64_t entry = 0; entry < seen; entry += ENTRIES) {
        int size = seen - entry < ENTRIES ? seen - entry : ENTRIES;
        for (int i = 0; i < size; i++)
            from[i] = data->values + slots[entry + i] * value_size + kv_head * value_dim;
        for (int64_t row = 0; row < count; row += ROWS) {
            float *some[ROWS];
            int height = count - row < ROWS ? count - row : ROWS;
            for (int r = 0; r < height; r++)
                some[r] = output + ((row + r) / group * heads + (row + r) % group) * value_dim;
            mix_rows(height, scores + row * stride + entry, stride, from, size, value_dim, some);
        }
    }
    for (int64_t row = 0; row < count; row++) {
        float *to = output + (row / group * heads + row % group) * value_dim;
        for (int64_t i = 0; i < value_dim; i += LANES)
            store8(to + i, load8(to + i) * splat8(shares[row]));
    }
}
