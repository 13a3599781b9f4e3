/* Integer products: weights in groups as in linear.c, inputs rounded to 8 bits with a scale per token and group. */
#pragma once
#include "../tiles.h"

enum {
    MOST_TOKENS = 8 /* multiplied with a tile at a time */
};

/* 32 inputs of one token: scale * codes. Codes are in the order in which the weights' codes are unpacked. */
typedef struct {
    float scale, sum; /* `sum` of the codes */
    int32_t start;    /* -128 * sum: turns a dot with 8-bit codes into one with codes minus 128 */
    int8_t codes[GROUP];
} RoundedGroup;

/* sums [tokens, ROWS] = inputs [tokens, groups] times the weights of a tile [groups]; tokens <= MOST_TOKENS. */
typedef void IntegerTile(const uint8_t *tile, Format format, int64_t groups, const RoundedGroup *inputs, int64_t tokens,
                         float (*sums)[ROWS]);

IntegerTile treeline_integer_tile_avx2, treeline_integer_tile_avx_vnni, treeline_integer_tile_avx512_vnni,
    treeline_integer_tile_neon;
