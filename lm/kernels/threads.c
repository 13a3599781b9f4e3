/* Pins the threads of a team to cores. */
#define _GNU_SOURCE
#include <omp.h>
#include <sched.h>

/* Pins each of the caller's `threads` threads to the next `each` of `cores`. */
void treeline_place_threads(const int *cores, int each, int threads)
{
#pragma omp parallel num_threads(threads)
    {
        const int *own = cores + omp_get_thread_num() * each;
        cpu_set_t set;
        CPU_ZERO(&set);
        for (int i = 0; i < each; ++i)
            CPU_SET(own[i], &set);
        sched_setaffinity(0, sizeof set, &set);
    }
}
