/* Operations of a decoder layer besides products and attention, on rows of float32. A row's bits depend on that row
   alone. Sizes are multiples of 8. */
#include <math.h>

#include "kernels.h"
#include "vector_math.h"

enum { PARALLEL_FLOATS = 1 << 16 }; /* below it, waking threads costs more than they save */

/* total = hidden + added, if `added` is given; out = total / sqrt(mean of squares + epsilon) * weight. Each is a row of
   `size` numbers; `out` may be `total`. */
void treeline_norm_row(int64_t size, const float *hidden, const float *added, float *total, const float *weight,
                       float epsilon, float *out)
{
    v8f squares = {0};
    for (int64_t i = 0; i < size; i += LANES) {
        v8f x = load8(hidden + i);
        if (added) {
            x += load8(added + i);
            store8(total + i, x);
        }
        squares += x * x;
    }
    const float *row = added ? total : hidden;
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++)
        sum += squares[lane];
    v8f scale = splat8(1.0f / sqrtf(sum / size + epsilon));
    for (int64_t i = 0; i < size; i += LANES)
        store8(out + i, load8(row + i) * scale * load8(weight + i));
}

/* The same for rows [tokens, size]. */
void treeline_team_rms_norm(int64_t tokens, int64_t size, const float *hidden, const float *added, float *total,
                            const float *weight, float epsilon, float *out)
{
#pragma omp for schedule(static)
    for (int64_t first = 0; first < tokens * size; first += size)
        treeline_norm_row(size, hidden + first, added ? added + first : NULL, added ? total + first : NULL, weight,
                          epsilon, out + first);
}

/* Rotates the first `heads` heads of each row, in place: (x, y) -> (x cos - y sin, x sin + y cos) for adjacent pairs.
   turns [tokens, head_dim / 2] of (cos, sin). */
void treeline_team_rotate(int64_t tokens, int64_t heads, int64_t head_dim, float *rows, int64_t stride,
                          const float *turns)
{
    const v8f signs = {-1, 1, -1, 1, -1, 1, -1, 1};
#pragma omp for schedule(static)
    for (int64_t token = 0; token < tokens; token++)
        for (int64_t i = 0; i < head_dim; i += LANES) {
            v8f turn = load8(turns + token * head_dim + i);
            v8f cosines = shuffle8(turn, turn, 0, 0, 2, 2, 4, 4, 6, 6);
            v8f sines = shuffle8(turn, turn, 1, 1, 3, 3, 5, 5, 7, 7) * signs;
            for (int64_t head = 0; head < heads; head++) {
                float *pairs = rows + token * stride + head * head_dim + i;
                v8f x = load8(pairs);
                store8(pairs, x * cosines + shuffle8(x, x, 1, 0, 3, 2, 5, 4, 7, 6) * sines);
            }
        }
}

/* out [tokens, size] = silu(gate) * up; gate_up [tokens, 2 * size], the gates first. */
void treeline_team_silu_times(int64_t tokens, int64_t size, const float *gate_up, float *out)
{
#pragma omp for schedule(static)
    for (int64_t token = 0; token < tokens; token++)
        for (int64_t i = 0; i < size; i += LANES) {
            v8f gate = load8(gate_up + 2 * token * size + i), up = load8(gate_up + (2 * token + 1) * size + i);
            v8f shrunk = exp8(-max8(gate, splat8(-88.0f)));
            store8(out + token * size + i, gate / (splat8(1.0f) + shrunk) * up);
        }
}

void treeline_rms_norm(int64_t tokens, int64_t size, const float *hidden, const float *added, float *total,
                       const float *weight, float epsilon, float *out, int threads)
{
#pragma omp parallel num_threads(threads) if (tokens * size > PARALLEL_FLOATS)
    treeline_team_rms_norm(tokens, size, hidden, added, total, weight, epsilon, out);
}

void treeline_rotate(int64_t tokens, int64_t heads, int64_t head_dim, float *rows, int64_t stride, const float *turns,
                     int threads)
{
#pragma omp parallel num_threads(threads) if (tokens * heads * head_dim > PARALLEL_FLOATS)
    treeline_team_rotate(tokens, heads, head_dim, rows, stride, turns);
}

void treeline_silu_times(int64_t tokens, int64_t size, const float *gate_up, float *out, int threads)
{
#pragma omp parallel num_threads(threads) if (tokens * size > PARALLEL_FLOATS)
    treeline_team_silu_times(tokens, size, gate_up, out);
}
