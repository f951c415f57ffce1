"""Weights & Biases, when the optional package `wandb` is installed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from jaxllm.config.schema import RunConfig
from jaxllm.errors import ConfigError
from jaxllm.metrics.records import TrainRecord, ValidationRecord


class WandbSink:
    """Logs `train/KEY` and `validation/KEY` over `step`.  Project, entity and mode are wandb's own settings.

    Offline and disabled modes (`wandb offline`, WANDB_MODE) are the user's choice and stay as they are.  The id of the W&B run
    is kept in the run folder, so that a resumed run goes on in it.

    Raises ConfigError at once when wandb is not installed.
    """

    def __init__(self, config: RunConfig, folder: Path) -> None:
        if importlib.util.find_spec("wandb") is None:
            raise ConfigError(
                "logging.sinks",
                "the sink 'wandb' needs the package wandb; install it with: pip install 'jaxllm[wandb]', or leave it out",
            )
        self._config = config
        self._folder = folder
        self._run: Any = None

    def open(self, total_steps: int, start_step: int) -> None:
        import wandb

        self._folder.mkdir(parents=True, exist_ok=True)
        kept = self._folder / "wandb.json"
        resumed = json.loads(kept.read_text())["id"] if start_step and kept.exists() else None
        self._run = wandb.init(
            project=None if wandb.setup().settings.project else "jaxllm",
            name=self._config.name,
            id=resumed,
            resume="allow",
            dir=str(self._folder),
            config={**self._config.model_dump(mode="json", by_alias=True), "total_steps": total_steps},
        )
        kept.write_text(json.dumps({"id": self._run.id}) + "\n")
        # W&B's own counter only grows; with `step` as the axis, steps that are done again after a crash find their place.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def train(self, record: TrainRecord) -> None:
        self._log(record.to_json())

    def validation(self, record: ValidationRecord) -> None:
        self._log(record.to_json())

    def message(self, text: str) -> None:
        """Messages are for people."""

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None

    def _log(self, line: dict[str, Any]) -> None:
        step, split = line.pop("step"), line.pop("split")
        values = {f"{split}/{key}": value for key, value in line.items() if value is not None}
        self._run.log({"step": step, **values})
