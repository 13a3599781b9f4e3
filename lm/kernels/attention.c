/* Tree attention over the paged KV cache, float32.

   The new tokens of a sequence are cut into tiles; a tile and a key/value head are one unit of work. Its rows are the
   query heads of its tokens that share this head, so that they share the loads of keys and values, which are read where
   they lie. Scores of all entries come first, then their softmax, then the sum of values.

   A token's bits depend on nothing but what it sees: a score's sum runs over dimensions in a fixed order, a row's sum of
   values over its entries one by one, from the first, and its sum of weights is one of integers. An entry that a token
   does not see has the weight 0 and changes neither. So the rest of the pass, tiles, threads, blocks, and siblings in a
   tree leave no trace. */
#include <math.h>
#include <stdlib.h>

#include "kernels.h"
#include "vector_math.h"

typedef float v4f __attribute__((vector_size(16)));
typedef uint64_t v4l __attribute__((vector_size(32)));

enum {
    ENTRIES = 64,           /* whose keys or values, of one head, stay in the first cache */
    ROWS = 3,               /* of queries at a time: ROWS * COLUMNS sums fill the registers */
    COLUMNS = 4,            /* entries, or vectors of a value, at a time */
    TILE_ROWS = 48,         /* at most, if more than one token */
    TILE_SCORES = 1 << 16,  /* at most, if more than one token: they stay in the second cache */
    PARALLEL_PRODUCTS = 1 << 18 /* below it, waking threads costs more than they save */
};

typedef struct {
    float *keys, *values;                           /* the cache: [slots, kv_heads, dim] */
    const float *query, *key, *value;               /* [tokens, heads, dim], heads side by side */
    int64_t query_stride, key_stride, value_stride; /* of a token */
    float *output;                                  /* [tokens, heads, value_dim] */
} Data;

typedef struct {
    const Span *span;
    int64_t token, tokens; /* within the span */
    int64_t first, end;    /* entries that any of them sees */
} Tile;

static int64_t padded(int64_t entries) { return (entries + LANES - 1) / LANES * LANES; }

/* Position of a new token of the span. */
static int64_t position(const Span *span, int64_t token)
{
    return span->length + span->depths[span->entries - span->tokens + token];
}

/* The first committed entry that a new token sees. */
static int64_t first_seen(const Span *span, int64_t token, int64_t window)
{
    int64_t first = window ? position(span, token) - window + 1 : 0;
    return first < 0 ? 0 : first > span->length ? span->length : first;
}

static int64_t tile_tokens(const Span *span, const Attention *layer)
{
    int64_t rows = TILE_SCORES / (span->length + span->entries);
    int64_t tokens = (rows < TILE_ROWS ? rows : TILE_ROWS) / layer->group;
    return tokens > 1 ? tokens : 1;
}

static Tile *cut(const Batch *batch, const Attention *layer, int64_t *count)
{
    *count = 0;
    for (const Span *span = batch->spans; span < batch->spans + batch->count; span++) {
        int64_t size = tile_tokens(span, layer);
        *count += (span->tokens + size - 1) / size;
    }
    Tile *tiles = malloc(*count * sizeof *tiles), *next = tiles;
    for (const Span *span = batch->spans; span < batch->spans + batch->count; span++) {
        int64_t size = tile_tokens(span, layer);
        for (int64_t token = 0; token < span->tokens; token += size) {
            int64_t left = span->tokens - token, tokens = left < size ? left : size, first = span->length;
            for (int64_t i = token; i < token + tokens; i++) {
                int64_t seen = first_seen(span, i, layer->window);
                first = seen < first ? seen : first;
            }
            *next++ = (Tile){span, token, tokens, first, span->length + span->entries - left + tokens};
        }
    }
    return tiles;
}

static void write_entries(const Tile *tile, const Attention *layer, const Data *data)
{
    const Span *span = tile->span;
    const int64_t *slots = span->slots + span->length + span->entries - span->tokens;
    int64_t key_size = layer->kv_heads * layer->key_dim, value_size = layer->kv_heads * layer->value_dim;
    for (int64_t i = tile->token; i < tile->token + tile->tokens; i++) {
        int64_t row = span->start + i;
        memcpy(data->keys + slots[i] * key_size, data->key + row * data->key_stride, key_size * sizeof(float));
        memcpy(data->values + slots[i] * value_size, data->value + row * data->value_stride,
               value_size * sizeof(float));
    }
}

