/* Products with weights kept in groups of 4 or 8 bits, as GGUF files hold them.
 *
 * A weight is scale * code + minimum, in float32 and rounded once, so that products are those of the plain float32
 * weights. Rows of the weight are interleaved by ROWS, so that a vector holds neighbouring outputs, and a sum over the
 * inputs runs in their order in one accumulator per output: a token's bits do not depend on what else is in the pass. */
#include <string.h>

#include "vectors.h"

#define ROWS 32         /* outputs side by side in a tile */
#define GROUP 32        /* inputs that share a scale */
#define TOKENS 6        /* tokens multiplied at a time: two vectors of sums each fill the registers */
#define TOKEN_BLOCK 96  /* tokens per decoding of a tile: their accumulators stay in the first cache */


typedef struct { /* a word holds 8 inputs' codes of 4 bits, the first one lowest */
    uint16_t scale[ROWS], minimum[ROWS]; /* float16 */
    uint32_t codes[GROUP / 8][ROWS];
} Group4;

typedef struct { /* a word holds 4 inputs' codes of 8 bits, the first one lowest; the minimum is -128 scales */
    uint16_t scale[ROWS]; /* float16 */
    uint32_t codes[GROUP / 4][ROWS];
} Group8;

static inline v8f from_half(const uint16_t *halves) {
    /* Exact: the exponent's bias is mended by a product with a power of two, which serves subnormals as well. */
    v8i bits = __builtin_convertvector(*(const v8h *)halves, v8i);
    v8f value = (v8f)((bits & 0x7fff) << 13) * 0x1p112f;
    return (v8f)((v8i)value | (bits & 0x8000) << 16);
}

/* Codes stay where they are in the low half of their word, which makes them greater by a power of two; the scale is
 * smaller by the same. The product is exact, so that the sum with the minimum is rounded once. */
static inline v8f decode(v8u word, uint32_t mask, v8f scale, v8f minimum) {
    return __builtin_convertvector((v8i)(word & mask), v8f) * scale + minimum;
}

static inline void decode4(const Group4 *group, float weights[GROUP][ROWS]) {
    for (int side = 0; side < ROWS; side += 8) {
        v8f scale = from_half(group->scale + side), minimum = from_half(group->minimum + side);
        for (int k = 0; k < GROUP; k += 4) {
            v8u word = *(const v8u *)(group->codes[k / 8] + side) >> k % 8 * 4;
            for (int j = 0; j < 4; j++)
                *(v8f *)(weights[k + j] + side) = decode(word, 15u << 4 * j, scale * (1.0f / (1 << 4 * j)), minimum);
        }
    }
}

static inline void decode8(const Group8 *group, float weights[GROUP][ROWS]) {
    for (int side = 0; side < ROWS; side += 8) {
        v8f scale = from_half(group->scale + side), minimum = scale * -128.0f;
        for (int k = 0; k < GROUP; k += 2) {
            v8u word = *(const v8u *)(group->codes[k / 4] + side) >> k % 4 * 8;
            for (int j = 0; j < 2; j++)
                *(v8f *)(weights[k + j] + side) = decode(word, 255u << 8 * j, scale * (1.0f / (1 << 8 * j)), minimum);
        }
    }
}

/* sums[t] += weights^T inputs[t] over one group, for `count` vectors of outputs and `tokens`, known when compiled. */
static inline __attribute__((always_inline)) void multiply(
    const float (*weights)[ROWS], const float *inputs, int64_t stride, float (*sums)[ROWS], const int tokens,
    const int count) {
    v8f sum[12];
    for (int t = 0; t < tokens; t++)
        for (int v = 0; v < count; v++) sum[t * count + v] = *(v8f *)(sums[t] + 8 * v);
    for (int k = 0; k < GROUP; k++)
        for (int t = 0; t < tokens; t++)
            for (int v = 0; v < count; v++)
                sum[t * count + v] += *(const v8f *)(weights[k] + 8 * v) * inputs[t * stride + k];
    for (int t = 0; t < tokens; t++)
        for (int v = 0; v < count; v++) *(v8f *)(sums[t] + 8 * v) = sum[t * count + v];
}

static inline void multiply_all(
    const float (*weights)[ROWS], const float *inputs, int64_t stride, float (*sums)[ROWS], int64_t tokens) {
    /* Few tokens take more outputs at a time, since a sum waits for the one before. */
    if (tokens == 1) return multiply(weights, inputs, stride, sums, 1, 4);
    if (tokens == 2) return multiply(weights, inputs, stride, sums, 2, 4);
    for (int side = 0; side < ROWS; side += 16) {
        const float(*w)[ROWS] = (const float(*)[ROWS])(weights[0] + side), *x = inputs;
        float(*s)[ROWS] = (float(*)[ROWS])(sums[0] + side);
        int64_t left = tokens;
        for (; left >= TOKENS; left -= TOKENS, x += TOKENS * stride, s += TOKENS) multiply(w, x, stride, s, TOKENS, 2);
        switch (left) {
            case 5: multiply(w, x, stride, s, 5, 2); break;
            case 4: multiply(w, x, stride, s, 4, 2); break;
            case 3: multiply(w, x, stride, s, 3, 2); break;
            case 2: multiply(w, x, stride, s, 2, 2); break;
            case 1: multiply(w, x, stride, s, 1, 2); break;
        }
    }
}

/* outputs [tokens, features_out] = inputs [tokens, features_in] * weight^T + bias; bias may be NULL.
 *
 * tiles: per ROWS outputs features_in / GROUP groups of `bits` 4 or 8; rows beyond features_out are padding. */
void treeline_grouped_linear(
    const uint8_t *tiles, int64_t bits, const float *bias, const float *inputs, float *outputs, int64_t tokens,
    int64_t features_in, int64_t features_out, int64_t threads) {
    int64_t groups = features_in / GROUP, count = (features_out + ROWS - 1) / ROWS;
    int64_t tile_bytes = groups * (bits == 4 ? sizeof(Group4) : sizeof(Group8));
    #pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t tile = 0; tile < count; tile++) {
        float weights[GROUP][ROWS] __attribute__((aligned(64))), sums[TOKEN_BLOCK][ROWS] __attribute__((aligned(64)));
        const uint8_t *codes = tiles + tile * tile_bytes;
        int64_t first = tile * ROWS, rows = features_out - first < ROWS ? features_out - first : ROWS;
        for (int64_t start = 0; start < tokens; start += TOKEN_BLOCK) {
            int64_t block = tokens - start < TOKEN_BLOCK ? tokens - start : TOKEN_BLOCK;
            memset(sums, 0, block * sizeof(*sums));
            for (int64_t group = 0; group < groups; group++) {
                if (bits == 4) decode4((const Group4 *)codes + group, weights);
                else decode8((const Group8 *)codes + group, weights);
                multiply_all(weights, inputs + start * features_in + group * GROUP, features_in, sums, block);
            }
            for (int64_t t = 0; t < block; t++) {
                float *out = outputs + (start + t) * features_out + first;
                if (bias) for (int64_t r = 0; r < rows; r++) sums[t][r] += bias[first + r];
                memcpy(out, sums[t], rows * sizeof(float));
            }
        }
    }
}
