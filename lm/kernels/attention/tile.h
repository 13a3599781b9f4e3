/* A unit of attention work: a tile of new tokens of one sequence, and a key/value head. */
#pragma once
#include "../kernels.h"

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

/* Scores per row: entries padded to vectors of 8. */
static inline int64_t padded(int64_t entries) { return (entries + 7) / 8 * 8; }

/* Position of a new token of the span. */
static inline int64_t position(const Span *span, int64_t token)
{
    return span->length + span->depths[span->entries - span->tokens + token];
}

/* The first committed entry that a new token sees. */
static inline int64_t first_seen(const Span *span, int64_t token, int64_t window)
{
    int64_t first = window ? position(span, token) - window + 1 : 0;
    return first < 0 ? 0 : first > span->length ? span->length : first;
}

/* scores: room for padded(end - first) + 1 numbers for each row. */
typedef void AttendTile(const Tile *tile, const Attention *layer, int64_t kv_head, const Data *data, float *scores);

AttendTile treeline_attend_tile_narrow, treeline_attend_tile_wide;
