/* Whole decoder layers of Llama's kind, one after the other: what they compute is in the other kernels. */
#include <stdlib.h>

#include "kernels.h"

typedef struct {
    Linear qkv, o, gate_up, down;
    const float *input_norm, *mlp_norm;
    float input_epsilon, mlp_epsilon;
    Attention attention;
    float *keys, *values; /* of the cache */
} DecoderLayer;

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* out [tokens, size] = what `count` layers, which are of one shape, make of hidden [tokens, size].
   turns [tokens, key_dim / 2] of (cos, sin). One team of threads runs all of them. */
void treeline_decoder_layers(int64_t count, const DecoderLayer *layers, const Batch *batch, int64_t tokens,
                             int64_t size, const float *turns, const float *hidden, float *out)
{
    const Attention *heads = &layers->attention;
    int64_t queries = heads->kv_heads * heads->group, turned = queries + heads->kv_heads;
    int64_t qkv_size = layers->qkv.features_out, mixed_size = layers->o.features_in;
    int64_t gate_up_size = layers->gate_up.features_out, gated_size = layers->down.features_in;
    float *added = malloc(tokens * (2 * size + qkv_size + mixed_size + gate_up_size + gated_size) * sizeof *added);
    float *normed = added + tokens * size, *qkv = normed + tokens * size, *mixed = qkv + tokens * qkv_size;
    float *gate_up = mixed + tokens * mixed_size, *gated = gate_up + tokens * gate_up_size;
    const float *key = qkv + queries * heads->key_dim, *value = qkv + turned * heads->key_dim;
    void *room = malloc(larger(larger(treeline_room(&layers->qkv, tokens), treeline_room(&layers->o, tokens)),
                               treeline_room(&layers->down, tokens)));

#pragma omp parallel num_threads(batch->threads)
    {
        const float *residual = hidden;
        for (const DecoderLayer *layer = layers; layer < layers + count; layer++) {
            treeline_team_rms_norm(tokens, size, residual, layer == layers ? NULL : added, out, layer->input_norm,
                                   layer->input_epsilon, normed);
            treeline_team_linear(&layer->qkv, normed, qkv, tokens, room);
            treeline_team_rotate(tokens, turned, heads->key_dim, qkv, qkv_size, turns);
            treeline_team_attend(batch, &layer->attention, layer->keys, layer->values, qkv, qkv_size, key, qkv_size,
                                 value, qkv_size, mixed);
            treeline_team_linear(&layer->o, mixed, added, tokens, room);
            treeline_team_rms_norm(tokens, size, residual, added, out, layer->mlp_norm, layer->mlp_epsilon, normed);
            residual = out; /* from here on sums are made in place */
            treeline_team_linear(&layer->gate_up, normed, gate_up, tokens, room);
            treeline_team_silu_times(tokens, gated_size, gate_up, gated);
            treeline_team_linear(&layer->down, gated, added, tokens, room);
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < tokens * size; i++)
            out[i] += added[i];
    }
    free(room);
    free(added);
}
