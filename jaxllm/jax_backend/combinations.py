"""What a mesh cannot do with a model, as far as it is known without devices and without JAX.

Whether parameters can be cut is checked where they are laid out, in `sharding.parameter_shardings`.
"""

from __future__ import annotations

from jaxllm.config.schema import AttentionName, RunConfig
from jaxllm.errors import ConfigError
from jaxllm.families import Model
from jaxllm.families.spec import AttentionSpec
from jaxllm.jax_backend.zigzag import zigzag


def check_combinations(config: RunConfig, model: Model) -> None:
    """ConfigError, naming key and size, when `parallel` asks for what the model or its rows cannot give."""
    parallel = config.parallel
    if parallel.expert > 1 and model.spec.mlp.experts is None:
        raise ConfigError("parallel.expert", f"{parallel.expert} is not possible, the model has no experts; set it to 1")
    if parallel.context > 1:
        if model.spec.head.kind != "causal-lm":
            raise ConfigError(
                "parallel.context", f"only causal-lm cuts sequences over devices, not {config.objective.kind}; set it to 1"
            )
        check_ring(model.spec.attention, config.jax.attention, parallel.context)
        zigzag(config.data.sequence_length, parallel.context)


def check_ring(spec: AttentionSpec, wanted: AttentionName, shards: int) -> None:
    """ConfigError when attention cannot be split over `shards` devices.  wanted: `jax.attention` of the run file."""
    if wanted not in ("auto", "xla", "splash"):
        raise ConfigError("jax.attention", f"{wanted} cannot split a sequence over parallel.context = {shards}; use auto")
    if spec.dropout > 0.0:
        raise ConfigError(
            "parallel.context",
            f"{shards} cannot be combined with dropout of attention weights (attention dropout = {spec.dropout}), which ring "
            "attention does not have; set the model's attention dropout to 0, or parallel.context to 1",
        )
