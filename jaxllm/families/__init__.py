"""Model families as data: Hugging Face config -> ModelSpec and the table of weight rules.

Adding a family: one file here that defines ARCHITECTURES (head -> transformers class), BASE_PREFIX, MAX_POSITIONS_KEY, POINTS,
Keys, spec and rules, one entry in FAMILIES, one run file, one line in the test tables.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from jaxllm.config.messages import nearest, one_sentence
from jaxllm.config.schema import ModelConfig, RunConfig
from jaxllm.errors import ConfigError
from jaxllm.families import (
    bert,
    gemma,
    gemma2,
    gemma3_text,
    gpt2,
    llama,
    mistral,
    mixtral,
    olmo2,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    roberta,
    t5,
)
from jaxllm.families.keys import BOOKKEEPING_KEYS, REFUSED_KEYS
from jaxllm.families.points import ModulePoint
from jaxllm.families.spec import Model, ModelSpec
from jaxllm.families.tasks import LANGUAGE_MODEL, Task, task_of
from jaxllm.families.vocabulary import Vocabulary
from jaxllm.families.weights import WeightRule, flatten, flax_leaves

__all__ = [
    "FAMILIES",
    "Model",
    "ModelSpec",
    "ModulePoint",
    "Task",
    "Vocabulary",
    "WeightRule",
    "architectures",
    "check_sequence_length",
    "flatten",
    "flax_leaves",
    "module_points",
    "resolve_model",
    "stored_names",
    "task_of",
]

FAMILIES: dict[str, ModuleType] = {
    "gpt2": gpt2,
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "gemma": gemma,
    "gemma2": gemma2,
    "gemma3_text": gemma3_text,
    "phi3": phi3,
    "olmo2": olmo2,
    "mixtral": mixtral,
    "qwen3_moe": qwen3_moe,
    "bert": bert,
    "roberta": roberta,
    "t5": t5,
}
UNKNOWN = Vocabulary()
"""Of a tokenizer that is not there yet."""


def resolve_model(
    config: ModelConfig,
    vocabulary: Vocabulary = UNKNOWN,
    *,
    weights: bool = True,
    task: Task = LANGUAGE_MODEL,
) -> Model:
    """The definite model of a run file's `model` section.

    vocabulary: the tokenizer's.  It gives the model's vocab_size, bos_token_id and eos_token_id, and pad_token_id where that
    matters, if the run file does not.  weights: whether the weights of a hub model are downloaded too, or only its config.json,
    which is enough to describe it.  task: decides the model's head.  Raises ConfigError for an unknown family, an unknown or
    wrong key, a head that the family lacks, a vocabulary smaller than the tokenizer, and special tokens that are not its.
    """
    if config.from_ is not None:
        return _from_folder(_local_folder(config.from_, weights=weights), vocabulary, task, weights=weights)
    keys = config.huggingface
    family = str(config.family)
    own = FAMILIES[family].Keys.model_fields.keys() if family in FAMILIES else set()
    for key in sorted(keys.keys() & BOOKKEEPING_KEYS - own):
        raise ConfigError(f"model.{key}", "says nothing about the model that is trained; remove it")
    if family not in FAMILIES:
        raise ConfigError("model.family", f"unknown family {family!r}; {nearest(family, FAMILIES)}")
    keys = vocabulary.filled(keys, task, FAMILIES[family].Keys.model_fields["pad_token_id"].default)
    for key in sorted(keys.keys() & REFUSED_KEYS.keys()):
        raise ConfigError(f"model.{key}", REFUSED_KEYS[key].format(family=family))
    try:
        checked = FAMILIES[family].Keys.model_validate(keys)
    except ValidationError as error:
        raise one_sentence(error, prefix="model", allowed=FAMILIES[family].Keys) from None
    return _model(family, checked, vocabulary, task, key="model.vocab_size", pretrained=None)


def check_sequence_length(model: Model, config: RunConfig) -> None:
    """ConfigError when `data.sequence_length` is longer than the model's positions."""
    longest, wanted = model.spec.max_positions, config.data.sequence_length
    if wanted > longest:
        key = FAMILIES[model.family].MAX_POSITIONS_KEY
        remedy = f"shorten it or raise model.{key}" if model.pretrained is None else "shorten it"
        raise ConfigError(
            "data.sequence_length", f"{wanted} tokens do not fit into the model's {longest} positions ({key}); {remedy}"
        )


