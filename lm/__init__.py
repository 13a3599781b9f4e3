"""The language-model runtime: weights, block KV cache, tree attention, the packed forward pass, sampling."""

import os

_KERNELS = "192"
"""On the CPU oneDNN compiles a 0.2 MiB kernel for each layer shape and number of tokens, and keeps 1,024 in each of two
caches: 430 MiB, reached after minutes of varying batches. 192 cover the sizes to which `PackedLinear` pads."""
for _cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # oneDNN's own, and torch's in front of it
    os.environ.setdefault(_cache, _KERNELS)
