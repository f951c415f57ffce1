"""The subject: the user's run as parity examines it, with its data, without dropout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxllm.config import RunConfig, total_steps
from jaxllm.config.schema import ModelConfig, Precision
from jaxllm.data.prepare import PreparedData, prepare
from jaxllm.families import Model, check_sequence_length, resolve_model, task_of
from jaxllm.run import Run


@dataclass(frozen=True)
class Subject:
    """What is examined.  notes: sentences about what differs from the run file."""

    run: Run
    data: PreparedData
    notes: tuple[str, ...]

    def in_precision(self, precision: Precision) -> Run:
        """The run in other numbers."""
        training = self.run.config.training.model_copy(update={"precision": precision})
        return replace(self.run, config=self.run.config.model_copy(update={"training": training}))


def examine(config: RunConfig, folder: Path, *, progress: bool = False) -> Subject:
    """Prepare the data and resolve the model of a run file, with dropout off.

    folder: for a copy of the description of a model taken `from:` elsewhere, where dropout has to be switched off in it.
    JaxllmError for a run file that cannot be run.
    """
    data = prepare(config, progress=progress)
    model = resolve_model(config.model, data.tokenizer.vocabulary, task=task_of(config.objective))
    notes: tuple[str, ...] = ()
    if model.spec.has_dropout:
        rates = _dropout_rates(model)
        listed = ", ".join(f"{key} {rate:g}" for key, rate in rates.items())
        notes = (
            f"dropout is switched off for the proof ({listed} in the run file): each backend draws its own random numbers",
        )
        config = config.model_copy(update={"model": _without_dropout(config.model, model, rates, folder)})
        model = resolve_model(config.model, data.tokenizer.vocabulary, task=task_of(config.objective))
        assert not model.spec.has_dropout  # noqa: S101 - a family spells dropout in a way that `_dropout_rates` does not know
    check_sequence_length(model, config)
    return Subject(Run(config, model, total_steps(config)), data, notes)


def _dropout_rates(model: Model) -> dict[str, float]:
    """The Hugging Face keys that switch dropout on: `attention_dropout`, `resid_pdrop` and their like."""
    keys = model.huggingface_config.items()
    return {
        key: value
        for key, value in keys
        if key.endswith(("dropout", "pdrop", "dropout_prob", "dropout_rate")) and isinstance(value, float) and value > 0
    }


def _without_dropout(config: ModelConfig, model: Model, rates: Mapping[str, float], folder: Path) -> ModelConfig:
    off = dict.fromkeys(rates, 0.0)
    if config.from_ is None:
        return ModelConfig.model_validate({"family": config.family, **config.huggingface, **off})
    assert model.pretrained is not None  # noqa: S101 - what `from:` means
    return ModelConfig.model_validate({"from": str(_relabelled(Path(model.pretrained), folder / "model", off))})


def _relabelled(source: Path, copy: Path, changes: Mapping[str, Any]) -> Path:
    """A model folder with the same weights and a changed config.json."""
    copy.mkdir(parents=True)
    for file in source.iterdir():
        if file.is_file() and file.name != "config.json":
            (copy / file.name).symlink_to(file.resolve())
    written = json.loads((source / "config.json").read_text(encoding="utf-8"))
    (copy / "config.json").write_text(json.dumps({**written, **changes}, indent=2) + "\n", encoding="utf-8")
    return copy