def stored_names(model: Model, stored: Collection[str]) -> dict[str, str]:
    """The name that each weight of a model has among the tensors of a Hugging Face checkpoint, by its name in the rules.

    A tied weight may be stored under any of its names, and a checkpoint of the bare model (as the one of the first GPT-2 is)
    leaves out the prefix that the model with a head has.  Weights that the checkpoint lacks are not among the result.
    """
    prefix = FAMILIES[model.family].BASE_PREFIX
    spellings: dict[str, str] = getattr(FAMILIES[model.family], "STORED_SPELLINGS", {})
    found = {}
    for name, rule, _ in flatten(model.rules):
        candidates = [name, name.removeprefix(prefix), *rule.aliases]
        candidates += [each.replace(new, old) for each in candidates[:2] for new, old in spellings.items() if new in each]
        match = next((candidate for candidate in candidates if candidate in stored), None)
        if match is not None:
            found[name] = match
    return found


def module_points(model: Model) -> dict[str, ModulePoint]:
    """Where the points of `jaxllm.probe` lie in the transformers model, by point, all but `logits`, which is its output."""
    points: dict[str, ModulePoint] = FAMILIES[model.family].POINTS
    expanded = {}
    encoder = model.spec.encoder
    for point, place in points.items():
        layers = len(encoder.attentions) if encoder is not None and point.startswith("encoder.") else model.spec.layers
        for layer in range(layers if "{layer}" in point else 1):
            expanded[point.format(layer=layer)] = place.of_layer(layer)
    return expanded


def _model(family: str, keys: Any, vocabulary: Vocabulary, task: Task, key: str, pretrained: str | None) -> Model:
    module = FAMILIES[family]
    heads = architectures(family)
    if task.head not in heads:
        raise ConfigError("objective.kind", f"{family} has no head for {task.head}; it has {', '.join(sorted(heads))}")
    size = vocabulary.size
    if size is not None and keys.vocab_size < size:
        remedy = f"set vocab_size to at least {size} or use" if pretrained is None else "use"
        raise ConfigError(
            key,
            f"the model's vocabulary of {keys.vocab_size} is smaller than the tokenizer's {size}; {remedy} a smaller tokenizer",
        )
    vocabulary.check(keys, task, pretrained)
    described = {
        "architectures": [heads[task.head]],
        "model_type": family,
        **keys.model_dump(mode="json"),
        **task.described,
    }
    spec: ModelSpec = module.spec(keys, task)
    if vocabulary != UNKNOWN and spec.head.pool == "last" and spec.head.padding is None:
        raise ConfigError(
            "model.pad_token_id",
            "is not given, and the tokenizer names neither a padding nor an end-of-text token; give it the tokenizer's padding "
            "token, by which transformers finds the end of a row",
        )
    if task.head == "token-classification":
        described.setdefault("classifier_dropout", spec.head.dropout)
    return Model(family, spec, module.rules(keys, task), described, pretrained)


def architectures(family: str) -> dict[str, str]:
    """The transformers class of each head that a family has."""
    declared: dict[str, str] = FAMILIES[family].ARCHITECTURES
    return declared


def _from_folder(folder: Path, vocabulary: Vocabulary, task: Task, *, weights: bool) -> Model:
    """The model that a folder's config.json describes, with the folder's weights."""
    file = folder / "config.json"
    try:
        written = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError("model.from", f"{file} cannot be read as JSON: {error}") from None
    family = written.get("model_type") if isinstance(written, dict) else None
    if family not in FAMILIES:
        raise ConfigError(
            "model.from", f"{file} is of family {family!r}, which jaxllm does not have; {nearest(str(family), FAMILIES)}"
        )
    if weights and not any(folder.glob("*.safetensors")):
        raise ConfigError("model.from", f"{folder} holds no *.safetensors weights; convert it with save_pretrained")
    for key in sorted(written.keys() & REFUSED_KEYS.keys()):
        raise ConfigError("model.from", f"{file}: {key}: {REFUSED_KEYS[key].format(family=family)}")
    bookkeeping = BOOKKEEPING_KEYS - FAMILIES[family].Keys.model_fields.keys()
    keys = {key: value for key, value in written.items() if key not in bookkeeping}
    try:
        checked = FAMILIES[family].Keys.model_validate(vocabulary.filled_folder(keys, task))
    except ValidationError as error:
        found = one_sentence(error, prefix="", allowed=FAMILIES[family].Keys)
        said = "; ".join(f"{each.key}: {each.message}" if each.key else each.message for each in (found, *found.others))
        raise ConfigError("model.from", f"{file} is not a {family} model that jaxllm can train: {said}") from None
    return _model(family, checked, vocabulary, task, key="model.from", pretrained=str(folder))


def _local_folder(name: str, *, weights: bool) -> Path:
    """`model.from` as a folder on this machine, downloaded from the hub when it is not one already."""
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return folder
    if folder.exists():
        raise ConfigError("model.from", f"{folder} holds no config.json; give a folder that save_pretrained wrote")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    wanted = ["config.json", *(["generation_config.json", "*.safetensors", "*.safetensors.index.json"] if weights else [])]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=["*/*"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError("model.from", f"{name!r} is neither a local folder nor a model the hub gives ({reason})") from None
