/* Products with weights kept in groups of 4 or 8 bits, as GGUF files hold them.
 *
 * A weight is scale * code + minimum, in float32 and rounded once, so that products are those of the plain float32
 * weights. Outputs are interleaved by ROWS, so that a vector holds neighbouring ones, and a sum over the inputs runs in
 * their order in one accumulator per output: a token's bits do not depend on what else is in the pass. */
#include <string.h>

#include "kernels.h"
#include "vectors.h"

#define ROWS 32        /* outputs side by side in a tile */
#define VECTORS 4      /* of 8 outputs in a tile */
#define GROUP 32       /* inputs that share a scale */
#define TOKENS 6       /* tokens multiplied at a time: two vectors of sums each fill the registers */
#define TOKEN_BLOCK 96 /* tokens per decoding of a tile: their sums stay in the first cache */
#define INLINE static inline __attribute__((always_inline))

/* A group of a tile: float16 scale [ROWS], with 4 bits float16 minimum [ROWS], then words [GROUP * bits / 32][ROWS] of
 * codes side by side, the first input's lowest. With 8 bits the minimum is -128 scales. */
INLINE int64_t group_bytes(int bits) { return 2 * ROWS * (bits == 4 ? 2 : 1) + GROUP * ROWS * bits / 8; }

INLINE const uint32_t *words_of(const uint8_t *group, int bits, int word) {
    return (const uint32_t *)(group + 2 * ROWS * (bits == 4 ? 2 : 1)) + word * ROWS;
}

INLINE v8f from_half(const uint16_t *halves) {
    /* Exact: the exponent's bias is mended by a product with a power of two, which serves subnormals as well. */
    v8i bits = __builtin_convertvector(*(const v8h *)halves, v8i);
    v8f value = (v8f)((bits & 0x7fff) << 13) * 0x1p112f;
    return (v8f)((v8i)value | (bits & 0x8000) << 16);
}

/* Codes stay where they are in the low half of their word, which makes them greater by a power of two; the scale of
 * place j is smaller by the same. */
INLINE void scales_of(const uint8_t *group, int bits, int vector, v8f scales[4], v8f *minimum) {
    const uint16_t *halves = (const uint16_t *)group + 8 * vector;
    v8f scale = from_half(halves);
    for (int j = 0; j < 16 / bits; j++) scales[j] = scale * (1.0f / (1 << bits * j));
    if (bits == 4) *minimum = from_half(halves + ROWS);
    else *minimum = scale * -128.0f;
}

INLINE v8f decode(v8u word, int bits, int j, v8f scale, v8f minimum) {
    uint32_t mask = ((1u << bits) - 1) << bits * j;
    /* The product is exact, so that the sum is rounded once. */
    return __builtin_convertvector((v8i)(word & mask), v8f) * scale + minimum;
}

INLINE void decode_group(const uint8_t *group, int bits, float weights[GROUP][ROWS]) {
    for (int v = 0; v < VECTORS; v++) {
        v8f scales[4], minimum;
        scales_of(group, bits, v, scales, &minimum);
        float(*out)[ROWS] = weights;
        for (int w = 0; w < GROUP * bits / 32; w++) {
            v8u word = *(const v8u *)(words_of(group, bits, w) + 8 * v);
            for (int half = 0; half < 2; half++, word >>= 16)
                for (int j = 0; j < 16 / bits; j++, out++)
                    *(v8f *)(*out + 8 * v) = decode(word, bits, j, scales[j], minimum);
        }
    }
}

/* sums[t] += weights^T inputs[t] over one group, for up to 4 tokens and `count` vectors of outputs from the first given
 * one on, all known when compiled: no weight is written down in between. */
INLINE void multiply_few(
    const uint8_t *group, int bits, const float *inputs, int64_t stride, float (*sums)[ROWS], int tokens, int first,
    int count) {
    v8f scales[VECTORS][4], minimum[VECTORS], sum[4][VECTORS];
    for (int v = 0; v < count; v++) {
        scales_of(group, bits, first + v, scales[v], &minimum[v]);
        for (int t = 0; t < tokens; t++) sum[t][v] = *(v8f *)(sums[t] + 8 * (first + v));
    }
    for (int w = 0; w < GROUP * bits / 32; w++) {
        v8u word[VECTORS];
        for (int v = 0; v < count; v++) word[v] = *(const v8u *)(words_of(group, bits, w) + 8 * (first + v));
        for (int half = 0; half < 2; half++) {
            for (int j = 0; j < 16 / bits; j++, inputs++)
                for (int v = 0; v < count; v++) {
                    v8f weight = decode(word[v], bits, j, scales[v][j], minimum[v]);
                    for (int t = 0; t < tokens; t++) sum[t][v] += weight * inputs[t * stride];
                }
            for (int v = 0; v < count; v++) word[v] >>= 16;
        }
    }
    for (int t = 0; t < tokens; t++)
        for (int v = 0; v < count; v++) *(v8f *)(sums[t] + 8 * (first + v)) = sum[t][v];
}

