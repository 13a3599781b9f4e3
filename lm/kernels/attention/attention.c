/* Tree attention over the paged KV cache, float32.

   The new tokens of a sequence are cut into tiles; a tile and a key/value head are one unit of work. Its rows are the
   query heads of its tokens that share this head, so that they share the loads of keys and values, which are read in
   place. Scores of all entries come first, then their softmax, then the sum of values.

   A token's bits depend only on what it sees. A score is summed over dimensions in a fixed order, a row's values are
   summed entry by entry from the first, and its weights are summed as integers. An entry that a token does not see has
   weight 0 and changes neither sum. So the rest of the pass, tiles, threads, blocks, siblings in a tree and the width
   of vectors make no difference. */
#include <stdlib.h>
#include <string.h>

#include "tile.h"

enum {
    TILE_ROWS = 48,         /* most in a tile of several tokens */
    TILE_SCORES = 1 << 16,  /* most in a tile of several tokens: they stay in the L2 cache */
    UNITS = 2,              /* of work per thread, if there are enough tokens */
    PARALLEL_PRODUCTS = 1 << 18 /* below it, waking threads costs more than they save */
};

/* Tokens of a tile: few enough to balance the threads.
   16 tokens, 3 heads, 2 threads: 2 tiles of 8 tokens are 6 units, 3 for each thread; one of 16 would be 3 units. */
static int64_t tile_tokens(const Batch *batch, const Span *span, const Attention *layer)
{
    int64_t all = 0;
    for (const Span *each = batch->spans; each < batch->spans + batch->count; each++)
        all += each->tokens;
    int64_t rows = TILE_SCORES / (span->length + span->entries), fair = all * layer->kv_heads / (UNITS * batch->threads);
    int64_t most = (rows < TILE_ROWS ? rows : TILE_ROWS) / layer->group;
    most = most < fair ? most : fair;
    most = most > 1 ? most : 1;
    int64_t tiles = (span->tokens + most - 1) / most;
    return (span->tokens + tiles - 1) / tiles;
}

static Tile *cut(const Batch *batch, const Attention *layer, int64_t *count)
{
    *count = 0;
    for (const Span *span = batch->spans; span < batch->spans + batch->count; span++) {
        int64_t size = tile_tokens(batch, span, layer);
        *count += (span->tokens + size - 1) / size;
    }
    Tile *tiles = malloc(*count * sizeof *tiles), *next = tiles;
    for (const Span *span = batch->spans; span < batch->spans + batch->count; span++) {
        int64_t size = tile_tokens(batch, span, layer);
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

/* Writes the new tokens' keys and values to their slots, then lets every new token attend. */
void treeline_team_attend(const Batch *batch, const Attention *layer, float *keys, float *values, const float *query,
                          int64_t query_stride, const float *key, int64_t key_stride, const float *value,
                          int64_t value_stride, float *output)
{
    const Data data = {keys, values, query, key, value, query_stride, key_stride, value_stride, output};
    AttendTile *attend = treeline_attend_tile_narrow;
#ifdef __x86_64__
    attend = layer->wide ? treeline_attend_tile_wide : attend;
#endif
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
        attend(tiles + unit / layer->kv_heads, layer, unit % layer->kv_heads, &data, scores);
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
