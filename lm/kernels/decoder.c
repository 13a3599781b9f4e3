/* Whole Llama-like decoder layers, and the pass of a draft head around one. The computation is in the other kernels.
   One thread team runs all of a pass. */
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

typedef struct {
    Linear qkv, o, gate_up, down;
    const float *input_norm, *mlp_norm;
    float input_epsilon, mlp_epsilon;
    Attention attention;
    float *keys, *values; /* of the cache */
} DecoderLayer;

/* A draft head: one layer between its inputs and its output rows. Its qkv takes rows of twice the size: a token's
   normed embedding and its normed state. */
typedef struct {
    DecoderLayer layer;
    Linear output;
    const float *embedding, *state_norm, *norm;
    float state_epsilon, epsilon;
    int32_t norm_before_residual, norm_output; /* as lm/checkpoints/eagle3.py says */
} DraftHead;

/* Intermediate buffers of a layer, for all tokens of a pass. */
typedef struct {
    float *added, *normed, *qkv, *mixed, *gate_up, *gated;
    void *room; /* of products */
} Between;

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* Freed by `drop`. `size`: of a hidden state. */
static Between make(const DecoderLayer *layer, int64_t tokens, int64_t size)
{
    int64_t normed_size = layer->qkv.features_in, qkv_size = layer->qkv.features_out;
    int64_t mixed_size = layer->o.features_in, gate_up_size = layer->gate_up.features_out;
    int64_t floats = size + normed_size + qkv_size + mixed_size + gate_up_size + layer->down.features_in;
    Between b;
    b.added = malloc(tokens * floats * sizeof *b.added);
    b.normed = b.added + tokens * size;
    b.qkv = b.normed + tokens * normed_size;
    b.mixed = b.qkv + tokens * qkv_size;
    b.gate_up = b.mixed + tokens * mixed_size;
    b.gated = b.gate_up + tokens * gate_up_size;
    b.room = malloc(larger(larger(treeline_room(&layer->qkv, tokens), treeline_room(&layer->o, tokens)),
                           treeline_room(&layer->down, tokens)));
    return b;
}

static void drop(Between b)
{
    free(b.room);
    free(b.added);
}

/* Attention over `normed`, and the feed-forward part. total [tokens, size] becomes the sum of residual and attention;
   the output of the feed-forward part is left in `added`. */
static void team_mix(const DecoderLayer *layer, const Batch *batch, int64_t tokens, int64_t size, const float *turns,
                     const float *residual, float *total, const Between *b)
{
    const Attention *heads = &layer->attention;
    int64_t queries = heads->kv_heads * heads->group, turned = queries + heads->kv_heads;
    int64_t stride = layer->qkv.features_out;
    const float *key = b->qkv + queries * heads->key_dim, *value = b->qkv + turned * heads->key_dim;
    treeline_team_linear(&layer->qkv, b->normed, b->qkv, tokens, b->room);
    treeline_team_rotate(tokens, turned, heads->key_dim, b->qkv, stride, turns);
    treeline_team_attend(batch, heads, layer->keys, layer->values, b->qkv, stride, key, stride, value, stride, b->mixed);
    treeline_team_linear(&layer->o, b->mixed, b->added, tokens, b->room);
    treeline_team_rms_norm(tokens, size, residual, b->added, total, layer->mlp_norm, layer->mlp_epsilon, b->normed);
    treeline_team_linear(&layer->gate_up, b->normed, b->gate_up, tokens, b->room);
    treeline_team_silu_times(tokens, layer->down.features_in, b->gate_up, b->gated);
    treeline_team_linear(&layer->down, b->gated, b->added, tokens, b->room);
}

/* out [tokens, size] = hidden [tokens, size] after `count` layers of one shape.
   turns [tokens, key_dim / 2] of (cos, sin). */
void treeline_decoder_layers(int64_t count, const DecoderLayer *layers, const Batch *batch, int64_t tokens,
                             int64_t size, const float *turns, const float *hidden, float *out)
{
    const Between b = make(layers, tokens, size);
#pragma omp parallel num_threads(batch->threads)
    {
        const float *residual = hidden;
        for (const DecoderLayer *layer = layers; layer < layers + count; layer++) {
            treeline_team_rms_norm(tokens, size, residual, layer == layers ? NULL : b.added, out, layer->input_norm,
                                   layer->input_epsilon, b.normed);
            team_mix(layer, batch, tokens, size, turns, residual, out, &b);
            residual = out; /* from here on sums are made in place */
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < tokens * size; i++)
            out[i] += b.added[i];
    }
    drop(b);
}

/* One draft step of tokens whose predecessors have `states` [tokens, size]. Writes `next` [tokens, size], the states
   for their children, and logits [count, output.features_out] of the tokens `rows` [count]. turns as above. */
void treeline_draft_head(const DraftHead *head, const Batch *batch, int64_t tokens, int64_t size,
                         const int64_t *token_ids, const float *turns, const float *states, int64_t count,
                         const int64_t *rows, float *next, float *logits)
{
    const DecoderLayer *layer = &head->layer;
    const Between b = make(layer, tokens, size);
    float *normed = head->norm_output ? next : b.normed, *wanted = b.added;
#pragma omp parallel num_threads(batch->threads)
    {
#pragma omp for schedule(static)
        for (int64_t token = 0; token < tokens; token++) {
            const float *embedded = head->embedding + token_ids[token] * size, *state = states + token * size;
            float *input = b.normed + 2 * token * size;
            treeline_norm_row(size, embedded, NULL, NULL, layer->input_norm, layer->input_epsilon, input);
            treeline_norm_row(size, state, NULL, NULL, head->state_norm, head->state_epsilon, input + size);
            memcpy(next + token * size, head->norm_before_residual ? input + size : state, size * sizeof *next);
        }
        team_mix(layer, batch, tokens, size, turns, next, next, &b);
        treeline_team_rms_norm(tokens, size, next, b.added, next, head->norm, head->epsilon, normed);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < count; row++)
            memcpy(wanted + row * size, normed + rows[row] * size, size * sizeof *wanted);
        treeline_team_linear(&head->output, wanted, logits, count, b.room);
    }
    drop(b);
}

/* The states [tokens, fc.features_out] of tokens whose predecessors have these features, bits of bfloat16 [tokens,
   fc.features_in]. Each of a row's `parts` is normed separately. */
void treeline_head_states(const Linear *fc, int64_t parts, const float *norms, float epsilon, int64_t tokens,
                          const uint16_t *features, float *states, int64_t threads)
{
    int64_t size = fc->features_in / parts;
    float *normed = malloc(tokens * fc->features_in * sizeof *normed);
    void *room = malloc(treeline_room(fc, tokens));
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t part = 0; part < tokens * parts; part++) {
            float *row = normed + part * size;
            for (int64_t i = 0; i < size; i++) {
                uint32_t bits = (uint32_t)features[part * size + i] << 16; /* a bfloat16 is the high half of a float */
                memcpy(row + i, &bits, sizeof bits);
            }
            treeline_norm_row(size, row, NULL, NULL, norms + part % parts * size, epsilon, row);
        }
        treeline_team_linear(fc, normed, states, tokens, room);
    }
    free(room);
    free(normed);
}
