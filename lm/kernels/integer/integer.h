/* Products in integers: weights in groups as in linear.c, inputs rounded to 8 bits with a scale for each token and group. */
#pragma once
#include "../tiles.h"

enum {
    MOST_TOKENS = 8 /* that a tile is multiplied by at a time */
};

/* 32 inputs of one token: scale * codes. Codes lie in the order in which the weights' codes are unpacked. */
typedef struct {
    float scale, sum; /* `sum` of the codes */
    int32_t start;    /* -128 * sum: what makes a product with codes of 8 bits one with codes less 128 */
    int8_t codes[GROUP];
} RoundedGroup;

/* sums [tokens, ROWS] = inputs [tokens, groups] times the weights of a tile [groups]; tokens <= MOST_TOKENS. */
typedef void IntegerTile(const uint8_t *tile, Format format, int64_t groups, const RoundedGroup *inputs, int64_t tokens,
                         float (*sums)[ROWS]);

IntegerTile treeline_integer_tile_avx2, treeline_integer_tile_avx_vnni, treeline_integer_tile_avx512_vnni,
    treeline_integer_tile_neon;
