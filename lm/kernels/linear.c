/* Products with weights kept in groups of 4 or 8 bits, as GGUF files hold them, or in bfloat16.
 *
 * A weight is scale * code + minimum, in float32 and rounded once, so products equal those of plain float32 weights;
 * bfloat16 is the high half of a float32. Outputs are interleaved by ROWS, so a vector holds neighbouring ones. Sums
 * over the inputs run in order, in one accumulator per output, so a token's bits depend neither on the rest of the pass
 * nor on the vector width. Compiled twice: see linear_wide.c. */
#include <stdlib.h>
#include <string.h>

#include "tiles.h"
#include "vectors.h"

#ifdef WIDE
#define SIZED(name) name##_wide
#define LANES 16
#define TOKENS 12 /* multiplied at a time: with two vectors of sums each, registers are full */
#define FEW_TOKENS 8 /* the same if weights are decoded meanwhile */
#else
#define SIZED(name) name##_narrow
#define LANES 8
#define TOKENS 6
#define FEW_TOKENS 4
#endif
#define VECTORS (ROWS / LANES)
#define TOKEN_BLOCK 96 /* tokens per decoding of a tile: their sums stay in the L1 cache */
#define FORMAT(bits, scale) ((bits) * 8 + (scale))
#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t vu __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t vh __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

INLINE const uint32_t *words_of(const uint8_t *group, Format format, int word) {
    return (const uint32_t *)(group + treeline_scales_bytes(format)) + word * ROWS;
}

INLINE vf from_half(const uint16_t *halves) {
    /* Exact: multiplying by a power of two corrects the exponent's bias, for subnormals too. */
    vi bits = __builtin_convertvector(*(const vh *)halves, vi);
    vf value = (vf)((bits & 0x7fff) << 13) * 0x1p112f;
    return (vf)((vi)value | (bits & 0x8000) << 16);
}

/* Codes are not shifted within the low half of their word, so they are too large by a power of two; the scale of
 * place j is smaller by the same. */
INLINE void scales_of(const uint8_t *group, Format format, int vector, vf scales[4], vf *minimum) {
    const uint16_t *halves = (const uint16_t *)group + LANES * vector;
    const float *floats = (const float *)group + LANES * vector;
    vf scale = {0};
    if (format.scale == 2) scale = from_half(halves);
    if (format.scale == 4) scale = *(const vf *)floats;
    for (int j = 0; j < 16 / format.bits; j++) scales[j] = scale * (1.0f / (1 << format.bits * j));
    *minimum = scale * -128.0f;
    if (format.scale == 2 && format.bits == 4) *minimum = from_half(halves + ROWS);
    if (format.scale == 4) *minimum = *(const vf *)(floats + ROWS);
}

INLINE vf decode(vu word, Format format, int j, vf scale, vf minimum) {
    int bits = format.bits;
    if (format.scale == 0) return (vf)(word << 16);
    uint32_t mask = ((1u << bits) - 1) << bits * j;
    /* The product is exact, or the compiler fuses it with the sum: either way the weight is rounded once. */
    return __builtin_convertvector((vi)(word & mask), vf) * scale + minimum;
}

INLINE void decode_group(const uint8_t *group, Format format, float weights[GROUP][ROWS]) {
    for (int v = 0; v < VECTORS; v++) {
        vf scales[4], minimum;
        scales_of(group, format, v, scales, &minimum);
        float(*out)[ROWS] = weights;
        for (int w = 0; w < GROUP * format.bits / 32; w++) {
            vu word = *(const vu *)(words_of(group, format, w) + LANES * v);
            for (int half = 0; half < 2; half++, word >>= 16)
                for (int j = 0; j < 16 / format.bits; j++, out++)
                    *(vf *)(*out + LANES * v) = decode(word, format, j, scales[j], minimum);
        }
    }
}

/* sums[t] += weights^T inputs[t] over one group, for up to FEW_TOKENS and `count` vectors of outputs from vector
 * `first` on, all compile-time constants: no weight is stored in between. */
INLINE void multiply_few(
    const uint8_t *group, Format format, const float *inputs, int64_t stride, float (*sums)[ROWS], int tokens,
    int first, int count) {
    vf scales[VECTORS][4], minimum[VECTORS], sum[FEW_TOKENS][VECTORS];
    for (int v = 0; v < count; v++) {
        scales_of(group, format, first + v, scales[v], &minimum[v]);
        for (int t = 0; t < tokens; t++) sum[t][v] = *(vf *)(sums[t] + LANES * (first + v));
    }
    for (int w = 0; w < GROUP * format.bits / 32; w++) {
        vu word[VECTORS];
        if (format.bits == 16) for (int line = 0; line < 2; line++) /* the hardware prefetcher stops at page ends */
            __builtin_prefetch(words_of(group, format, w) + 16 * line + 1024, 0, 2);
        for (int v = 0; v < count; v++) word[v] = *(const vu *)(words_of(group, format, w) + LANES * (first + v));
        for (int half = 0; half < 2; half++) {
            for (int j = 0; j < 16 / format.bits; j++, inputs++)
                for (int v = 0; v < count; v++) {
                    vf weight = decode(word[v], format, j, scales[v][j], minimum[v]);
                    for (int t = 0; t < tokens; t++) sum[t][v] += weight * inputs[t * stride];
                }
            for (int v = 0; v < count; v++) word[v] >>= 16;
        }
    }
    for (int t = 0; t < tokens; t++)
        for (int v = 0; v < count; v++) *(vf *)(sums[t] + LANES * (first + v)) = sum[t][v];
}

