"""What the layers of a JAX model keep for their backward pass, and what one of them works on.

What is kept was read from the jaxpr: the outputs of the scans over layers.  Letters: S keys of a row, E hidden, H heads,
Q heads x head_dim, K key/value heads x head_dim, M MLP size, X experts, k of them for each token, b bytes of the compute dtype.
For each token and layer:

| remat | norms, each | attention, each | MLP |
|---|---|---|---|
| none | RMS 2bE + 4E; LayerNorm bE + 8E | 2bQ + 2bK + 8H + (4 + b) H S; splash, cudnn: 3bQ + 2bK + 4H | gated 6bM; plain 6bM (gelu_tanh), 4bM (gelu), (b + 1) M (relu); experts k (2bE + 6bM) + 12X |
| dots | | bE + bQ + 2bK | gated 2bM, plain bM; experts: their router's bX |
| full | bE for the whole layer | | |
| names, offload | the points that are named | | |

Queries and keys that are normalised keep (4 + b) of their size besides.  Of attention to a source, keys and values are of the
source's tokens.  The axes divide them: `context` tokens, `tensor` H, Q, K, M, V and, along the sequence, what has E.  Where
`expert` spreads experts over devices, each computes its own for the tokens of all of them.
"""  # noqa: E501 - a table

from __future__ import annotations

from jaxllm.config.remat import REMAT_POINTS, kept_points
from jaxllm.families.spec import AttentionSpec, ModelSpec
from jaxllm.planning.setting import Setting
from jaxllm.planning.stacks import Stack, stacks_of


def norms(spec: ModelSpec, stack: Stack) -> int:
    """Norms in a layer: before attention and MLP, after them, or both; one more where it attends to a source."""
    return (4 if spec.norm.place == "sandwich" else 2) + (stack.source is not None)


def saved_bytes(spec: ModelSpec, setting: Setting) -> tuple[float, float]:
    """Bytes that all layers keep for their backward pass: on the device, and in the host's memory.

    Of what is in the host's memory, the layer that goes backward has its own on the device, and the next one's is on its way.
    """
    device = host = fetched = 0.0
    for stack in stacks_of(spec, setting):
        on_device, on_host = _kept(spec, setting, stack)
        device += stack.layers * on_device
        host += stack.layers * on_host
        fetched = max(fetched, 2.0 * on_host)
    return device + fetched, host


def working_bytes(spec: ModelSpec, setting: Setting, *, scores: int, cpu: bool = False) -> float:
    """Bytes that one layer's backward pass works on: what it recomputes, and gradients of that.

    scores: arrays of all scores in float32 that are alive together where attention is written out.  cpu: as XLA:CPU does it.
    That computes products of experts for every token and expert, with zeros where a token goes elsewhere, and leaves open
    which of two operations runs first, so that attention and MLP, or what one recomputes and the other needs, share no memory.
    """
    return max(_working(spec, setting, stack, scores, cpu=cpu) for stack in stacks_of(spec, setting))


def _kept(spec: ModelSpec, setting: Setting, stack: Stack) -> tuple[float, float]:
    width, hidden = setting.compute_bytes, spec.hidden_size / setting.parallel.tensor  # split over the sequence there
    if setting.remat == "full":
        return stack.tokens * width * hidden, 0.0
    if setting.remat == "dots":
        return _products(spec, setting, stack), 0.0
    kept = kept_points(setting.remat) if setting.remat != "none" else None
    if kept is not None:
        sizes = _point_sizes(spec, setting, stack)
        device = {*kept.device} | ({"layer_input"} - {*kept.host})
        return width * sum(sizes[name] for name in device), width * sum(sizes[name] for name in kept.host)
    return _everything(spec, setting, stack), 0.0


def _everything(spec: ModelSpec, setting: Setting, stack: Stack) -> float:
    """Of one layer, without rematerialisation."""
    width, hidden = setting.compute_bytes, spec.hidden_size / setting.parallel.tensor
    wide = max(width, 4)
    norm = (2 * width + wide) * hidden if spec.norm.kind == "rms" else (width + 2 * wide) * hidden
    kept = norms(spec, stack) * norm + _mlp(spec, setting)
    return stack.tokens * kept + sum(
        _attention(attention, setting, stack.tokens, keys, length)
        for attention, keys, length in _attentions(spec, setting, stack)
    )


def _attentions(spec: ModelSpec, setting: Setting, stack: Stack) -> list[tuple[AttentionSpec, float, int]]:
    """A layer's own, and to a source: with the tokens that keys are made of, and the keys of a row."""
    found = [(stack.attention, stack.tokens, stack.length)]
    if stack.source is not None and spec.encoder is not None:
        found.append((spec.encoder.cross, float(setting.source_tokens), stack.source))
    return found


