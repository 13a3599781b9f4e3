/* Which kernels may run here. */
#include "kernels.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#define HAS_DOT (getauxval(AT_HWCAP) & 1 << 20) /* HWCAP_ASIMDDP */
#elif defined(__aarch64__) && defined(__APPLE__)
#define HAS_DOT 1
#else
#define HAS_DOT 0
#endif

int treeline_runs(int kernel) {
#ifdef __x86_64__
    int wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    switch (kernel) {
    case FLOAT32: case AVX2:
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    case AVX_VNNI: return __builtin_cpu_supports("avxvnni");
    case FLOAT32_WIDE: return wide;
    case AVX512_VNNI: return wide && __builtin_cpu_supports("avx512vnni");
    default: return 0;
    }
#else
    return kernel == FLOAT32 || (kernel == NEON && HAS_DOT);
#endif
}
