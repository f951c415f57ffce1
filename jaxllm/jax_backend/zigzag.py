"""The order of tokens on a mesh that splits the sequence.

Cut evenly, the devices with late tokens would have most of the work of causal attention, since a token sees all earlier ones.
Cut in 2N chunks, of which device i takes chunk i and chunk 2N - 1 - i, every device has the same.  Megatron's context
parallelism cuts rows like this; Striped Attention (arXiv:2311.09431) balances token by token.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from jaxllm.errors import ConfigError


def zigzag(length: int, shards: int) -> NDArray[np.int32]:
    """(S,) token at each place of a row, once the row is laid out for `shards` shards; ascending for one shard.

    ConfigError when a row cannot be cut into 2 * shards chunks.
    """
    index_S = np.arange(length, dtype=np.int32)
    if shards == 1:
        return index_S
    if length % (2 * shards):
        raise ConfigError(
            "data.sequence_length",
            f"{length} tokens cannot be cut into 2 * parallel.context = {2 * shards} chunks; use a multiple of {2 * shards}",
        )
    chunks = index_S.reshape(2 * shards, -1)
    return np.concatenate([np.concatenate([chunks[shard], chunks[-1 - shard]]) for shard in range(shards)])
