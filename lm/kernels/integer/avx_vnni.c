/* The same with four integer products per lane and instruction. */
#define VNNI
#include "avx2.c"
