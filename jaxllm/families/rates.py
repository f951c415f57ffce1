"""Learning rates of single weights: frozen layers, and rates that fall from the head to the embeddings.

Layer-wise decay as in ELECTRA (arXiv:2003.10555): with L layers the head has the full rate, layer l (from 0) decay^(L - l) of
it and the embeddings decay^(L + 1).  An encoder's layers are counted below those of its decoder; biases of distances, which
every layer of a stack reads, go with its lowest.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

import numpy as np
from numpy.typing import NDArray

from jaxllm.config.schema import OptimizerConfig
from jaxllm.errors import ConfigError
from jaxllm.families.spec import Model, ModelSpec
from jaxllm.families.weights import WeightRule, flatten, flax_leaves

_EMBEDDINGS = ("embed", "position_embed", "token_type_embed", "embedding_norm")
_RELATIVE = "relative_bias"


def rate_scales(model: Model, optimizer: OptimizerConfig) -> dict[str, float]:
    """What each weight's learning rate is multiplied by, by Hugging Face name; 0 for frozen ones.  Empty: 1 for all.

    ConfigError when a pattern of `optimizer.frozen` names no weight, or every weight is frozen.
    """
    if not optimizer.frozen and optimizer.layer_decay == 1.0:
        return {}
    weights = {name: (rule, layer) for name, rule, layer in flatten(model.rules)}
    for pattern in optimizer.frozen:
        if not any(fnmatchcase(name, pattern) for name in weights):
            raise ConfigError(
                "optimizer.frozen", f"{pattern!r} matches no weight of the model (its first is {next(iter(weights))})"
            )
    scales = {name: optimizer.layer_decay ** _above(rule, layer, model.spec) for name, (rule, layer) in weights.items()}
    for name in scales:
        if any(fnmatchcase(name, pattern) for pattern in optimizer.frozen):
            scales[name] = 0.0
    if not any(scales.values()):
        raise ConfigError("optimizer.frozen", "freezes every weight of the model; leave some to train")
    return scales


def leaf_scales(model: Model, scales: Mapping[str, float]) -> dict[str, NDArray[np.float64]]:
    """The same by Flax path, as arrays that broadcast over a parameter: (layers, 1, ...) where layers are stacked."""
    if not scales:
        return {}
    found = {}
    for leaf in flax_leaves(model.rules):
        values = np.array([scales[name] for name in leaf.rule.names])
        found[leaf.path] = values.reshape(-1, *[1] * (len(leaf.shape) - 1)) if leaf.rule.layers is not None else values[0]
    return found


def _above(rule: WeightRule, layer: int | None, model: ModelSpec) -> int:
    """How many steps a weight is below the head."""
    decoder, encoder = model.layers, 0 if model.encoder is None else len(model.encoder.attentions)
    first, *inside = rule.paths[0].split(".")
    if first == "encoder":
        if layer is None:
            return decoder + (encoder if inside[0] == _RELATIVE else 1)
        return decoder + encoder - layer
    if layer is not None or first == _RELATIVE:
        return decoder - (layer or 0)
    return decoder + encoder + 1 if first in _EMBEDDINGS else 0
