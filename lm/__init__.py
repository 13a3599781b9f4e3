"""The language-model runtime: weights, block KV cache, tree attention, the packed forward pass, sampling."""