/* sums[t] += weights^T inputs[t] over one group, for two vectors of outputs; `tokens` is a compile-time constant. */
INLINE void multiply(
    const float (*weights)[ROWS], const float *inputs, int64_t stride, float (*sums)[ROWS], int tokens) {
    vf left[TOKENS], right[TOKENS];
    for (int t = 0; t < tokens; t++) {
        left[t] = *(vf *)sums[t];
        right[t] = *(vf *)(sums[t] + LANES);
    }
    for (int k = 0; k < GROUP; k++)
        for (int t = 0; t < tokens; t++) {
            left[t] += *(const vf *)weights[k] * inputs[t * stride + k];
            right[t] += *(const vf *)(weights[k] + LANES) * inputs[t * stride + k];
        }
    for (int t = 0; t < tokens; t++) {
        *(vf *)sums[t] = left[t];
        *(vf *)(sums[t] + LANES) = right[t];
    }
}

/* The same for all outputs and any number of tokens, in parts of about the same size: a small one is slow. */
static void multiply_many(
    const float (*weights)[ROWS], const float *inputs, int64_t stride, float (*sums)[ROWS], int64_t tokens) {
    for (int side = 0; side < ROWS; side += 2 * LANES) {
        const float(*w)[ROWS] = (const float(*)[ROWS])(weights[0] + side), *x = inputs;
        float(*s)[ROWS] = (float(*)[ROWS])(sums[0] + side);
        int64_t parts = (tokens + TOKENS - 1) / TOKENS;
        for (int64_t left = tokens, now; parts; left -= now, x += now * stride, s += now, parts--) {
            now = (left + parts - 1) / parts;
            switch (now) {
#define CASE(n) case n: multiply(w, x, stride, s, n); break;
                CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#ifdef WIDE
                CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
#undef CASE
            }
        }
    }
}

/* sums [tokens] = inputs [tokens, GROUP * groups] times the tile's weights, tokens <= TOKEN_BLOCK. */
INLINE void multiply_tile(
    const uint8_t *tile, Format format, const float *inputs, int64_t groups, float (*sums)[ROWS], int64_t tokens) {
    float weights[GROUP][ROWS] __attribute__((aligned(64)));
    int64_t stride = GROUP * groups;
    memset(sums, 0, tokens * sizeof(*sums));
    for (int64_t g = 0; g < groups; g++, tile += treeline_group_bytes(format), inputs += GROUP) switch (tokens) {
#define CASE(n, count) \
        case n: \
            for (int first = 0; first < VECTORS; first += count) \
                multiply_few(tile, format, inputs, stride, sums, n, first, count); \
            break;
        CASE(1, VECTORS) CASE(2, VECTORS) CASE(3, 2) CASE(4, 2)
#ifdef WIDE
        CASE(5, 2) CASE(6, 2) CASE(7, 2) CASE(8, 2)
#endif
#undef CASE
        default:
            decode_group(tile, format, weights);
            multiply_many(weights, inputs, stride, sums, tokens);
    }
}

void SIZED(treeline_float_linear)(
    const Linear *linear, const float *inputs, float *outputs, int64_t tokens, void *room) {
    int64_t features_in = linear->features_in, features_out = linear->features_out;
    const float *bias = linear->bias;
    int64_t groups = features_in / GROUP, count = (features_out + ROWS - 1) / ROWS;
    #pragma omp for schedule(static)
    for (int64_t tile = 0; tile < count; tile++) {
        float sums[TOKEN_BLOCK][ROWS] __attribute__((aligned(64)));
        const uint8_t *codes = linear->tiles + tile * groups * treeline_group_bytes(linear->format);
        int64_t first = tile * ROWS, rows = features_out - first < ROWS ? features_out - first : ROWS;
        for (int64_t start = 0; start < tokens; start += TOKEN_BLOCK) {
            int64_t block = tokens - start < TOKEN_BLOCK ? tokens - start : TOKEN_BLOCK;
            const float *x = inputs + start * features_in;
            switch (FORMAT(linear->format.bits, linear->format.scale)) {
#define CASE(bits, scale) \
            case FORMAT(bits, scale): multiply_tile(codes, (Format){bits, scale}, x, groups, sums, block); break;
                CASE(4, 2) CASE(8, 2) CASE(16, 0) CASE(4, 4) CASE(8, 4) CASE(16, 4)
#undef CASE
            }
            for (int64_t t = 0; t < block; t++) {
                if (bias) for (int64_t r = 0; r < rows; r++) sums[t][r] += bias[first + r];
                memcpy(outputs + (start + t) * features_out + first, sums[t], rows * sizeof(float));
            }
        }
    }
}

#ifndef WIDE
void treeline_team_linear(
    const Linear *linear, const float *inputs, float *outputs, int64_t tokens, void *room) {
    static Product *const products[] = {
        [FLOAT32] = treeline_float_linear_narrow, [FLOAT32_WIDE] = treeline_float_linear_wide,
        [AVX2] = treeline_integer_linear, [AVX_VNNI] = treeline_integer_linear,
        [AVX512_VNNI] = treeline_integer_linear, [NEON] = treeline_integer_linear,
    };
    products[linear->kernel](linear, inputs, outputs, tokens, room);
}

void treeline_linear(const Linear *linear, const float *inputs, float *outputs, int64_t tokens, int64_t threads) {
    void *room = malloc(treeline_room(linear, tokens));
    #pragma omp parallel num_threads(threads)
    treeline_team_linear(linear, inputs, outputs, tokens, room);
    free(room);
}
#endif
