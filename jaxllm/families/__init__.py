"""Model families as data: Hugging Face config -> ModelSpec and the table of weight rules.

Adding a family: one file here that defines ARCHITECTURE, Keys, spec and rules, one entry in FAMILIES, one run file, one line
in the test tables.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from jaxllm.config.messages import nearest, one_sentence
from jaxllm.config.schema import ModelConfig
from jaxllm.errors import ConfigError
from jaxllm.families import gpt2, llama
from jaxllm.families.keys import BOOKKEEPING_KEYS
from jaxllm.families.spec import Model, ModelSpec
from jaxllm.families.weights import WeightRule, flatten

__all__ = ["FAMILIES", "Model", "ModelSpec", "WeightRule", "flatten", "resolve_model"]

FAMILIES: dict[str, ModuleType] = {"llama": llama, "gpt2": gpt2}


def resolve_model(config: ModelConfig, vocab_size: int | None = None) -> Model:
    """The definite model of a run file's `model` section.

    vocab_size: the tokenizer's size, which becomes the model's when the run file gives none.  Raises ConfigError for an
    unknown family, an unknown or wrong key, and a vocabulary smaller than the tokenizer.
    """
    if config.from_ is not None:
        folder = _local_folder(config.from_)
        written = json.loads((folder / "config.json").read_text())
        family = str(written.get("model_type"))
        keys = {key: value for key, value in written.items() if key not in BOOKKEEPING_KEYS}
        return _build(family, keys, vocab_size, key="model.from", pretrained=str(folder))
    keys = config.huggingface
    if vocab_size is not None:
        keys.setdefault("vocab_size", vocab_size)
    return _build(str(config.family), keys, vocab_size, key="model.family", pretrained=None)


def _build(family: str, keys: Mapping[str, Any], vocab_size: int | None, key: str, pretrained: str | None) -> Model:
    if family not in FAMILIES:
        raise ConfigError(key, f"unknown family {family!r}; {nearest(family, FAMILIES)}")
    module = FAMILIES[family]
    try:
        checked = module.Keys.model_validate(dict(keys))
    except ValidationError as error:
        raise one_sentence(error, prefix="model", allowed=module.Keys) from None
    if vocab_size is not None and checked.vocab_size < vocab_size:
        raise ConfigError(
            "model.vocab_size" if pretrained is None else key,
            f"the model's vocabulary of {checked.vocab_size} is smaller than the tokenizer's {vocab_size}; "
            f"set vocab_size to at least {vocab_size} or use a smaller tokenizer",
        )
    spec: ModelSpec = module.spec(checked)
    described = {"architectures": [module.ARCHITECTURE], "model_type": family, **checked.model_dump(mode="json")}
    return Model(family, spec, module.rules(checked), described, pretrained)


def _local_folder(name: str) -> Path:
    """`model.from` as a folder on this machine, downloaded from the hub when it is not one already."""
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return folder
    if folder.exists():
        raise ConfigError("model.from", f"{folder} holds no config.json; give a folder that save_pretrained wrote")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    wanted = ["config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError("model.from", f"{name!r} is neither a local folder nor a model the hub gives ({reason})") from None
