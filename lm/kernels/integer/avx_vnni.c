/* The same with products of four integers a lane and instruction. */
#define VNNI
#include "avx2.c"