/* Writes each of four vectors' sum over its lanes, always in the same order. */
INLINE void write_sums(v8f a, v8f b, v8f c, v8f d, float *to)
{
    v8f ab = shuffle8(a, b, 0, 8, 1, 9, 4, 12, 5, 13) + shuffle8(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
    v8f cd = shuffle8(c, d, 0, 8, 1, 9, 4, 12, 5, 13) + shuffle8(c, d, 2, 10, 3, 11, 6, 14, 7, 15);
    v8f abcd = shuffle8(ab, cd, 0, 1, 8, 9, 4, 5, 12, 13) + shuffle8(ab, cd, 2, 3, 10, 11, 6, 7, 14, 15);
    v4f halves[2];
    memcpy(halves, &abcd, sizeof halves);
    v4f sums = halves[0] + halves[1];
    memcpy(to, &sums, sizeof sums);
}

/* scores [rows, stride]: products of `rows` queries with `count` keys, a multiple of COLUMNS. */
INLINE void score(int rows, const float **queries, const float **keys, int count, int64_t dim, float *scores,
                  int64_t stride)
{
    for (int entry = 0; entry < count; entry += COLUMNS) {
        v8f sums[ROWS][COLUMNS] = {0};
        for (int64_t i = 0; i < dim; i += LANES) {
            v8f key[COLUMNS];
            for (int c = 0; c < COLUMNS; c++)
                key[c] = load8(keys[entry + c] + i);
            for (int r = 0; r < rows; r++)
                for (int c = 0; c < COLUMNS; c++)
                    sums[r][c] += load8(queries[r] + i) * key[c];
        }
        for (int r = 0; r < rows; r++)
            write_sums(sums[r][0], sums[r][1], sums[r][2], sums[r][3], scores + r * stride + entry);
    }
}

/* output [rows, vectors * LANES] += weights [rows, stride] times `count` values, one by one. */
INLINE void mix(int rows, int vectors, const float *weights, int64_t stride, const float **values, int count,
                int64_t offset, float **output)
{
    v8f sums[ROWS][COLUMNS];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < vectors; c++)
            sums[r][c] = load8(output[r] + offset + c * LANES);
    for (int entry = 0; entry < count; entry++) {
        v8f weight[ROWS];
        for (int r = 0; r < rows; r++)
            weight[r] = splat8(weights[r * stride + entry]);
        for (int c = 0; c < vectors; c++) {
            v8f value = load8(values[entry] + offset + c * LANES);
            for (int r = 0; r < rows; r++)
                sums[r][c] += weight[r] * value;
        }
    }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < vectors; c++)
            store8(output[r] + offset + c * LANES, sums[r][c]);
}

INLINE void mix_vectors(int vectors, int rows, const float *weights, int64_t stride, const float **values, int count,
                        int64_t offset, float **output)
{
    if (rows == 3)
        mix(3, vectors, weights, stride, values, count, offset, output);
    else if (rows == 2)
        mix(2, vectors, weights, stride, values, count, offset, output);
    else
        mix(1, vectors, weights, stride, values, count, offset, output);
}

static void mix_rows(int rows, const float *weights, int64_t stride, const float **values, int count, int64_t dim,
                     float **output)
{
    int64_t offset = 0;
    for (; offset + COLUMNS * LANES <= dim; offset += COLUMNS * LANES)
        mix_vectors(COLUMNS, rows, weights, stride, values, count, offset, output);
    for (; offset < dim; offset += LANES)
        mix_vectors(1, rows, weights, stride, values, count, offset, output);
}

static void score_rows(int rows, const float **queries, const float **keys, int count, int64_t dim, float *scores,
                       int64_t stride)
{
    if (rows == 3)
        score(3, queries, keys, count, dim, scores, stride);
    else if (rows == 2)
        score(2, queries, keys, count, dim, scores, stride);
    else
        score(1, queries, keys, count, dim, scores, stride);
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

static float largest(const float *scores, int64_t count)
{
    v8f best[2] = {load8(scores), load8(scores)}; /* two, as each waits for its last comparison */
    for (int64_t i = LANES; i < count; i += LANES)
        best[i / LANES % 2] = max8(best[i / LANES % 2], load8(scores + i));
    v8f lanes = max8(best[0], best[1]);
    float most = lanes[0];
    for (int lane = 1; lane < LANES; lane++)
        most = lanes[lane] > most ? lanes[lane] : most;
    return most;
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
    float most = largest(scores, stride);
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

static void attend_tile(const Tile *tile, const Attention *layer, int64_t kv_head, const Data *data, float *scores)
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

/* Writes the new tokens' keys and values to their slots, then lets every new token attend. */
void treeline_team_attend(const Batch *batch, const Attention *layer, float *keys, float *values, const float *query,
                          int64_t query_stride, const float *key, int64_t key_stride, const float *value,
                          int64_t value_stride, float *output)
{
    const Data data = {keys, values, query, key, value, query_stride, key_stride, value_stride, output};
    int64_t count, most = 0;
    Tile *tiles = cut(batch, layer, &count);
    for (const Tile *tile = tiles; tile < tiles + count; tile++) {
        int64_t scores = tile->tokens * layer->group * (padded(tile->end - tile->first) + 1);
        most = scores > most ? scores : most;
    }
    float *scores = malloc(most * sizeof *scores);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count; i++)
        write_entries(tiles + i, layer, &data);
#pragma omp for schedule(dynamic)
    for (int64_t unit = count * layer->kv_heads - 1; unit >= 0; unit--) /* the last tiles of a prompt take longest */
        attend_tile(tiles + unit / layer->kv_heads, layer, unit % layer->kv_heads, &data, scores);
    free(scores);
    free(tiles);
}

void treeline_attend(const Batch *batch, const Attention *layer, float *keys, float *values, const float *query,
                     int64_t query_stride, const float *key, int64_t key_stride, const float *value,
                     int64_t value_stride, float *output)
{
    int64_t products = 0, size = layer->kv_heads * layer->group * (layer->key_dim + layer->value_dim);
    for (const Span *span = batch->spans; span < batch->spans + batch->count; span++)
        products += span->tokens * (span->length + span->entries) * size;
#pragma omp parallel num_threads(batch->threads) if (products > PARALLEL_PRODUCTS)
    treeline_team_attend(batch, layer, keys, values, query, query_stride, key, key_stride, value, value_stride, output);
}
