"""Memory of one process under DeepSpeed: what PyTorch's allocator hands out for the Hugging Face model of a run.

Derived from what the code keeps alive, not fitted: every term below was found among the live allocations at the peak of a real
run (`python -m benchmarks.planner --only deepspeed` measures with torch's own accounting of allocations).  Letters: P
parameters, n processes that share optimiser state, b bytes of the compute dtype, R DeepSpeed's bucket of gradients.  What
layers keep for the backward pass is in `jaxllm.planning.torch_activations`.

What stays between the steps (bytes; p and m, v in float32):

    stage 0            4P + 8P, and 2P for the model that computes in bf16
    stage 1, 2         bP + 4P/n + 8P/n; stage 1 in bf16 also the whole gradient in float32, 4P
    stage 3            bP/n + 4P/n + 8P/n + the gradient's part 4P/n + 4R
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxllm.families import Model
from jaxllm.families.spec import ModelSpec
from jaxllm.planning.memory import Memory, Moment, moment
from jaxllm.planning.setting import Setting, axes_of
from jaxllm.planning.torch_activations import activation_bytes, norm_bytes, working_bytes
from jaxllm.torch_backend.bucket import bucket_elements, process_elements
from jaxllm.torch_backend.documents import goes_by_documents

FLAT_REDUCTION = 500_000_000
"""Elements that DeepSpeed reduces at a time at stage 0 and, in bf16, 1 (its `elements_per_buffer`)."""

LIVE_PARAMETERS = 1_000_000_000
"""Elements of `stage3_max_live_parameters`: gathered weights that stage 3 keeps."""

PREFETCH = 50_000_000
"""Elements of `stage3_prefetch_bucket_size`: weights that stage 3 fetches together, ahead of their use."""

SUB_GROUP = 1_000_000_000
"""Elements of `sub_group_size`: stage 3 updates that many at a time."""


@dataclass(frozen=True)
class _Sizes:
    """Bytes of what the moments are made of.

    reduced: elements (not bytes) of gradients that DeepSpeed adds up at a time.  fetched: of weights as stage 3 receives them,
    before each has a place of its own.  chunked: what a loss in chunks makes beside logits.  head, first: gradients of the
    output head, and of the embeddings with the first layer.
    """

    parameters: float
    model: float
    masters: float
    moments: float
    gradients: float
    activations: float
    working: float
    reduced: float
    bucket: float
    fetched: float
    logits: float
    chunked: float
    head: float
    first: float


def deepspeed_memory(model: Model, setting: Setting, *, cuda: bool = True) -> Memory:
    """Memory of one process, at the moments of a step that can be the fullest.

    cuda: on a GPU torch's AdamW works on all tensors at once and holds the roots of all second moments for it, and DeepSpeed's
    bucket is larger.
    """
    sizes = _sizes(model, setting, "cuda" if cuda else "cpu")
    stage = setting.zero_stage
    bucket = sizes.bucket
    kept = _kept_between_steps(sizes, setting)
    carried = _carried_gradients(sizes, setting)
    host = 0.0
    if setting.offload_optimizer != "none":
        host = sizes.masters + sizes.moments + sizes.parameters * 4 / _shards(setting)
    # A process that is alone holds the whole weights already.
    gathered = min(sizes.model, LIVE_PARAMETERS * setting.compute_bytes) if stage == 3 and _shards(setting) > 1 else 0.0
    whole = {"parameters": kept[0], "moments": kept[1]}
    forward = {**whole, "weights_in_use": gathered, "activations": sizes.activations}
    early = bucket if stage == 3 else 0.0
    moments = [
        moment("the loss", **forward, gradients=kept[2] + carried, logits=sizes.logits, buffers=early, working=sizes.chunked),
        moment("the end of the forward pass", **forward, gradients=kept[2] + carried, buffers=early + sizes.fetched),
        moment(
            "the first layer that goes backward",
            **forward,
            gradients=kept[2] + carried + sizes.head,
            buffers=bucket,
            working=sizes.working,
        ),
        _reduction(sizes, setting, whole, kept[2], carried, gathered, cuda=cuda),
        _update(sizes, setting, whole, kept[2], cuda=cuda),
    ]
    if stage == 0:
        late = sizes.gradients - sizes.first
        first = setting.tokens * model.spec.hidden_size * setting.compute_bytes
        moments.append(
            moment("the last layer that goes backward", **whole, gradients=late, activations=first, working=sizes.working)
        )
    return Memory(moments, host)


def _logits_bytes(spec: ModelSpec, setting: Setting) -> float:
    """The log-softmax, its gradient and the loss's, in float32; the logits themselves have gone by then.

    A chunk's exponentials and gradient are written over its logits, and copied in bf16 for the products.
    """
    chunk = setting.chunk(spec)
    in_chunk = 1.0 if setting.compute_bytes == 4 else 1.5
    copies, rows = (3.0, setting.tokens) if chunk is None else (in_chunk, chunk)
    if spec.head.kind == "sequence-classification":
        rows = setting.micro_batch
    return copies * 4.0 * rows * spec.outputs


def _chunked_bytes(spec: ModelSpec, setting: Setting) -> float:
    """The gradients of the hidden states and, over all chunks in float32, of the head, with a chunk's part in bf16."""
    width = setting.compute_bytes
    head = (4.0 if width == 4 else 4.0 + width) * spec.vocab_size * spec.hidden_size
    return head + width * setting.tokens * spec.hidden_size


def _shards(setting: Setting) -> int:
    """Processes that share optimiser state."""
    return setting.groups * setting.parallel.context


