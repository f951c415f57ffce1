"""One configurable decoder-only Transformer in Flax NNX, driven by `ModelSpec`."""
