/* 4 outputs per vector, four products of signed integers per lane and instruction: ARM processors since about 2018. */
#ifdef __aarch64__
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif
#include <arm_neon.h>
#include <string.h>

#include "integer.h"

#define SET neon
#define LANES 4
#define VECTORS 4
#define TOKENS 4
#define LESS_128 1 /* whether 8-bit dots are of codes minus 128 */
#define FLOATS float32x4_t
#define INTEGERS int32x4_t
#define INLINE static inline __attribute__((always_inline))

INLINE FLOATS splat(float x) { return vdupq_n_f32(x); }

INLINE FLOATS widen(const uint8_t *halves) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(halves))); }

INLINE FLOATS load(const uint8_t *floats) { return vreinterpretq_f32_u8(vld1q_u8(floats)); }

INLINE INTEGERS begin(int32_t start) { return vdupq_n_s32(start); }

INLINE FLOATS times(FLOATS a, FLOATS b) { return vmulq_f32(a, b); }

INLINE FLOATS times_plus(FLOATS a, FLOATS b, FLOATS c) { return vfmaq_f32(c, a, b); }

INLINE void store(float *to, FLOATS x) { vst1q_f32(to, x); }

INLINE INTEGERS splat_four(const int8_t *codes)
{
    int32_t four;
    memcpy(&four, codes, sizeof four);
    return vdupq_n_s32(four);
}

INLINE INTEGERS unpack(const uint8_t *codes, int bits, int half)
{
    uint8x16_t bytes = vld1q_u8(codes);
    if (bits == 8)
        return vreinterpretq_s32_u8(veorq_u8(bytes, vdupq_n_u8(128)));
    return vreinterpretq_s32_u8(half ? vshrq_n_u8(bytes, 4) : vandq_u8(bytes, vdupq_n_u8(15)));
}

INLINE INTEGERS add_dot(int bits, INTEGERS sum, INTEGERS weights, INTEGERS four)
{
    return vdotq_s32(sum, vreinterpretq_s8_s32(weights), vreinterpretq_s8_s32(four));
}

INLINE FLOATS finish(int bits, INTEGERS sum) { return vcvtq_f32_s32(sum); }

#include "tile.h"
#endif
