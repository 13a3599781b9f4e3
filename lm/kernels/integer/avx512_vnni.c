/* 16 outputs per vector, four integer products per lane and instruction. */
#ifdef __x86_64__
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#endif
#include <immintrin.h>
#include <string.h>

#include "integer.h"

#define SET avx512_vnni
#define LANES 16
#define VECTORS 2
#define TOKENS 8
#define LESS_128 0 /* whether 8-bit dots are of codes minus 128 */
#define FLOATS __m512
#define INTEGERS __m512i
#define INLINE static inline __attribute__((always_inline))

INLINE FLOATS splat(float x) { return _mm512_set1_ps(x); }

INLINE FLOATS widen(const uint8_t *halves) { return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)halves)); }

INLINE FLOATS load(const uint8_t *floats) { return _mm512_loadu_ps((const void *)floats); }

INLINE INTEGERS begin(int32_t start) { return _mm512_set1_epi32(start); }

INLINE FLOATS times(FLOATS a, FLOATS b) { return _mm512_mul_ps(a, b); }

INLINE FLOATS times_plus(FLOATS a, FLOATS b, FLOATS c) { return _mm512_fmadd_ps(a, b, c); }

INLINE void store(float *to, FLOATS x) { _mm512_storeu_ps(to, x); }

INLINE INTEGERS splat_four(const int8_t *codes)
{
    int32_t four;
    memcpy(&four, codes, sizeof four);
    return _mm512_set1_epi32(four);
}

INLINE INTEGERS unpack(const uint8_t *codes, int bits, int half)
{
    INTEGERS bytes = _mm512_loadu_si512(codes);
    if (bits == 8)
        return bytes;
    return _mm512_and_si512(half ? _mm512_srli_epi32(bytes, 4) : bytes, _mm512_set1_epi8(15));
}

INLINE INTEGERS add_dot(int bits, INTEGERS sum, INTEGERS weights, INTEGERS four)
{
    return _mm512_dpbusd_epi32(sum, weights, four);
}

INLINE FLOATS finish(int bits, INTEGERS sum) { return _mm512_cvtepi32_ps(sum); }

#include "tile.h"
#endif
