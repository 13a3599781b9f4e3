/* The same products with vectors of 16, for processors that have them. */
#define WIDE
#include "linear.c"
