/* Vectors of 8 numbers, which gcc and clang lower to whatever the processor has. */
#pragma once
#include <stdint.h>

#ifdef __x86_64__
#ifdef WIDE
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#else
#pragma GCC target("avx2,fma")
#endif
#endif

typedef float v8f __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t v8i __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint32_t v8u __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint16_t v8h __attribute__((vector_size(16), aligned(2), may_alias));
