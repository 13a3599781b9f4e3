/* The same products with vectors of 16, for processors with AVX-512. */
#ifdef __x86_64__
#define WIDE
#include "linear.c"
#endif
