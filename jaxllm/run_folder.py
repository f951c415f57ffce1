"""The run folder: what a run leaves behind, and the guard against overwriting it.

RUN/config.yaml        the resolved run file; `jaxllm train RUN/config.yaml` is the same run
RUN/environment.json   machine, versions, devices, command, of this start and of the earlier ones
RUN/tokenizer/         the tokenizer, as transformers loads it
RUN/metrics.jsonl      one object a line
RUN/tensorboard/       events
RUN/checkpoints/       see jaxllm.state.store
RUN/loss.png, RUN/sample.txt
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxllm.config.document import write_yaml
from jaxllm.config.schema import RunConfig
from jaxllm.errors import JaxllmError
from jaxllm.families import Model
from jaxllm.metrics.environment import write_environment


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def plot(self) -> Path:
        return self.path / "loss.png"

    @property
    def sample(self) -> Path:
        return self.path / "sample.txt"

    def holds_a_run(self) -> bool:
        """Whether a run was started here before."""
        return self.config.exists()

    def refuse_a_run(self) -> None:
        """JaxllmError when a run was started here before: nothing is overwritten unasked."""
        if self.holds_a_run():
            raise JaxllmError(
                f"{self.path} already holds a run; continue it with --resume, delete it with --overwrite, or change `name`"
            )
        if self.path.is_dir() and any(self.path.iterdir()):
            raise JaxllmError(f"{self.path} is not empty and holds no run; change `name` or `output_dir`")

    def create(self, config: RunConfig, model: Model, environment: Mapping[str, Any], *, overwrite: bool) -> None:
        """Make the folder and describe the run in it.  `overwrite` deletes a run that is there."""
        try:
            if overwrite and self.holds_a_run():
                shutil.rmtree(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
            write_environment(self.environment, environment)
            self.config.write_text(write_yaml(resolved(config, model)))
        except OSError as error:
            raise JaxllmError(f"cannot write the run folder {self.path} ({error.strerror}); change output_dir") from None


def resolved(config: RunConfig, model: Model) -> dict[str, Any]:
    """The run file with every default written out, the model's own keys included; it loads as the same run."""
    data = config.model_dump(mode="json", by_alias=True)
    if config.model.from_ is None:
        described = ("architectures", "model_type", "id2label", "label2id", "problem_type")  # what the objective says already
        keys = {key: value for key, value in model.huggingface_config.items() if key not in described}
        data["model"] = {"family": model.family, **keys}
    else:
        data["model"] = {"from": config.model.from_}
    data["data"] = {key: value for key, value in data["data"].items() if value is not None}
    for section in ("source", "validation_source", "tokenizer"):
        if section in data["data"]:
            data["data"][section] = {key: value for key, value in data["data"][section].items() if value is not None}
    return data
