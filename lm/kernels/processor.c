/* Which kernels may run here. */
#include "kernels.h"

int treeline_runs(int kernel) {
#ifdef __x86_64__
    int wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    switch (kernel) {
    case AVX_VNNI: return __builtin_cpu_supports("avxvnni");
    case FLOAT32_WIDE: return wide;
    case AVX512_VNNI: return wide && __builtin_cpu_supports("avx512vnni");
    default: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    }
#else
    return kernel == FLOAT32;
#endif
}
