"""DeepSpeed's bucket of gradients: a buffer that it makes as large as its config says, whatever the model's size.

At ZeRO stages 1 and 2 it makes one in every backward pass, at stage 3 one for the whole run.  Nothing here imports torch.
"""

from __future__ import annotations

from jaxllm.families import Model, WeightRule

LARGEST_BUCKET = {"cuda": 200_000_000, "cpu": 25_000_000}
"""Elements that are reduced at a time, by device: enough for the links' full rate, and a bounded buffer for large models.

With gloo, which links CPUs, up to two further copies of a bucket lie beside it in the host's memory.
"""


def bucket_elements(model: Model, tensor: int, device: str) -> int:
    """Elements of the bucket: a model that has fewer never fills a larger one.

    tensor: processes of an AutoTP group.  device: torch's type of device, "cuda" or "cpu".
    """
    return min(LARGEST_BUCKET[device], process_elements(model, tensor))


def process_elements(model: Model, tensor: int) -> int:
    """Parameters of a process before ZeRO cuts them, of the one that has most; tied weights counted once."""
    return sum(_elements(model, rule, tensor) for rule in model.rules)


def _elements(model: Model, rule: WeightRule, tensor: int) -> int:
    axis = cut_axis(model, rule)
    if axis is None:
        return rule.parameters
    size = rule.sizes[axis]
    return rule.parameters // size * -(-size // tensor)


def cut_axis(model: Model, rule: WeightRule) -> str | None:
    """The axis along which AutoTP cuts a weight: the layers' projections and a language model's head of its own.

    Never embeddings or norms; attention whose norms are over all heads stays whole.
    """
    if rule.kind not in ("kernel", "bias"):
        return None
    heads = () if model.spec.attention.query_key_norm == "all_heads" else ("heads", "kv_heads")
    axes = {axis for leaf in rule.axes for axis in leaf}
    return next((axis for axis in (*heads, "mlp", "vocab") if axis in axes), None)
