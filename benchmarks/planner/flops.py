"""FLOPs that the planner counts against XLA's `cost_analysis` of the forward and the backward pass, before optimisation.

XLA counts the body of a loop once, whatever its trips, so the models have one layer; that the count grows with the layers is
the formula's own arithmetic.  The XLA attention kernel computes the full square of scores, of which model FLOPs count half
where there is a causal mask.  On a CPU XLA multiplies every row with every expert, of which model FLOPs count those that it
takes.
"""

from __future__ import annotations

from typing import Any

from benchmarks.planner.models import BERT, GPT2_XL, LLAMA_1B, LLAMA_8B, MIXTRAL_8X7B, T5_BASE

# Model, tokens of a row, tokens of its target, and objective; all with one layer.
MODELS: dict[str, tuple[dict[str, Any], int, int | None, dict[str, Any]]] = {
    "llama 1B": (LLAMA_1B, 2048, None, {"kind": "causal-lm"}),
    "llama 8B": (LLAMA_8B, 1024, None, {"kind": "causal-lm"}),
    "gpt2 xl": (GPT2_XL, 1024, None, {"kind": "causal-lm"}),
    "mixtral 8x7b": (MIXTRAL_8X7B, 1024, None, {"kind": "causal-lm"}),
    "bert, masked-lm": (BERT, 512, None, {"kind": "masked-lm"}),
    "bert, labels of words": (BERT, 512, None, {"kind": "token-classification", "num_labels": 9}),
    "t5 base": (T5_BASE, 512, 256, {"kind": "seq2seq"}),
}
_LAYERS = {"gpt2": "n_layer", "t5": "num_layers"}


def compare_flops() -> list[dict[str, Any]]:
    """One line for each model and pass."""
    return [line for name in MODELS for line in compare_one(name)]


def compare_one(name: str) -> list[dict[str, Any]]:
    """Forward alone, and forward and backward together, of one layer (of each stack), the embedding and the head."""
    import jax
    import jax.numpy as jnp

    from jaxllm.config import RunConfig
    from jaxllm.families import resolve_model, task_of
    from jaxllm.jax_backend.abstract import abstract_batch
    from jaxllm.jax_backend.attention.xla import xla_attention
    from jaxllm.jax_backend.mesh import single_device_mesh
    from jaxllm.jax_backend.model.runtime import Runtime
    from jaxllm.jax_backend.network import build_network
    from jaxllm.jax_backend.precision import policy_of
    from jaxllm.jax_backend.sharding import Layout
    from jaxllm.jax_backend.step import loss_sum
    from jaxllm.metrics.flops import flops_per_token
    from jaxllm.planning.tpu.expected import Rows, expected_matmul_flops
    from jaxllm.run import Run

    keys, length, target, objective = MODELS[name]
    config = RunConfig.model_validate(
        {
            "name": "flops",
            "model": {**keys, _LAYERS.get(keys["family"], "num_hidden_layers"): 1},
            "objective": objective,
            "data": {
                "tokenizer": {"train": "bpe", "vocab_size": keys["vocab_size"]},
                "sequence_length": length,
                "target_length": target,
            },
            "training": {"steps": 1, "global_batch": 1, "precision": "bf16"},
            "optimizer": {"learning_rate": 1e-3},
        }
    )
    model = resolve_model(config.model, task=task_of(config.objective))
    mesh = single_device_mesh()
    network = build_network(model.spec, Runtime(policy_of("bf16"), Layout(mesh), "none", xla_attention))
    params = {path: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16) for path, leaf in network.shapes.items()}
    batch = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), abstract_batch(Run(config, model, 1), mesh)
    )

    def forward(params: Any, batch: Any) -> Any:
        return loss_sum(network, params, batch, None)

    rows = Rows(1, length, target)
    flops = flops_per_token(model.spec, length, target)
    squares = expected_matmul_flops(model.spec, rows, 1, "none", attention_in_kernel=False)
    kernel = expected_matmul_flops(model.spec, rows, 1, "none", attention_in_kernel=True)
    assert squares is not None and kernel is not None  # noqa: PT018 - nothing is kept by name
    # What the planner counts, with the scores that a mask hides.
    program = rows.tokens(model.spec) * (flops.forward - flops.attention) + (squares - kernel) / 3
    experts = model.spec.mlp.experts
    if experts is not None:
        chosen = flops.mlp - 2.0 * model.spec.hidden_size * experts.count  # without the router
        program += rows.tokens(model.spec) * chosen * (experts.count - 1)
    lines = []
    for what, function, expected in (("forward", forward, program), ("both", jax.value_and_grad(forward), 3 * program)):
        measured = jax.jit(function).lower(params, batch).cost_analysis()["flops"]
        error = round(expected / measured - 1, 4)
        lines.append({"name": f"{name}, {what}", "predicted": expected, "measured": measured, "error": error})
    return lines
