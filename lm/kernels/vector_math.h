/* Arithmetic on vectors of 8 floats that C has no operators for. */
#pragma once
#include <string.h>

#include "vectors.h"

#define LANES 8
#define INLINE static inline __attribute__((always_inline))

#ifdef __clang__
#define shuffle8(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define shuffle8(a, b, ...) __builtin_shuffle(a, b, (v8i){__VA_ARGS__})
#endif

INLINE v8f load8(const float *from) { return *(const v8f *)from; }

INLINE void store8(float *to, v8f x) { *(v8f *)to = x; }

INLINE v8f splat8(float x) { return (v8f){x, x, x, x, x, x, x, x}; }

INLINE v8f select8(v8i mask, v8f yes, v8f no) { return (v8f)((mask & (v8i)yes) | (~mask & (v8i)no)); }

INLINE v8f max8(v8f a, v8f b) { return select8(a > b, a, b); }

/* The largest of `count` numbers, which are whole vectors. */
INLINE float largest8(const float *from, int64_t count)
{
    v8f even = load8(from), odd = even; /* two, since each waits for its last comparison */
    int64_t i = LANES;
    for (; i + LANES < count; i += 2 * LANES) {
        odd = max8(odd, load8(from + i));
        even = max8(even, load8(from + i + LANES));
    }
    v8f lanes = max8(even, i < count ? max8(odd, load8(from + i)) : odd);
    float most = lanes[0];
    for (int lane = 1; lane < LANES; lane++)
        most = lanes[lane] > most ? lanes[lane] : most;
    return most;
}

/* e^x to within 2e-7, for x <= 88; exactly 0 below -87.3. Cody and Waite's reduction, then the polynomial of Cephes'
   expf. */
INLINE v8f exp8(v8f x)
{
    const v8f round = splat8(12582912.0f); /* 1.5 * 2^23: a sum's last bits are the nearest integer */
    v8i vanishes = x < splat8(-87.3f);
    v8f shifted = x * splat8(1.44269504f) + round;
    v8f power = shifted - round;
    v8f rest = x - power * splat8(0.693359375f);
    rest = rest - power * splat8(-2.12194440e-4f);
    v8f y = splat8(1.9875691500e-4f);
    y = y * rest + splat8(1.3981999507e-3f);
    y = y * rest + splat8(8.3334519073e-3f);
    y = y * rest + splat8(4.1665795894e-2f);
    y = y * rest + splat8(1.6666665459e-1f);
    y = y * rest + splat8(5.0000001201e-1f);
    y = y * (rest * rest) + rest + splat8(1.0f);
    return (v8f)(~(v8u)vanishes & ((v8u)y + ((v8u)shifted << 23))); /* unsigned: vanishing lanes may wrap */
}

INLINE v8f tanh8(v8f x)
{
    v8f shrunk = exp8(select8(x < splat8(0), x + x, -(x + x)));
    v8f size = (splat8(1) - shrunk) / (splat8(1) + shrunk);
    return select8(x < splat8(0), -size, size);
}