/* sums[t] += weights^T inputs[t] over one group, for 16 outputs and `tokens`, known when compiled. */
INLINE void multiply(
    const float (*weights)[ROWS], const float *inputs, int64_t stride, float (*sums)[ROWS], int tokens) {
    v8f left[TOKENS], right[TOKENS];
    for (int t = 0; t < tokens; t++) {
        left[t] = *(v8f *)sums[t];
        right[t] = *(v8f *)(sums[t] + 8);
    }
    for (int k = 0; k < GROUP; k++)
        for (int t = 0; t < tokens; t++) {
            left[t] += *(const v8f *)weights[k] * inputs[t * stride + k];
            right[t] += *(const v8f *)(weights[k] + 8) * inputs[t * stride + k];
        }
    for (int t = 0; t < tokens; t++) {
        *(v8f *)sums[t] = left[t];
        *(v8f *)(sums[t] + 8) = right[t];
    }
}

/* The same for all outputs and any number of tokens. */
static void multiply_many(
    const float (*weights)[ROWS], const float *inputs, int64_t stride, float (*sums)[ROWS], int64_t tokens) {
    for (int side = 0; side < ROWS; side += 16) {
        const float(*w)[ROWS] = (const float(*)[ROWS])(weights[0] + side), *x = inputs;
        float(*s)[ROWS] = (float(*)[ROWS])(sums[0] + side);
        for (int64_t left = tokens, now; left; left -= now, x += now * stride, s += now) {
            now = left <= TOKENS ? left : left <= TOKENS + 2 ? 4 : TOKENS; /* 6 and 2 are slower than 4 and 4 */
            switch (now) {
                case 6: multiply(w, x, stride, s, 6); break;
                case 5: multiply(w, x, stride, s, 5); break;
                case 4: multiply(w, x, stride, s, 4); break;
                case 3: multiply(w, x, stride, s, 3); break;
                case 2: multiply(w, x, stride, s, 2); break;
                case 1: multiply(w, x, stride, s, 1); break;
            }
        }
    }
}

/* sums [tokens] = inputs [tokens, GROUP * groups] times the tile's weights, tokens <= TOKEN_BLOCK. */
INLINE void multiply_tile(
    const uint8_t *tile, int bits, const float *inputs, int64_t groups, float (*sums)[ROWS], int64_t tokens) {
    float weights[GROUP][ROWS] __attribute__((aligned(64)));
    int64_t stride = GROUP * groups;
    memset(sums, 0, tokens * sizeof(*sums));
    for (int64_t g = 0; g < groups; g++, tile += group_bytes(bits), inputs += GROUP) switch (tokens) {
        case 1: multiply_few(tile, bits, inputs, stride, sums, 1, 0, 4); break;
        case 2: multiply_few(tile, bits, inputs, stride, sums, 2, 0, 4); break;
        case 3:
            multiply_few(tile, bits, inputs, stride, sums, 3, 0, 2);
            multiply_few(tile, bits, inputs, stride, sums, 3, 2, 2);
            break;
        case 4:
            multiply_few(tile, bits, inputs, stride, sums, 4, 0, 2);
            multiply_few(tile, bits, inputs, stride, sums, 4, 2, 2);
            break;
        default:
            decode_group(tile, bits, weights);
            multiply_many(weights, inputs, stride, sums, tokens);
    }
}

/* outputs [tokens, features_out] = inputs [tokens, features_in] * weight^T + bias; bias may be NULL.
 *
 * tiles: per ROWS outputs features_in / GROUP groups of `bits` 4 or 8; rows beyond features_out are padding. */
void treeline_grouped_linear(
    const uint8_t *tiles, int64_t bits, const float *bias, const float *inputs, float *outputs, int64_t tokens,
    int64_t features_in, int64_t features_out, int64_t threads) {
    int64_t groups = features_in / GROUP, count = (features_out + ROWS - 1) / ROWS;
    #pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t tile = 0; tile < count; tile++) {
        float sums[TOKEN_BLOCK][ROWS] __attribute__((aligned(64)));
        const uint8_t *codes = tiles + tile * groups * group_bytes(bits);
        int64_t first = tile * ROWS, rows = features_out - first < ROWS ? features_out - first : ROWS;
        for (int64_t start = 0; start < tokens; start += TOKEN_BLOCK) {
            int64_t block = tokens - start < TOKEN_BLOCK ? tokens - start : TOKEN_BLOCK;
            if (bits == 4) multiply_tile(codes, 4, inputs + start * features_in, groups, sums, block);
            else multiply_tile(codes, 8, inputs + start * features_in, groups, sums, block);
            for (int64_t t = 0; t < block; t++) {
                if (bias) for (int64_t r = 0; r < rows; r++) sums[t][r] += bias[first + r];
                memcpy(outputs + (start + t) * features_out + first, sums[t], rows * sizeof(float));
            }
        }
    }
}
