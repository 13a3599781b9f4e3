/* 8 outputs per vector. Without VNNI, 8-bit products are summed in 16 bits: with 4-bit weights a whole group's fit
   (16 products of 15 * 127 = 30,480), with 8-bit ones two (2 * 128 * 127 = 32,512). Compiled twice: see avx_vnni.c. */
#ifdef __x86_64__
#ifdef VNNI
#define SET avx_vnni
#define INSTRUCTIONS "avx2,fma,f16c,avxvnni"
#else
#define SET avx2
#define INSTRUCTIONS "avx2,fma,f16c"
#endif
#define PRAGMA(text) _Pragma(#text)
#ifdef __clang__
#define TARGET(names) PRAGMA(clang attribute push(__attribute__((target(names))), apply_to = function))
#else
#define TARGET(names) PRAGMA(GCC target(names))
#endif
TARGET(INSTRUCTIONS)
#include <immintrin.h>
#include <string.h>

#include "integer.h"

#define LANES 8
#define VECTORS 2
#define TOKENS 4
#define FLOATS __m256
#define INTEGERS __m256i
#define INLINE static inline __attribute__((always_inline))

INLINE FLOATS splat(float x) { return _mm256_set1_ps(x); }

INLINE FLOATS widen(const uint8_t *halves) { return _mm256_cvtph_ps(_mm_loadu_si128((const void *)halves)); }

INLINE FLOATS load(const uint8_t *floats) { return _mm256_loadu_ps((const void *)floats); }

INLINE INTEGERS begin(int32_t start) { return _mm256_set1_epi32(start); }

INLINE FLOATS times(FLOATS a, FLOATS b) { return _mm256_mul_ps(a, b); }

INLINE FLOATS times_plus(FLOATS a, FLOATS b, FLOATS c) { return _mm256_fmadd_ps(a, b, c); }

INLINE void store(float *to, FLOATS x) { _mm256_storeu_ps(to, x); }

INLINE INTEGERS splat_four(const int8_t *codes)
{
    int32_t four;
    memcpy(&four, codes, sizeof four);
    return _mm256_set1_epi32(four);
}

INLINE INTEGERS unpack(const uint8_t *codes, int bits, int half)
{
    INTEGERS bytes = _mm256_loadu_si256((const void *)codes);
    if (bits == 8)
        return bytes;
    return _mm256_and_si256(half ? _mm256_srli_epi32(bytes, 4) : bytes, _mm256_set1_epi8(15));
}

#ifdef VNNI
#define LESS_128 0 /* whether 8-bit dots are of codes minus 128 */

INLINE INTEGERS add_dot(int bits, INTEGERS sum, INTEGERS weights, INTEGERS four)
{
    return _mm256_dpbusd_avx_epi32(sum, weights, four);
}

INLINE FLOATS finish(int bits, INTEGERS sum) { return _mm256_cvtepi32_ps(sum); }
#else
#define LESS_128 1

INLINE INTEGERS add_dot(int bits, INTEGERS sum, INTEGERS weights, INTEGERS four)
{
    if (bits == 4) {
        sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(weights, four));
    } else { /* the weights' signs move to the inputs */
        INTEGERS less_128 = _mm256_xor_si256(weights, _mm256_set1_epi8(-128));
        INTEGERS pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(less_128), _mm256_sign_epi8(four, less_128));
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    __asm__("" : "+x"(sum)); /* else the compiler computes products ahead of sums, and spills them */
    return sum;
}

INLINE FLOATS finish(int bits, INTEGERS sum)
{
    return _mm256_cvtepi32_ps(bits == 4 ? _mm256_madd_epi16(sum, _mm256_set1_epi16(1)) : sum);
}
#endif

#include "tile.h"
#endif
