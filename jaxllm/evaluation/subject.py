"""What is evaluated: the model of a run or of a folder, on the run's validation split or on other data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from jaxllm.config import RunConfig
from jaxllm.data.prepare import PreparedData, prepare
from jaxllm.errors import JaxllmError
from jaxllm.generation.load import Trained

_LONGEST, _BATCH = 512, 16
_KINDS = {".jsonl": "jsonl", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet", ".txt": "text"}


@dataclass(frozen=True)
class OtherData:
    """Data to evaluate on instead of the run's.  files: paths or globs.  fields: `text_field` and the like, as in run files."""

    files: tuple[str, ...]
    fields: dict[str, str]


def subject(folder: Path, trained: Trained, other: OtherData | None, batch: int | None) -> tuple[Trained, PreparedData]:
    """The model and its data.  batch: examples in a forward pass; default, the run's.  JaxllmError when there is no data."""
    config = trained.run.config
    own_batch = config.training.global_batch if trained.checkpoint is not None else _BATCH
    training = config.training.model_copy(update={"global_batch": batch or own_batch, "micro_batch": None})
    evaluation = config.evaluation.model_copy(update={"batches": None})
    config = config.model_copy(update={"training": training, "evaluation": evaluation})
    if trained.checkpoint is None:  # a folder says nothing of lengths
        length = min(trained.run.model.spec.max_positions, _LONGEST)
        config = config.model_copy(update={"data": config.data.model_copy(update={"sequence_length": length})})
    if other is not None:
        config = _with_data(config, folder, other, trained.checkpoint is not None)
    elif trained.checkpoint is None:
        raise JaxllmError(f"{folder} is a model folder, which names no data; give some with --data FILE")
    trained = replace(trained, run=replace(trained.run, config=config))
    return trained, prepare(config, progress=True)


def _with_data(config: RunConfig, folder: Path, other: OtherData, is_run: bool) -> RunConfig:
    """The run with all its data, of which the validation split is used, from other files."""
    suffixes = {Path(file).suffix for file in other.files}
    suffix = next(iter(suffixes)) if len(suffixes) == 1 else ""
    own = (config.data.validation_source or config.data.source).model_dump(mode="json") if is_run else {}
    kind = _KINDS.get(suffix)
    if own.get("kind") not in (kind, None) and kind is not None:
        own = {key: value for key, value in own.items() if key.endswith("_field")}
    elif kind is None and "files" not in own:
        raise JaxllmError(f"--data {' '.join(other.files)}: unknown kind of file; use one of {', '.join(_KINDS)}")
    source: dict[str, Any] = {**own, "files": list(other.files), **other.fields}
    source["kind"] = kind or own["kind"]
    if source["kind"] == "text":
        source = {key: value for key, value in source.items() if not key.endswith("_field")}
    data = {
        **config.data.model_dump(mode="json", by_alias=True, exclude={"source", "validation_source", "tokenizer"}),
        "source": source,
        "validation_source": source,
        "tokenizer": {"from": str(folder / "tokenizer" if is_run else folder)},
    }
    try:
        return config.model_copy(update={"data": type(config.data).model_validate(data)})
    except ValidationError as error:
        raise JaxllmError(f"--data {' '.join(other.files)}: {error.errors()[0]['msg']}") from None
