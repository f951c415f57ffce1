"""Attention on TPU: splash attention, JAX's block-sparse flash attention (arXiv:2205.14135) as a Pallas kernel.

Scores never leave the chip's vector memory, and blocks that a causal mask or a window hides are skipped.  Elsewhere than on TPU
the kernel runs in Pallas' interpreter, which is slow: good for tests of its numbers.

Shape legend: B batch, S queries, T keys, H heads, K key/value heads, G = H / K queries per key, D head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from jaxllm.errors import ConfigError
from jaxllm.families.spec import AttentionSpec
from jaxllm.jax_backend.attention.visibility import Visibility
from jaxllm.jax_backend.attention.xla import xla_attention
from jaxllm.jax_backend.remat import ATTENTION_MIXED

if TYPE_CHECKING:
    from jaxllm.jax_backend.model.runtime import Runtime

LANES = 128
"""Width of a TPU's vector registers: blocks of the sequence are multiples of it."""


@dataclass(frozen=True)
class Blocks:
    """How the kernel cuts the sequence.

    query and key: rows and columns of scores that one step of the forward kernel holds; compute: columns it works on at a
    time.  The same with `back_` for the backward kernel.  fused: one backward kernel for all gradients instead of two, which
    computes the scores once instead of twice, and writes a partial gradient of the query for every block of keys.
    """

    query: int
    key: int
    compute: int
    back_query: int
    back_key: int
    back_compute: int
    fused: bool = False


# One row per generation, by what JAX calls the device.  Larger blocks mean fewer steps, each of which costs about 0.35
# microseconds, and more masked scores that are computed for nothing along the diagonal; vector memory bounds them.
# docs/tpu_compile.md says how they were chosen.
BLOCKS: Mapping[str, Blocks] = {
    "TPU v4": Blocks(1024, 1024, 512, 1024, 1024, 512),
    "TPU v5 lite": Blocks(1024, 1024, 512, 1024, 1024, 512),
    "TPU v5": Blocks(1024, 1024, 512, 1024, 1024, 512),
    "TPU v6 lite": Blocks(2048, 2048, 512, 2048, 2048, 512),
    "TPU7x": Blocks(2048, 2048, 512, 2048, 2048, 512),
}
_ELSEWHERE = Blocks(512, 512, 512, 512, 512, 512)


def splash_attention(
    query_BSHD: jax.Array,
    key_BTKD: jax.Array,
    value_BTKD: jax.Array,
    visibility: Visibility,
    spec: AttentionSpec,
    runtime: Runtime,
    dropout_key: jax.Array | None,
    blocks: Blocks | None = None,
) -> jax.Array:
    """As `AttentionKernel`; self-attention over whole rows, each device on its own rows and heads.

    blocks: instead of the generation's own.  A few queries over a cache are left to XLA.  ConfigError as `check_splash`.
    """
    queries, heads, head_dim = query_BSHD.shape[1:]
    keys, kv_heads = key_BTKD.shape[1:3]
    if visibility.query_segments is None and (queries != keys or queries % LANES):
        return xla_attention(query_BSHD, key_BTKD, value_BTKD, visibility, spec, runtime, dropout_key)
    check_splash(spec if dropout_key is not None else replace(spec, dropout=0.0), queries, runtime.policy.compute)
    device = runtime.layout.mesh.devices.flat[0]
    sizes = fitted(blocks or blocks_for(device.device_kind, queries), queries, keys)
    groups, interpret = heads // kv_heads, device.platform != "tpu"
    kernel = kernel_of_group(groups, queries, keys, spec.causal, spec.window, spec.softcap, sizes, interpret)
    segments = () if visibility.query_segments is None else (visibility.query_segments, visibility.key_segments)

    def local(query_BSHD: jax.Array, key_BTKD: jax.Array, value_BTKD: jax.Array, *segments: jax.Array) -> jax.Array:
        """Batch and key/value heads are mapped over, so that both cores of a chip that has two share the work."""
        rows, _, local_heads, _ = query_BSHD.shape
        groups = local_heads // key_BTKD.shape[2]
        query_BKGSD = query_BSHD.reshape(rows, queries, -1, groups, head_dim).transpose(0, 2, 3, 1, 4)

        def one(query_GSD: jax.Array, key_TD: jax.Array, value_TD: jax.Array, *ids: jax.Array) -> jax.Array:
            attended = kernel(query_GSD, key_TD, value_TD, kernels.SegmentIds(*ids) if ids else None)
            return cast(jax.Array, attended)

        over_heads = jax.vmap(one, in_axes=(0, 0, 0, *(None for _ in segments)))
        mixed_BKGSD: jax.Array = jax.vmap(over_heads)(
            query_BKGSD, key_BTKD.transpose(0, 2, 1, 3), value_BTKD.transpose(0, 2, 1, 3), *segments
        )
        return mixed_BKGSD.transpose(0, 3, 1, 2, 4).reshape(rows, queries, local_heads, head_dim)

    # The kernel does not scale; in float32, so that the query is rounded once.
    query_BSHD = (query_BSHD.astype(jnp.float32) * spec.scale).astype(runtime.policy.compute)
    layout = runtime.layout
    by_head, by_kv_head = layout.spec("batch", None, "heads", None), layout.spec("batch", None, "kv_heads", None)
    sharded = jax.shard_map(
        local,
        mesh=layout.mesh,
        in_specs=(by_head, by_kv_head, by_kv_head, *(layout.spec("batch", None) for _ in segments)),
        out_specs=by_head,
        check_vma=False,
    )
    with jax.default_matmul_precision("highest" if runtime.policy.compute == jnp.float32 else "default"):
        return sharded(query_BSHD, key_BTKD, value_BTKD, *segments)


