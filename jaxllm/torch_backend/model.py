"""The Hugging Face model of a run, and a batch as it wants to see it.

Shape legend: B sequences, S tokens, R tokens of a source, T targets; in masks Q = K = S.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import Parameter

from jaxllm.data.batch import Batch
from jaxllm.errors import BackendError
from jaxllm.families import Model, ModelSpec, flatten
from jaxllm.families.spec import HeadKind
from jaxllm.torch_backend.documents import Documents
from jaxllm.torch_backend.routing import attach_routing
from jaxllm.torch_backend.visibility import SequenceHook, attention_implementation

AttentionKernel = Literal["auto", "sdpa", "eager"]

_CLASSES: Mapping[HeadKind, str] = {
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "seq2seq": "AutoModelForSeq2SeqLM",
}


def build_model(model: Model, attention: AttentionKernel, dtype: torch.dtype, device: torch.device) -> Any:
    """The transformers model that `model` describes, its weights not yet filled (whoever calls fills every one of them).

    Returns a transformers.PreTrainedModel.  BackendError when its parameters are not those of the family's weight table.
    """
    import transformers
    from transformers.initialization import no_init_weights

    keys = dict(model.huggingface_config)
    config = transformers.AutoConfig.for_model(str(keys.pop("model_type")), **keys)
    config.use_cache = False
    config.tie_word_embeddings = model.spec.tie_embeddings  # T5's config says true of models that are not tied, too
    if model.spec.mlp.experts is not None:
        config.output_router_logits = False  # `Routing` takes the loss, of packed batches too
    auto = getattr(transformers, _CLASSES[model.spec.head.kind])
    kernel = attention_implementation(model, attention)
    with no_init_weights(), device:
        built = auto.from_config(config, attn_implementation=kernel, dtype=dtype, **_experts(model, dtype))
        built.tie_weights()  # part of the initialisation that was left out
        if model.spec.encoder is not None:
            built.set_input_embeddings(built.get_input_embeddings())  # of both stacks, also where the head has its own
    built.register_forward_pre_hook(SequenceHook(model), with_kwargs=True)
    attach_routing(model, built)
    check_parameters(model, {name: tuple(_whole_shape(p)) for name, p in built.named_parameters()})
    return built


def import_model(model: Model) -> None:
    """Load the modelling code of the family, so that its memory does not count as the model's."""
    import transformers

    keys = dict(model.huggingface_config)
    config = transformers.AutoConfig.for_model(str(keys.pop("model_type")), **keys)
    getattr(transformers, _CLASSES[model.spec.head.kind])._model_mapping[type(config)]  # noqa: SLF001 - imports the class


def _experts(model: Model, dtype: torch.dtype) -> dict[str, str]:
    """How experts are computed: one after another, but in bf16 with transformers' grouped products."""
    return {} if model.spec.mlp.experts is None or dtype == torch.bfloat16 else {"experts_implementation": "eager"}


def _whole_shape(parameter: Parameter) -> torch.Size:
    """Shape of a parameter, also where DeepSpeed has already cut it into partitions."""
    return getattr(parameter, "ds_shape", parameter.shape)


def check_parameters(model: Model, found: dict[str, tuple[int, ...]]) -> None:
    """BackendError unless transformers has exactly the parameters, by name and shape, that the weight table says."""
    expected = {name: rule.shape for name, rule, _ in flatten(model.rules)}
    wrong = [f"{name} is missing" for name in expected.keys() - found.keys()]
    wrong += [f"{name} is not in the table" for name in found.keys() - expected.keys()]
    wrong += [
        f"{name} has shape {list(found[name])} instead of {list(expected[name])}"
        for name in expected.keys() & found.keys()
        if found[name] != expected[name]
    ]
    if wrong:
        raise BackendError(
            f"the transformers model of family {model.family} differs from the weight table ({'; '.join(sorted(wrong))}); "
            "install the versions in constraints.txt"
        )


@dataclass(frozen=True)
class ModelInputs:
    """What the model and the loss read, on the device.

    arguments: what the model is called with, under the names that transformers has for it.  targets_BT: int64 labels, or
    numbers; weights_BT: float32, or float64 in an fp64 run, as are targets that are numbers.  real_BS (bool): tokens that are
    not padding.  Under sequence parallelism S are this process's tokens, while masks (B, 1, Q, K) are of whole sequences.
    """

    arguments: Mapping[str, Any]
    targets: torch.Tensor
    weights: torch.Tensor
    real: torch.Tensor


