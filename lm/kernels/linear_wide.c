/* The same products with vectors of 16, for processors that have such. */
#define WIDE
#include "linear.c"
