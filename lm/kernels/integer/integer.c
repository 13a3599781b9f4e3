/* Rounds the inputs of a product to 8 bits in groups, and runs its tiles with the chosen instructions. */
#include <math.h>
#include <string.h>

#include "../kernels.h"
#include "integer.h"

#if defined(__x86_64__) && defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#elif defined(__x86_64__)
#pragma GCC target("avx2")
#endif

enum { TOKEN_BLOCK = 64 }; /* tokens per read of a tile: their sums stay in the L1 cache */

static const float SMALLEST = 0x1p-100f; /* below it 127 / x overflows */

static IntegerTile *const TILES[] = {
    [FLOAT32] = NULL,
#ifdef __x86_64__
    [AVX2] = treeline_integer_tile_avx2,
    [AVX_VNNI] = treeline_integer_tile_avx_vnni,
    [AVX512_VNNI] = treeline_integer_tile_avx512_vnni,
#endif
#ifdef __aarch64__
    [NEON] = treeline_integer_tile_neon,
#endif
};

/* Codes are the nearest integers, ties to even, to x * (127 / the largest |x|). 4-bit weights are unpacked from the low
   halves of bytes, then from the high ones, so of every 8 inputs the even ones come first. */
#ifdef __x86_64__
#include <immintrin.h>

static float largest_magnitude(const __m256 x[4])
{
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(INT32_MAX));
    __m256 most = _mm256_setzero_ps();
    for (int i = 0; i < 4; i++)
        most = _mm256_max_ps(most, _mm256_and_ps(x[i], magnitude));
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(most), _mm256_extractf128_ps(most, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

static RoundedGroup round_group(const float *inputs, int64_t bits)
{
    const __m256i in_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7); /* undoes the word order of packing */
    const __m256i even_first =
        _mm256_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15, 0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11,
                         13, 15);
    RoundedGroup group;
    __m256 x[4];
    __m256i words[4];
    for (int i = 0; i < 4; i++)
        x[i] = _mm256_loadu_ps(inputs + 8 * i);
    float most = largest_magnitude(x), steps = most < SMALLEST ? 0 : 127 / most;
    for (int i = 0; i < 4; i++)
        words[i] = _mm256_cvtps_epi32(_mm256_mul_ps(x[i], _mm256_set1_ps(steps)));
    __m256i sums = _mm256_add_epi32(_mm256_add_epi32(words[0], words[1]), _mm256_add_epi32(words[2], words[3]));
    __m128i half = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    int32_t sum = _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
    __m256i codes = _mm256_packs_epi16(_mm256_packs_epi32(words[0], words[1]), _mm256_packs_epi32(words[2], words[3]));
    codes = _mm256_permutevar8x32_epi32(codes, in_order);
    if (bits == 4)
        codes = _mm256_shuffle_epi8(codes, even_first);
    _mm256_storeu_si256((void *)group.codes, codes);
    group.scale = most < SMALLEST ? 0 : most / 127;
    group.sum = sum;
    group.start = -128 * sum;
    return group;
}
#else
static RoundedGroup round_group(const float *inputs, int64_t bits)
{
    RoundedGroup group;
    float most = 0;
    for (int i = 0; i < GROUP; i++)
        most = fmaxf(most, fabsf(inputs[i]));
    float steps = most < SMALLEST ? 0 : 127 / most;
    int32_t sum = 0;
    for (int i = 0; i < GROUP; i++) {
        int32_t code = lrintf(inputs[i] * steps);
        group.codes[bits == 4 ? (i & ~7) + i % 2 * 4 + i % 8 / 2 : i] = code;
        sum += code;
    }
    group.scale = most < SMALLEST ? 0 : most / 127;
    group.sum = sum;
    group.start = -128 * sum;
    return group;
}
#endif

void treeline_integer_linear(const Linear *linear, const float *inputs, float *outputs, int64_t tokens, void *room)
{
    int64_t size = linear->features_in, groups = size / GROUP, count = (linear->features_out + ROWS - 1) / ROWS;
    IntegerTile *multiply = TILES[linear->kernel];
    RoundedGroup *rounded = room;
    float sums[TOKEN_BLOCK][ROWS] __attribute__((aligned(64)));
#pragma omp for schedule(static)
    for (int64_t i = 0; i < tokens * groups; i++)
        rounded[i] = round_group(inputs + i * GROUP, linear->format.bits);
#pragma omp for schedule(static)
    for (int64_t tile = 0; tile < count; tile++) {
        const uint8_t *weights = linear->tiles + tile * groups * treeline_group_bytes(linear->format);
        int64_t first = tile * ROWS, left = linear->features_out - first, rows = left < ROWS ? left : ROWS;
        for (int64_t start = 0; start < tokens; start += TOKEN_BLOCK) {
            int64_t block = tokens - start < TOKEN_BLOCK ? tokens - start : TOKEN_BLOCK;
            multiply(weights, linear->format, groups, rounded + start * groups, block, sums);
            for (int64_t t = 0; t < block; t++) {
                if (linear->bias)
                    for (int64_t r = 0; r < rows; r++)
                        sums[t][r] += linear->bias[first + r];
                memcpy(outputs + (start + t) * linear->features_out + first, sums[t], rows * sizeof(float));
            }
        }
    }
}

int64_t treeline_room(const Linear *linear, int64_t tokens)
{
    return tokens * linear->features_in / GROUP * sizeof(RoundedGroup);
}