def model_inputs(
    batch: Batch,
    spec: ModelSpec,
    attention: AttentionKernel,
    dtype: torch.dtype,
    device: torch.device,
    columns: slice | None = None,
    *,
    documents: Documents | None = None,
) -> ModelInputs:
    """A (micro-)batch on the device.

    dtype: of the activations.  columns: the tokens of this process; default, all.  documents: where they lie in `batch`, of
    which the model is told instead of a mask.
    """
    mine = slice(None) if columns is None else columns

    def number(array: NDArray[Any]) -> torch.Tensor:
        real = np.float64 if dtype == torch.float64 else np.float32
        return torch.from_numpy(array.astype(real, copy=False)).to(device)

    def whole(array: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(array).to(device, torch.int64)

    segments = torch.from_numpy(batch.segments).to(device)
    mask = documents or packed_mask(segments, attention, dtype, causal=spec.attention.causal)
    filled = batch.inputs
    if spec.head.padding is not None:  # transformers looks for the last token that is none
        filled = np.where(batch.segments > 0, filled, np.int32(spec.head.padding))
    tokens, positions = whole(filled[:, mine]), whole(batch.positions[:, mine]) + spec.position_offset
    arguments: dict[str, Any] = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
    if spec.encoder is not None:
        arguments = {"decoder_input_ids": tokens, "decoder_attention_mask": mask, **_source(batch, attention, dtype, device)}
    if spec.token_types:
        types = np.zeros_like(batch.inputs) if batch.token_types is None else batch.token_types
        arguments["token_type_ids"] = whole(types)
    if spec.attention.causal:
        arguments["use_cache"] = False
    targets, weights = batch.targets, batch.weights
    if targets.shape[1] == batch.sequence_length:
        targets, weights = targets[:, mine], weights[:, mine]
    is_label = spec.head.loss == "cross-entropy"
    return ModelInputs(arguments, (whole if is_label else number)(targets), number(weights), segments[:, mine] > 0)


def _source(batch: Batch, attention: AttentionKernel, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    if batch.source is None or batch.source_segments is None:
        raise BackendError("an encoder-decoder needs a source; train it with the objective seq2seq or span-corruption")
    return source_inputs(batch.source, batch.source_segments, attention, dtype, device)


def source_inputs(
    source_BR: NDArray[np.int32],
    segments_BR: NDArray[np.int32],
    attention: AttentionKernel,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """What an encoder is called with.  Its mask (B, 1, 1, R) is that of cross attention, too.

    Of a row that is all padding everything is seen, so that it yields no NaN.
    """
    is_text_BR = torch.from_numpy(segments_BR > 0).to(device)
    seen_BR = is_text_BR | ~is_text_BR.any(dim=1, keepdim=True)
    source = torch.from_numpy(source_BR).to(device, torch.int64)
    return {"input_ids": source, "attention_mask": _mask(seen_BR[:, None, None], attention, dtype)}


def packed_mask(
    segments_BS: torch.Tensor, attention: AttentionKernel, dtype: torch.dtype, *, causal: bool = True
) -> torch.Tensor:
    """Attention within a segment: (B, 1, Q, K), bool, or for eager 0 or the lowest number, to be added.

    Padding is a segment (0) like any other, so that a padding row attends to something and yields no NaN.
    """
    same_BQK = segments_BS[:, :, None] == segments_BS[:, None, :]
    return _mask((same_BQK.tril() if causal else same_BQK)[:, None], attention, dtype)


def _mask(allowed_B1QK: torch.Tensor, attention: AttentionKernel, dtype: torch.dtype) -> torch.Tensor:
    if attention != "eager":
        return allowed_B1QK
    lowest = torch.finfo(dtype).min
    return torch.zeros(allowed_B1QK.shape, dtype=dtype, device=allowed_B1QK.device).masked_fill(~allowed_B1QK, lowest)


@contextmanager
def mode(module: torch.nn.Module, training: bool) -> Iterator[None]:
    """Dropout and activation checkpointing on or off within; as before afterwards."""
    before = module.training
    module.train(training)
    try:
        yield
    finally:
        module.train(before)
