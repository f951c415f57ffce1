"""A Llama as one writes it by hand in plain JAX: dictionaries of arrays, a scan over layers, optax.  Options: checkpoint.

Shape legend: L layers, B batch, S sequence, E hidden, H heads, K key/value heads, D head_dim, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import load_file

from benchmarks.throughput.workers.protocol import (
    BETAS,
    CLIP_NORM,
    EPS,
    LEARNING_RATE,
    WEIGHT_DECAY,
    Clock,
    read_request,
    write_answer,
)

Params = dict[str, Any]
_PER_LAYER = {
    "attention_norm": "input_layernorm",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def load(folder: str, config: dict[str, Any]) -> Params:
    """Weights of transformers' Llama, matrices as (inputs, outputs), layers stacked."""
    stored = {name: array for file in Path(folder).glob("*.safetensors") for name, array in load_file(file).items()}
    layers = {
        name: np.stack([stored[f"model.layers.{i}.{theirs}.weight"].T for i in range(config["num_hidden_layers"])])
        for name, theirs in _PER_LAYER.items()
    }
    params: Params = {
        "embedding": stored["model.embed_tokens.weight"],
        "norm": stored["model.norm.weight"],
        "layers": layers,
    }
    if not config.get("tie_word_embeddings"):
        params["head"] = stored["lm_head.weight"].T
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + eps)).astype(x.dtype) * scale


def rotated(x_BSHD: jax.Array, cos_SD: jax.Array, sin_SD: jax.Array) -> jax.Array:
    first, second = jnp.split(x_BSHD, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return x_BSHD * cos_SD[:, None].astype(x_BSHD.dtype) + turned * sin_SD[:, None].astype(x_BSHD.dtype)


def forward(params: Params, inputs_BS: jax.Array, config: dict[str, Any], *, checkpoint: bool) -> jax.Array:
    heads, kv_heads, eps = config["num_attention_heads"], config["num_key_value_heads"], config["rms_norm_eps"]
    batch, length = inputs_BS.shape
    size = config["hidden_size"] // heads
    theta = (config.get("rope_parameters") or {}).get("rope_theta", 10_000.0)
    angles_SD = jnp.arange(length)[:, None] * theta ** (-jnp.arange(0, size, 2) / size)
    angles_SD = jnp.concatenate([angles_SD, angles_SD], axis=-1)
    cos, sin = jnp.cos(angles_SD), jnp.sin(angles_SD)

    def layer(x_BSE: jax.Array, weights: Params) -> tuple[jax.Array, None]:
        y = rms_norm(x_BSE, weights["attention_norm"], eps)
        query = rotated((y @ weights["query"]).reshape(batch, length, heads, size), cos, sin)
        key = rotated((y @ weights["key"]).reshape(batch, length, kv_heads, size), cos, sin)
        value = (y @ weights["value"]).reshape(batch, length, kv_heads, size)
        kernel = "cudnn" if jax.default_backend() == "gpu" and query.dtype == jnp.bfloat16 else "xla"
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation=kernel)
        x_BSE = x_BSE + mixed.reshape(batch, length, -1) @ weights["output"]
        y = rms_norm(x_BSE, weights["mlp_norm"], eps)
        return x_BSE + (jax.nn.silu(y @ weights["gate"]) * (y @ weights["up"])) @ weights["down"], None

    body = jax.checkpoint(layer, prevent_cse=False) if checkpoint else layer
    x_BSE, _ = jax.lax.scan(body, params["embedding"][inputs_BS], params["layers"])
    x_BSE = rms_norm(x_BSE, params["norm"], eps)
    return x_BSE @ (params["head"] if "head" in params else params["embedding"].T)


def main() -> None:
    request = read_request()
    clock = Clock(request)
    config = request.config
    dtype = jnp.bfloat16 if request.precision == "bf16" else jnp.float32
    params = load(request.folder, config)
    decays = jax.tree.map(lambda leaf: leaf.ndim >= 2, params)
    decays["layers"] = {name: not name.endswith("norm") for name in params["layers"]}
    optimizer = optax.chain(
        optax.clip_by_global_norm(CLIP_NORM),
        optax.adamw(LEARNING_RATE, *BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, mask=decays),
    )
    state = optimizer.init(params)

    def loss_of(params: Params, tokens: jax.Array) -> jax.Array:
        used = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        logits = forward(used, tokens[:, :-1], config, checkpoint=bool(request.options.get("checkpoint")))
        logits = logits.astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    @jax.jit(donate_argnums=(0, 1))
    def step(params: Params, state: Any, tokens: jax.Array) -> tuple[Params, Any, jax.Array]:
        loss, gradients = jax.value_and_grad(loss_of)(params, tokens)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    for tokens in clock.batches():
        params, state, loss = step(params, state, jnp.asarray(tokens, jnp.int32))
        clock.done(loss)
    stats = jax.local_devices()[0].memory_stats() or {}
    write_answer(clock.answer(stats.get("peak_bytes_in_use") if request.device == "cuda" else None))


if __name__ == "__main__":
    main()