def _sizes(attention: AttentionSpec, setting: Setting) -> tuple[float, float, float]:
    """H, Q and K of one device."""
    heads, keys = attention.heads / setting.parallel.tensor, attention.kv_heads / setting.parallel.tensor
    return heads, heads * attention.head_dim, keys * attention.head_dim


def _attention(attention: AttentionSpec, setting: Setting, tokens: float, key_tokens: float, keys: int) -> float:
    width = setting.compute_bytes
    wide, (heads, query, key) = max(width, 4), _sizes(attention, setting)
    kept = tokens * 2 * width * query + key_tokens * 2 * width * key
    if setting.attention == "xla":
        kept += tokens * (2 * wide * heads + (wide + width) * heads * keys)
    else:
        kept += tokens * (width * query + wide * heads)
    if attention.query_key_norm:
        kept += (wide + width) * (tokens * query + key_tokens * key)
    if attention.dropout:
        kept += tokens * heads * keys * (1 + width)  # what was dropped, and the weights before that
    return kept


def _mlp(spec: ModelSpec, setting: Setting) -> float:
    """For each token."""
    width, inner = setting.compute_bytes, spec.mlp.size / setting.parallel.tensor
    if spec.mlp.experts is not None:
        rows = spec.mlp.experts.per_token * setting.parallel.expert
        return rows * width * (2 * spec.hidden_size + 6 * inner) + 12.0 * spec.mlp.experts.count
    if spec.mlp.gated:
        return (4 + width if spec.mlp.activation == "relu" else 6 * width) * inner
    return {"relu": width + 1, "gelu": 4 * width, "tanh": 2 * width}.get(spec.mlp.activation, 6 * width) * inner


def _products(spec: ModelSpec, setting: Setting, stack: Stack) -> float:
    """What `dots` keeps of a layer: its input and the products that the backward pass needs."""
    width, hidden = setting.compute_bytes, spec.hidden_size / setting.parallel.tensor
    kept = stack.tokens * width * hidden
    for attention, key_tokens, _ in _attentions(spec, setting, stack):
        _, query, key = _sizes(attention, setting)
        kept += width * (stack.tokens * (query + hidden) + key_tokens * 2 * key)
    if spec.mlp.experts is not None:
        return kept + stack.tokens * width * spec.mlp.experts.count
    inner = (2 if spec.mlp.gated else 1) * spec.mlp.size / setting.parallel.tensor
    last = hidden if spec.norm.after or spec.norm.of_residual else 0.0
    return kept + stack.tokens * width * (inner + last)


def _point_sizes(spec: ModelSpec, setting: Setting, stack: Stack) -> dict[str, float]:
    """Elements of each point of a layer (`jaxllm.config.remat.REMAT_POINTS`) on a device."""
    tokens, hidden = stack.tokens, spec.hidden_size / setting.parallel.tensor
    _, query, key = _sizes(stack.attention, setting)
    inner = 0.0 if spec.mlp.experts is not None else tokens * spec.mlp.size / setting.parallel.tensor
    sizes = dict.fromkeys(REMAT_POINTS, tokens * hidden)
    sizes |= {"query": tokens * query, "key": tokens * key, "value": tokens * key, "attention_mixed": tokens * query}
    sizes |= {"mlp_gate": inner if spec.mlp.gated else 0.0, "mlp_up": inner, "mlp_inner": inner}
    if stack.source is None or spec.encoder is None:
        return {name: 0.0 if name.startswith("cross_") else size for name, size in sizes.items()}
    _, query, key = _sizes(spec.encoder.cross, setting)
    return {**sizes, "cross_query": tokens * query, **dict.fromkeys(("cross_key", "cross_value"), setting.source_tokens * key)}


def _working(spec: ModelSpec, setting: Setting, stack: Stack, scores: int, *, cpu: bool) -> float:
    width, inner = setting.compute_bytes, spec.mlp.size / setting.parallel.tensor
    if spec.mlp.experts is not None:
        rows = spec.mlp.experts.per_token * setting.parallel.expert
        mlp = rows * width * (3 * inner + 3 * spec.hidden_size)
        if cpu:
            local = spec.mlp.experts.count / setting.parallel.expert
            mlp += rows * width * local * 4 * inner
    else:
        mlp = (3 if spec.mlp.gated else 2) * width * inner
    attention, biases = 0.0, 0.0
    for each, _, keys in _attentions(spec, setting, stack):
        heads, query, _ = _sizes(each, setting)
        written = scores * 4.0 * heads * keys if setting.attention == "xla" else 0.0
        attention = max(attention, 6 * width * query + written)
        biases = max(biases, 2 * 4.0 * heads * stack.length * keys if each.relative else 0.0)
    # The gradient of a norm behind the MLP needs the MLP's result, before anything of attention can be let go.
    is_behind = spec.norm.of_residual and setting.remat == "full"
    whole = attention + 2.5 * mlp if is_behind else attention + mlp if cpu else max(mlp, attention)
    return stack.tokens * (whole + 4 * width * spec.hidden_size) + biases
