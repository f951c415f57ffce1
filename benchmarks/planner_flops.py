"""FLOPs that the planner counts against XLA's `cost_analysis` of the forward and the backward pass, before optimisation.

XLA counts the body of a loop once, whatever its trips, so the models have one layer; that the count grows with the layers is
the formula's own arithmetic.  The XLA attention kernel computes the full square of scores, of which model FLOPs count half.
"""

from __future__ import annotations

from typing import Any

MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "llama 1B": ({"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8}, 2048),
    "llama 8B": ({"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}, 1024),
    "gpt2 xl": ({"family": "gpt2", "n_embd": 1600, "n_head": 25, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}, 1024),
}


def compare_flops() -> list[dict[str, Any]]:
    """One line for each model and pass."""
    return [line for name, (keys, sequence) in MODELS.items() for line in compare_one(name, keys, sequence)]


def compare_one(name: str, keys: dict[str, Any], sequence: int) -> list[dict[str, Any]]:
    """Forward alone, and forward and backward together, of one layer, the embedding and the head."""
    import jax
    import jax.numpy as jnp

    from jaxllm.config.schema import ModelConfig
    from jaxllm.families import resolve_model
    from jaxllm.jax_backend.attention.xla import xla_attention
    from jaxllm.jax_backend.mesh import single_device_mesh
    from jaxllm.jax_backend.model.runtime import Runtime
    from jaxllm.jax_backend.network import build_network
    from jaxllm.jax_backend.precision import policy_of
    from jaxllm.jax_backend.sharding import Layout
    from jaxllm.jax_backend.step import DeviceBatch, loss_sum
    from jaxllm.metrics.flops import flops_per_token

    layers = {"n_layer": 1} if keys.get("family") == "gpt2" else {"num_hidden_layers": 1}
    written = {"family": "llama", "vocab_size": 32000, **keys, **layers}
    model = resolve_model(ModelConfig.model_validate(written))
    runtime = Runtime(policy_of("bf16"), Layout(single_device_mesh()), "none", xla_attention)
    network = build_network(model.spec, runtime)
    params = {path: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16) for path, leaf in network.shapes.items()}
    shape = (1, sequence)
    dtypes = (jnp.int32, jnp.int32, jnp.float32, jnp.int32, jnp.int32)
    batch = DeviceBatch(*(jax.ShapeDtypeStruct(shape, dtype) for dtype in dtypes))  # type: ignore[arg-type]

    def forward(params: Any, batch: Any) -> Any:
        return loss_sum(network, params, batch, None)

    flops = flops_per_token(model.spec, sequence)
    program = sequence * (flops.forward + flops.attention)
    lines = []
    for what, function, expected in (("forward", forward, program), ("both", jax.value_and_grad(forward), 3 * program)):
        measured = jax.jit(function).lower(params, batch).cost_analysis()["flops"]
        error = round(expected / measured - 1, 4)
        lines.append({"name": f"{name}, {what}", "predicted": expected, "measured": measured, "error": error})
    return lines
