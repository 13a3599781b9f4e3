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

/* out [tokens, size] = what `count` layers, which are of one shape, make of hidden [tokens, size].
   turns [tokens, key_dim / 2] of (cos, sin). */
void treeline_decoder_layers(int64_t count, const DecoderLayer *layers, const Batch *batch, int64_t tokens,
                             int64_t size, const float *turns, const float *hidden, float *out)
{
    const Attention *heads = &layers->attention;
    int64_t queries = heads->kv_heads * heads->group, turned = queries + heads->kv_heads, threads = batch->threads;
    int64_t qkv_size = layers->qkv.features_out, mixed_size = layers->o.features_in;
    int64_t gate_up_size = layers->gate_up.features_out, gated_size = layers->down.features_in;
    float *added = malloc(tokens * (2 * size + qkv_size + mixed_size + gate_up_size + gated_size) * sizeof *added);
    float *normed = added + tokens * size, *qkv = normed + tokens * size, *mixed = qkv + tokens * qkv_size;
    float *gate_up = mixed + tokens * mixed_size, *gated = gate_up + tokens * gate_up_size;
    const float *key = qkv + queries * heads->key_dim, *value = qkv + turned * heads->key_dim;

    for (const DecoderLayer *layer = layers; layer < layers + count; layer++) {
        treeline_rms_norm(tokens, size, hidden, layer == layers ? NULL : added, out, layer->input_norm,
                          layer->input_epsilon, normed, threads);
        treeline_linear(&layer->qkv, normed, qkv, tokens, threads);
        treeline_rotate(tokens, turned, heads->key_dim, qkv, qkv_size, turns, threads);
        treeline_attend(batch, &layer->attention, layer->keys, layer->values, qkv, qkv_size, key, qkv_size, value,
                        qkv_size, mixed);
        treeline_linear(&layer->o, mixed, added, tokens, threads);
        treeline_rms_norm(tokens, size, hidden, added, out, layer->mlp_norm, layer->mlp_epsilon, normed, threads);
        hidden = out; /* from here on sums are made in place */
        treeline_linear(&layer->gate_up, normed, gate_up, tokens, threads);
        treeline_silu_times(tokens, gated_size, gate_up, gated, threads);
        treeline_linear(&layer->down, gated, added, tokens, threads);
    }
    for (int64_t i = 0; i < tokens * size; i++)
        out[i] += added[i];
    free(added);
}