def _sizes(model: Model, setting: Setting, device: str) -> _Sizes:
    spec, tokens, tensor = model.spec, float(setting.tokens), setting.parallel.tensor
    parameters = float(process_elements(model, tensor))
    shards = _shards(setting) if setting.zero_stage else 1
    reduced = float(bucket_elements(model, tensor, device))
    last = tokens * (norm_bytes(spec, setting) + 8.0 * 3)  # and tokens, positions and targets
    return _Sizes(
        parameters=parameters,
        model=parameters * setting.compute_bytes,
        masters=4.0 * parameters / shards,
        moments=8.0 * parameters / shards,
        gradients=4.0 * parameters,
        activations=activation_bytes(model, setting) + last + _mask_bytes(spec, setting),
        working=working_bytes(model, setting),
        reduced=reduced,
        bucket=_bucket_bytes(setting) * reduced,
        fetched=_fetched_bytes(parameters, setting),
        logits=_logits_bytes(spec, setting),
        chunked=0.0 if setting.chunk(spec) is None else _chunked_bytes(spec, setting),
        head=0.0 if spec.tie_embeddings else 4.0 * spec.outputs * spec.hidden_size,
        first=4.0
        * sum(rule.parameters / (rule.layers or 1) for rule in model.rules if rule.layers or "vocab" in axes_of(rule)),
    )


def _fetched_bytes(parameters: float, setting: Setting) -> float:
    """What processes send each other of a group of weights lies together until the last of them is used."""
    if setting.zero_stage < 3 or _shards(setting) == 1:
        return 0.0
    return setting.compute_bytes * min(parameters, PREFETCH)


def _bucket_bytes(setting: Setting) -> float:
    """Bytes of an element of DeepSpeed's gradient bucket; 0 where there is none."""
    if setting.zero_stage == 0 or (setting.zero_stage == 1 and setting.precision == "bf16"):
        return 0.0
    return 4.0 if setting.zero_stage == 3 else setting.compute_bytes


def _mask_bytes(spec: ModelSpec, setting: Setting) -> float:
    """The masks of all layers: of the rows of a micro-batch, queries x keys."""
    if goes_by_documents(spec, setting.attention, setting.target or setting.sequence):
        return 0.0
    each = 1 if setting.attention == "sdpa" else setting.compute_bytes
    return float(setting.micro_batch * each * (setting.target or setting.sequence) ** 2)


def _kept_between_steps(sizes: _Sizes, setting: Setting) -> tuple[float, float, float]:
    """Bytes of weights and masters, of moments, and of gradients that are there all the time."""
    stage, bf16 = setting.zero_stage, setting.precision == "bf16"
    masters = 0.0 if setting.offload_optimizer != "none" else sizes.masters
    moments = 0.0 if setting.offload_optimizer != "none" else sizes.moments
    if stage == 0:
        return masters + (sizes.model if bf16 else 0.0), moments, 0.0
    if stage < 3:
        return sizes.model + masters, moments, sizes.gradients if stage == 1 and bf16 else 0.0
    part = sizes.gradients / _shards(setting)
    model = 0.0 if setting.offload_param else sizes.model / _shards(setting)
    return model + masters, moments, 0.0 if setting.offload_optimizer != "none" else part


def _carried_gradients(sizes: _Sizes, setting: Setting) -> float:
    """Bytes of gradients that earlier micro-batches of a step have left."""
    stage = setting.zero_stage
    if setting.accumulation == 1 or stage == 3 or (stage == 1 and setting.precision == "bf16"):
        return 0.0
    return sizes.gradients if stage < 2 else sizes.gradients / _shards(setting)


def _reduction(
    sizes: _Sizes,
    setting: Setting,
    whole: dict[str, float],
    gradients: float,
    carried: float,
    gathered: float,
    *,
    cuda: bool,
) -> Moment:
    """The end of the last backward pass: all gradients are there and are added up over the processes."""
    stage, bf16 = setting.zero_stage, setting.precision == "bf16"
    at_once = 4.0 * (sizes.reduced if sizes.bucket else min(sizes.parameters, FLAT_REDUCTION))
    part = sizes.gradients / _shards(setting)
    if stage == 0:
        gradients, buffers = sizes.gradients, at_once if _shards(setting) > 1 else 0.0
    elif stage == 1 and bf16:
        gradients, buffers = gradients + sizes.model, at_once
    elif stage == 3:
        # The bucket's gradients in the order of processes; gloo, not NCCL, makes a copy of them.  A model of less than a bucket
        # has let go of its weights by then.
        buffers = sizes.bucket + (at_once if cuda else 2 * at_once)
        gathered = gathered if sizes.parameters > sizes.reduced else 0.0
    else:
        # In bf16 the bucket's gradients are there three times: as autograd made them, in float32, and this process's part.
        more = part + setting.compute_bytes * sizes.reduced if bf16 else carried
        gradients, buffers = gradients + more, sizes.bucket + at_once
    named = f"adding gradients up over {setting.groups} processes" if setting.groups > 1 else "the end of the backward pass"
    return moment(named, **whole, gradients=gradients, weights_in_use=gathered, buffers=buffers)


def _update(sizes: _Sizes, setting: Setting, whole: dict[str, float], gradients: float, *, cuda: bool) -> Moment:
    """The optimiser's step: from stage 1 on the gradient's part, flat, beside the pieces it is made from."""
    buffers = sizes.bucket if setting.zero_stage == 3 else 0.0
    if setting.offload_optimizer != "none":
        return moment("the update", **whole, gradients=gradients, buffers=buffers)
    part = sizes.gradients / _shards(setting) if setting.zero_stage else sizes.gradients
    pieces = part if setting.zero_stage else 0.0
    roots = min(sizes.moments / 2, 4.0 * SUB_GROUP if setting.zero_stage == 3 else math.inf) if cuda else 0.0
    return moment("the update", **whole, gradients=max(gradients, part) + pieces, buffers=buffers, working=roots)