def check_splash(spec: AttentionSpec, length: int, dtype: np.dtype) -> None:
    """ConfigError for what the kernel cannot do: a sequence its blocks do not divide, dropout of the weights, float64."""
    if length % LANES:
        raise ConfigError("jax.attention", f"splash needs a sequence length divisible by {LANES}, not {length}; use xla")
    if spec.dropout:
        raise ConfigError(
            "jax.attention", f"splash has no dropout of attention weights ({spec.dropout}); set the model's to 0 or use xla"
        )
    if dtype.itemsize > 4:
        raise ConfigError("jax.attention", "splash computes its softmax in float32; use xla with training.precision fp64")


def blocks_for(device_kind: str, length: int, block: int | None = None) -> Blocks:
    """The blocks of a generation for rows of `length` tokens.  block: of queries and keys, instead of the table's."""
    row = BLOCKS.get(device_kind, _ELSEWHERE)
    if block is not None:
        row = replace(row, query=block, key=block, back_query=block, back_key=block)
    return fitted(row, length, length)


def fitted(blocks: Blocks, queries: int, keys: int) -> Blocks:
    """The largest blocks, none larger than asked for, that divide the sequence."""
    key, back_key = _divisor(keys, blocks.key), _divisor(keys, blocks.back_key)
    return Blocks(
        _divisor(queries, blocks.query),
        key,
        _divisor(key, blocks.compute),
        _divisor(queries, blocks.back_query),
        back_key,
        _divisor(back_key, blocks.back_compute),
        blocks.fused,
    )


def _divisor(length: int, largest: int) -> int:
    return max(size for size in range(LANES, max(largest, LANES) + 1, LANES) if length % size == 0)


@lru_cache(maxsize=32)
def kernel_of_group(
    groups: int,
    queries: int,
    keys: int,
    causal: bool,
    window: int | None,
    softcap: float | None,
    blocks: Blocks,
    interpret: bool,
    residuals: bool = False,
) -> kernels.SplashAttentionKernel:
    """The kernel of the query heads of one key/value head; what it knows of the mask is computed here, once.

    residuals: it gives the logsumexp of the scores as well, for those who differentiate it themselves.
    """
    shape = (queries, keys)
    mask: masks.Mask = masks.CausalMask(shape) if causal else masks.FullMask(shape)
    if window is not None:  # a token sees itself and the `window - 1` before it, and as many after it unless causal
        mask = masks.LocalMask(shape, (window - 1, 0 if causal else window - 1), 0)
    with jax.ensure_compile_time_eval():
        made = kernels.make_splash_mqa(
            masks.MultiHeadMask([mask] * groups),
            head_shards=1,
            q_seq_shards=1,
            block_sizes=kernels.BlockSizes(
                block_q=blocks.query,
                block_kv=blocks.key,
                block_kv_compute=blocks.compute,
                block_q_dkv=blocks.back_query,
                block_kv_dkv=blocks.back_key,
                block_kv_dkv_compute=blocks.back_compute,
                block_q_dq=None if blocks.fused else blocks.back_query,
                block_kv_dq=None if blocks.fused else blocks.back_key,
                use_fused_bwd_kernel=blocks.fused,
            ),
            attn_logits_soft_cap=softcap,
            save_residuals=residuals,
            residual_checkpoint_name=None if residuals else ATTENTION_MIXED,
            interpret=interpret,
        )
        return cast(kernels.SplashAttentionKernel, jax.tree.map(np.asarray, made))
