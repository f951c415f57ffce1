"""A trained model from a run folder, or from a folder that `save_pretrained` or `jaxllm export` wrote."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxllm.config import RunConfig, load_run
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import JaxllmError
from jaxllm.families import FAMILIES, architectures, resolve_model, task_of
from jaxllm.run import Run, on_one_device
from jaxllm.run_folder import RunFolder
from jaxllm.state.store import Checkpoint, CheckpointStore


@dataclass(frozen=True)
class Trained:
    """A model to be used.  checkpoint: where its weights are; None when they are those of `run.model.pretrained`."""

    run: Run
    tokenizer: Tokenizer
    checkpoint: Checkpoint | None


def load_trained(folder: Path, step: int | None, report: Callable[[str], None], overrides: Sequence[str] = ()) -> Trained:
    """Open a run folder at `step` (None: its newest whole checkpoint) or a Hugging Face folder.

    The run is laid out for one device.  report: told of damaged checkpoints.  overrides: `a.b=value`, of the run's file.
    JaxllmError when there is nothing to open, and for overrides of what the weights were trained with, or of no run's file.
    """
    run_folder = RunFolder(folder)
    if run_folder.holds_a_run():
        return _from_run(run_folder, step, report, overrides)
    if (folder / "config.json").is_file():
        if overrides:
            raise JaxllmError(f"--set {overrides[0]}: {folder} is a model folder, which has no run file; leave --set out")
        return _from_pretrained(folder)
    raise JaxllmError(f"{folder} is neither a run folder (no config.yaml) nor a model folder (no config.json); give another")


def _from_run(folder: RunFolder, step: int | None, report: Callable[[str], None], overrides: Sequence[str]) -> Trained:
    config = _changed(folder, overrides)
    store = CheckpointStore(folder.checkpoints)
    if step is not None and step not in store.steps():
        raise JaxllmError(f"{folder.path} has no checkpoint of step {step}; there are {_listed(store.steps())}")
    checkpoint = store.open(step) if step is not None else store.latest(report)
    if checkpoint is None:
        raise JaxllmError(f"{folder.path} has no whole checkpoint yet; train it with: jaxllm train {folder.config} --resume")
    tokenizer = Tokenizer.load(str(folder.tokenizer))
    return Trained(_run(config, tokenizer), tokenizer, checkpoint)


def _changed(folder: RunFolder, overrides: Sequence[str]) -> RunConfig:
    """The run's file with overrides, which may not touch what the weights were trained with."""
    config = load_run(folder.config, overrides).config
    trained = load_run(folder.config).config if overrides else config
    for section, new, old in (
        ("model", config.model, trained.model),
        ("objective", config.objective, trained.objective),
        ("data.tokenizer", config.data.tokenizer, trained.data.tokenizer),
    ):
        if new != old:
            raise JaxllmError(f"--set changes {section}, with which the weights in {folder.path} were trained; leave it out")
    return config


def _from_pretrained(folder: Path) -> Trained:
    tokenizer = Tokenizer.load(str(folder))
    objective = _objective(folder)
    config = RunConfig.model_validate(
        {
            "name": "pretrained",
            "model": {"from": str(folder)},
            "objective": objective,
            "data": {"tokenizer": {"from": str(folder)}, "sequence_length": 2, **_data(objective)},
            "optimizer": {"learning_rate": 0.0},
            "training": {"steps": 1, "global_batch": 1},
        }
    )
    return Trained(_run(config, tokenizer), tokenizer, None)


def _objective(folder: Path) -> dict[str, Any]:
    """The objective that a folder's model was trained for, as its config.json tells it."""
    file = folder / "config.json"
    try:
        described = json.loads(file.read_text(encoding="utf-8"))
        family, classes = str(described["model_type"]), described.get("architectures") or []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise JaxllmError(f"{file} does not describe a model ({error}); give another folder") from None
    heads = architectures(family) if family in FAMILIES else {}
    head = next((head for head, name in heads.items() if name in classes), "causal-lm")
    if head not in ("sequence-classification", "token-classification"):
        return {"kind": head}
    names = described.get("id2label") or {str(number): f"LABEL_{number}" for number in range(described.get("num_labels", 2))}
    objective: dict[str, Any] = {"kind": head, "labels": [str(names[number]) for number in sorted(names, key=int)]}
    if head == "sequence-classification" and described.get("problem_type"):
        objective["problem_type"] = described["problem_type"]
    return objective


def _data(objective: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of `data` that an objective demands; the data themselves come from whoever evaluates the model."""
    return {} if objective["kind"] in ("causal-lm", "masked-lm", "span-corruption") else {"packing": "none"}


def _run(config: RunConfig, tokenizer: Tokenizer) -> Run:
    training = config.training.model_copy(update={"micro_batch": None})  # what fitted many devices need not fit one
    config = config.model_copy(update={"training": training})
    special = replace(tokenizer.vocabulary, size=None)  # some tokenizers have more entries than their model, for other uses
    return on_one_device(Run(config, resolve_model(config.model, special, task=task_of(config.objective)), total_steps=1))


def _listed(steps: list[int]) -> str:
    return ", ".join(map(str, steps)) or "none"
