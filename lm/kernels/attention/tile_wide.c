/* The same with vectors of 16, for processors that have them. */
#ifdef __x86_64__
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), apply_to = function)
#endif
#define WIDE
#include "tile.c"
#endif
