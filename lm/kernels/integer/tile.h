/* A tile's product for one instruction set. The including file defines SET, a name; FLOATS and INTEGERS, vectors of
   LANES outputs; VECTORS x TOKENS, the sums that fill the registers; and the operations on them.

   A group adds input scale * (weight scale * dot + minimum * input sum); with 8 bits and float16 scales, input scale *
   weight scale * (dot - 128 * input sum). Integer sums are exact, and floats are added group by group, each rounded at
   the same places: bits depend neither on the instruction set nor on other tokens. */
#define UNROLLED _Pragma("GCC unroll 8") for
#define JOINED(a, b) a##b
#define NAMED(a, b) JOINED(a, b)

/* sums [tokens, ROWS] of the outputs from `first` on; `format` and `tokens` are compile-time constants. */
INLINE void multiply(const uint8_t *tile, Format format, int64_t groups, const RoundedGroup *inputs, int tokens, int first,
                     float (*sums)[ROWS])
{
    const int bits = format.bits, halves = bits == 4 ? 2 : 1, words = bits == 4 ? 4 : 8;
    const int has_minimum = bits == 4 || format.scale == 4;
    /* Sign of the correction, if any, that turns dots of codes into those of codes minus 128, or back. */
    const int start = bits == 8 && has_minimum == LESS_128 ? (LESS_128 ? -1 : 1) : 0;
    FLOATS totals[TOKENS][VECTORS];
    UNROLLED (int t = 0; t < tokens; t++)
        UNROLLED (int v = 0; v < VECTORS; v++)
            totals[t][v] = splat(0);
    for (int64_t g = 0; g < groups; g++, tile += treeline_group_bytes(format), inputs++) {
        const uint8_t *codes = tile + treeline_scales_bytes(format) + 4 * first;
        INTEGERS dots[TOKENS][VECTORS];
        for (int64_t line = 0; line < treeline_group_bytes(format); line += 64)
            __builtin_prefetch(tile + groups * treeline_group_bytes(format) + line, 0, 2);
        UNROLLED (int t = 0; t < tokens; t++)
            UNROLLED (int v = 0; v < VECTORS; v++)
                dots[t][v] = begin(start * inputs[t * groups].start);
        UNROLLED (int w = 0; w < words; w++)
            UNROLLED (int half = 0; half < halves; half++) {
                INTEGERS weights[VECTORS];
                UNROLLED (int v = 0; v < VECTORS; v++)
                    weights[v] = unpack(codes + 4 * (w * ROWS + v * LANES), bits, half);
                UNROLLED (int t = 0; t < tokens; t++) {
                    INTEGERS four = splat_four(inputs[t * groups].codes + 4 * (w * halves + half));
                    UNROLLED (int v = 0; v < VECTORS; v++)
                        dots[t][v] = add_dot(bits, dots[t][v], weights[v], four);
                }
            }
        UNROLLED (int v = 0; v < VECTORS; v++) {
            const uint8_t *scales = tile + format.scale * (first + v * LANES), *minima = scales + format.scale * ROWS;
            FLOATS scale = format.scale == 4 ? load(scales) : widen(scales), minimum = splat(0);
            if (has_minimum)
                minimum = format.scale == 4 ? load(minima) : widen(minima);
            UNROLLED (int t = 0; t < tokens; t++) {
                FLOATS part = times(scale, finish(bits, dots[t][v]));
                if (has_minimum)
                    part = times_plus(minimum, splat(inputs[t * groups].sum), part);
                totals[t][v] = times_plus(splat(inputs[t * groups].scale), part, totals[t][v]);
            }
        }
    }
    UNROLLED (int t = 0; t < tokens; t++)
        UNROLLED (int v = 0; v < VECTORS; v++)
            store(sums[t] + first + v * LANES, totals[t][v]);
}

INLINE void multiply_some(const uint8_t *tile, Format format, int64_t groups, const RoundedGroup *inputs, int tokens,
                          float (*sums)[ROWS])
{
    for (int first = 0; first < ROWS; first += VECTORS * LANES)
        switch (tokens) {
#define CASE(n) case n: multiply(tile, format, groups, inputs, n, first, sums); break;
            CASE(1) CASE(2) CASE(3) CASE(4)
#if TOKENS > 4
            CASE(5) CASE(6) CASE(7) CASE(8)
#endif
#undef CASE
        }
}

void NAMED(treeline_integer_tile_, SET)(const uint8_t *tile, Format format, int64_t groups, const RoundedGroup *inputs,
                                        int64_t tokens, float (*sums)[ROWS])
{
    for (int64_t now; tokens; tokens -= now, inputs += now * groups, sums += now) {
        now = tokens <= TOKENS ? tokens : tokens < 2 * TOKENS ? (tokens + 1) / 2 : TOKENS; /* one alone is slow */
        if (format.bits == 4 && format.scale == 2)
            multiply_some(tile, (Format){4, 2}, groups, inputs, now, sums);
        else if (format.bits == 4)
            multiply_some(tile, (Format){4, 4}, groups, inputs, now, sums);
        else if (format.scale == 2)
            multiply_some(tile, (Format){8, 2}, groups, inputs, now, sums);
        else
            multiply_some(tile, (Format){8, 4}, groups, inputs, now, sums);
    }
}
