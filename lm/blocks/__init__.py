"""Which blocks of the KV cache are free, and which hold known tokens."""
