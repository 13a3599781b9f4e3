/* From scores to tokens: which may follow, which is largest, which a draft proposes. */
#include <math.h>

#include "kernels.h"
#include "vector_math.h"

enum {
    BLOCK = 8 * LANES,          /* columns skipped at once, unless their largest score is among the best so far */
    PARALLEL_SCORES = 1 << 14   /* below it, waking threads costs more than they save */
};

/* The block of a row that begins at `from`; copied to `room` and padded if fewer columns are left. */
static const float *block_of(const float *row, int64_t from, int64_t columns, float *room)
{
    if (from + BLOCK <= columns)
        return row + from;
    for (int64_t i = 0; i < BLOCK; i++)
        room[i] = from + i < columns ? row[from + i] : -INFINITY;
    return room;
}

/* Inserts a column's score into the `count` best so far, best first, after those not less. */
static void insert(int64_t count, int64_t *ids, float *best, int64_t column, float score)
{
    int64_t place = count;
    for (; place > 0 && score > best[place - 1]; place--) {
        best[place] = best[place - 1];
        ids[place] = ids[place - 1];
    }
    best[place] = score;
    ids[place] = column;
}

static void best_of_row(int64_t columns, const float *row, int64_t most, int64_t *ids, float *best)
{
    float room[BLOCK];
    for (int64_t column = 0; column < most; column++)
        insert(column, ids, best, column, row[column]);
    for (int64_t from = 0; from < columns; from += BLOCK) {
        if (!(largest8(block_of(row, from, columns, room), BLOCK) > best[most - 1]))
            continue;
        int64_t end = from + BLOCK < columns ? from + BLOCK : columns;
        for (int64_t column = from > most ? from : most; column < end; column++)
            if (row[column] > best[most - 1])
                insert(most - 1, ids, best, column, row[column]);
    }
}

/* The sum of e^(score - most) over a row, always in the same order. */
static float weight_of_row(int64_t columns, const float *row, float most)
{
    float room[BLOCK], sum = 0;
    v8f sums[2] = {0};
    for (int64_t from = 0; from < columns; from += BLOCK) {
        const float *block = block_of(row, from, columns, room);
        for (int i = 0; i < BLOCK; i += LANES)
            sums[i / LANES % 2] += exp8(load8(block + i) - splat8(most));
    }
    for (int lane = 0; lane < LANES; lane++)
        sum += sums[0][lane] + sums[1][lane];
    return sum;
}

/* The `most` best columns of each row of scores [count, columns], the first of equals first, and their softmax
   probabilities over the row, `least` or more: ids and probs [count, most]. 1 <= most <= columns. */
void treeline_best(int64_t count, int64_t columns, const float *scores, int64_t most, float least, int64_t *ids,
                   float *probs, int threads)
{
#pragma omp parallel for schedule(static) num_threads(threads) if (count * columns > PARALLEL_SCORES)
    for (int64_t i = 0; i < count; i++) {
        const float *row = scores + i * columns;
        float *best = probs + i * most;
        best_of_row(columns, row, most, ids + i * most, best);
        float first = best[0], share = 1 / weight_of_row(columns, row, first);
        for (int64_t place = 0; place < most; place++)
            best[place] = fmaxf(expf(best[place] - first) * share, least);
    }
}

/* The scores of up to 32 neighbouring columns, minus infinity where a bit is 0; the first column's bit is lowest. */
INLINE void may(const float *scores, uint32_t bits, int64_t columns, float *out)
{
    const v8i first_bits = {1, 2, 4, 8, 16, 32, 64, 128};
    if (columns >= 32)
        for (int i = 0; i < 32; i += LANES) {
            v8i set = ((int32_t)(bits >> i) & first_bits) != 0;
            store8(out + i, select8(set, load8(scores + i), splat8(-INFINITY)));
        }
    else
        for (int64_t i = 0; i < columns; i++)
            out[i] = bits >> i & 1 ? scores[i] : -INFINITY;
}

/* Bars tokens in the `rows` [count] of scores [, columns]: columns whose bit in bits [count, words] is 0 become minus
   infinity. */
void treeline_bar(int64_t count, const int64_t *rows, int64_t words, const uint32_t *bits, int64_t columns,
                  float *scores, int threads)
{
#pragma omp parallel for schedule(static) num_threads(threads) if (count * columns > PARALLEL_SCORES)
    for (int64_t i = 0; i < count; i++)
        for (int64_t from = 0; from < columns; from += 32) {
            float *some = scores + rows[i] * columns + from;
            may(some, bits[i * words + from / 32], columns - from, some);
        }
}

/* The column with the largest allowed score, the first of equals, in each row of scores [count, columns]; 0 if none is
   allowed. Bits as above; without any, all are allowed. */
void treeline_largest(int64_t count, int64_t words, const uint32_t *bits, int64_t columns, const float *scores,
                      int64_t *ids, int threads)
{
#pragma omp parallel for schedule(static) num_threads(threads) if (count * columns > PARALLEL_SCORES)
    for (int64_t i = 0; i < count; i++) {
        float most = -INFINITY;
        ids[i] = 0;
        for (int64_t from = 0; from < columns; from += 32) {
            float masked[32];
            const float *some = scores + i * columns + from;
            int64_t left = columns - from < 32 ? columns - from : 32;
            if (bits) {
                uint32_t allowed = bits[i * words + from / 32];
                if (!allowed)
                    continue;
                may(some, allowed, left, masked);
                some = masked;
            }
            if (left == 32 && !(largest8(some, 32) > most))
                continue;
            for (int64_t column = 0; column < left; column++)
                if (some[column] > most) {
                    most = some[column];
                    ids[i] = from + column;
                }
        }
    }
}
