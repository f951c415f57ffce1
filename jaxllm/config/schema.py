"""The RunConfig tree: what one run file may say.

Every section is frozen and refuses unknown keys.  `model` is the exception: beside `family` it holds that family's Hugging
Face config keys verbatim, which `jaxllm.families` checks, so that there is no second vocabulary to learn.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from jaxllm.config.messages import closest
from jaxllm.config.remat import RematPolicy, check_remat_names

Precision: TypeAlias = Literal["fp32", "bf16", "fp64"]
BackendName: TypeAlias = Literal["jax", "deepspeed"]
AttentionName: TypeAlias = Literal["auto", "xla", "blocked", "splash", "cudnn"]
OptimizerOffload: TypeAlias = Literal["none", "moments", "all"]


def _whole(value: object) -> object:
    """`1e9` is a float in YAML; where a count is wanted it is the whole number it looks like."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Positive: TypeAlias = Annotated[int, BeforeValidator(_whole), Field(ge=1)]
NonNegative: TypeAlias = Annotated[int, BeforeValidator(_whole), Field(ge=0)]
Fraction: TypeAlias = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """A frozen part of the run file that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False)


class ModelConfig(Section):
    """The model: `family` with its Hugging Face config keys, or `from`: a local folder or a hub name."""

    model_config = ConfigDict(frozen=True, extra="allow", populate_by_name=True, protected_namespaces=())

    family: str | None = Field(None, description="Model family; the other keys are that family's Hugging Face config keys.")
    from_: str | None = Field(None, alias="from", description="Local folder or hub name to take architecture and weights from.")

    @model_validator(mode="after")
    def _one_of_family_and_from(self) -> ModelConfig:
        if (self.family is None) == (self.from_ is None):
            said = "give either `family:` (a new model) or `from:` (an existing one)"
            meant = {name: closest(name, ("family", "from")) for name in self.huggingface}
            hints = [f"; did you mean `{near}:` instead of `{name}:`?" for name, near in meant.items() if near]
            raise ValueError(said + "".join(hints[:1]))
        if self.from_ is not None and self.huggingface:
            raise ValueError(f"`from:` takes the architecture from the folder; remove {', '.join(sorted(self.huggingface))}")
        return self

    @property
    def huggingface(self) -> dict[str, Any]:
        """The Hugging Face config keys as written in the run file."""
        return dict(self.model_extra or {})


class ObjectiveConfig(Section):
    """What the model learns to predict."""

    kind: Literal["causal-lm"] = Field("causal-lm", description="causal-lm: every token from the ones before it.")


class PythonSource(Section):
    """The standard library of the running Python: real text on every machine, one document per module."""

    kind: Literal["python-source"] = Field("python-source", description="The standard library of the running Python.")
    max_documents: Positive | None = Field(None, description="Use only the first N documents.")


class FileSource(Section):
    """Fields of every source that reads files."""

    files: tuple[str, ...] = Field(
        ...,
        min_length=1,
        description="Paths and globs, relative to the working directory; one, or a list.",
        json_schema_extra={"type": ["array", "string"]},
    )
    max_documents: Positive | None = Field(None, description="Use only the first N documents.")

    @field_validator("files", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        if isinstance(value, str):
            return (value,)
        return tuple(value) if isinstance(value, list) else value


class TextSource(FileSource):
    """Plain text files."""

    kind: Literal["text"] = Field(..., description="Plain text files.")
    document: Literal["file", "line", "paragraph"] = Field("file", description="What one document is.")


class JsonlSource(FileSource):
    """JSON Lines files: one object per line."""

    kind: Literal["jsonl"] = Field(..., description="JSON Lines files.")
    text_field: str = Field("text", description="The key that holds the text.")
    skip_broken: bool = Field(False, description="Skip and count broken lines instead of stopping at the first.")


class CsvSource(FileSource):
    """CSV files with a header row."""

    kind: Literal["csv"] = Field(..., description="CSV files.")
    text_field: str = Field("text", description="The column that holds the text.")
    delimiter: str = Field(",", min_length=1, max_length=1, description="The character between two columns.")


class ParquetSource(FileSource):
    """Parquet files."""

    kind: Literal["parquet"] = Field(..., description="Parquet files.")
    text_field: str = Field("text", description="The column that holds the text.")


class HuggingFaceSource(Section):
    """Any dataset that `datasets.load_dataset` opens: a hub name or a local folder."""

    kind: Literal["huggingface"] = Field(..., description="A dataset that `datasets.load_dataset` opens.")
    name: str = Field(..., description="Hub name or local folder.")
    subset: str | None = Field(None, description="Configuration of the dataset, where it has several.")
    split: str = Field("train", description="Split to read, for example `train` or `train[:10%]`.")
    revision: str | None = Field(None, description="Branch, tag or commit; pin it to read the same data for ever.")
    text_field: str = Field("text", description="The column that holds the text.")
    streaming: bool = Field(False, description="Read over the network as needed instead of downloading the whole dataset.")
    max_documents: Positive | None = Field(None, description="Use only the first N documents.")


Source: TypeAlias = Annotated[
    PythonSource | TextSource | JsonlSource | CsvSource | ParquetSource | HuggingFaceSource, Field(discriminator="kind")
]


class TokenizerConfig(Section):
    """A tokenizer trained here (`train: bpe`), or an existing one (`from:` a folder or hub name)."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {
                    "properties": {"train": {"const": "bpe"}, "vocab_size": {"type": "integer"}, "from": {"type": "null"}},
                    "required": ["train", "vocab_size"],
                },
                {
                    "properties": {"from": {"type": "string"}, "train": {"type": "null"}, "vocab_size": {"type": "null"}},
                    "required": ["from"],
                },
            ]
        }
    )

    train: Literal["bpe"] | None = Field(None, description="Train a byte-level BPE on the training documents.")
    vocab_size: Positive | None = Field(None, description="Entries of the tokenizer trained here, special tokens included.")
    from_: str | None = Field(None, alias="from", description="Local folder or hub name of an existing tokenizer.")

    @model_validator(mode="after")
    def _one_kind(self) -> TokenizerConfig:
        if (self.train is None) == (self.from_ is None):
            raise ValueError("give either `train: bpe` with `vocab_size:`, or `from:` a folder or hub name")
        if self.train is not None and self.vocab_size is None:
            raise ValueError("`train: bpe` needs `vocab_size:`")
        if self.from_ is not None and self.vocab_size is not None:
            raise ValueError("`vocab_size:` belongs to `train: bpe`; a tokenizer taken `from:` a folder has its own size")
        return self


class DataConfig(Section):
    """Where the text comes from and how it becomes sequences of tokens."""

    source: Source = Field(default_factory=PythonSource)
    validation_source: Source | None = Field(None, description="Validation documents; else a fraction of `source`.")
    validation_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.02, description="Fraction of the documents held out for validation when there is no `validation_source`."
    )
    tokenizer: TokenizerConfig
    sequence_length: Annotated[int, Field(ge=2)] = Field(..., description="Tokens per sequence.")
    packing: Literal["concatenate", "none"] = Field(
        "concatenate", description="concatenate: documents fill sequences end to end; none: one (cut or padded) document each."
    )
    cross_document_attention: bool = Field(
        False, description="Whether tokens of a packed sequence may attend to earlier documents in the same sequence."
    )
    append_eos: bool = Field(True, description="End every document with the tokenizer's end-of-text token.")
    workers: Positive | None = Field(None, description="Tokenising processes; default: one, with the tokenizer's own threads.")
    cache_dir: Path | None = Field(None, description="Prepared data; default ~/.cache/jaxllm.")
    prefetch: NonNegative = Field(4, description="Batches prepared ahead of the step.")


class OptimizerConfig(Section):
    """AdamW, in torch's order of operations on both backends."""

    kind: Literal["adamw"] = Field("adamw", description="AdamW (arXiv:1711.05101).")
    learning_rate: Annotated[float, Field(ge=0.0)] = Field(..., description="The highest rate, reached after the warm-up.")
    betas: tuple[Annotated[float, Field(ge=0.0, lt=1.0)], Annotated[float, Field(ge=0.0, lt=1.0)]] = Field(
        (0.9, 0.95), description="Decay of the running means of the gradient and of its square."
    )
    eps: Annotated[float, Field(gt=0.0)] = Field(1e-8, description="Added to the root of the second moment.")
    weight_decay: Annotated[float, Field(ge=0.0)] = Field(0.1, description="Only matrices and embeddings decay.")
    clip_norm: Annotated[float, Field(gt=0.0)] | None = Field(1.0, description="Global gradient norm; null: no clipping.")


class ScheduleConfig(Section):
    """The learning rate over the steps."""

    kind: Literal["constant", "linear", "cosine"] = Field("cosine", description="How the rate falls after the warm-up.")
    warmup_steps: NonNegative = Field(0, description="Steps of linear warm-up from zero.")
    final_fraction: Fraction = Field(0.1, description="Learning rate of the last step as a fraction of the highest.")


class TrainingConfig(Section):
    """How long, how much at once, and in which numbers."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"properties": {"steps": {"type": "integer"}, "tokens": {"type": "null"}}, "required": ["steps"]},
                {"properties": {"tokens": {"type": "integer"}, "steps": {"type": "null"}}, "required": ["tokens"]},
            ]
        }
    )

    steps: Positive | None = Field(None, description="Optimiser steps; give this or `tokens`.")
    tokens: Positive | None = Field(None, description="Tokens to train on, rounded up to whole steps; give this or `steps`.")
    global_batch: Positive = Field(..., description="Sequences per optimiser step over all devices.")
    micro_batch: Positive | None = Field(
        None, description="Sequences per device and forward pass; default: global_batch / data-parallel devices."
    )
    precision: Precision = Field(
        "fp32",
        description="fp32; bf16: bf16 compute with fp32 master weights and moments; fp64: for proofs, without DeepSpeed.",
    )
    non_finite: Literal["stop", "skip"] = Field("stop", description="What to do when loss or gradient norm is NaN or infinite.")
    non_finite_limit: Positive = Field(10, description="With `skip`: stop after this many skipped steps in the run.")

    @model_validator(mode="after")
    def _steps_or_tokens(self) -> TrainingConfig:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError("give exactly one of `steps` and `tokens`")
        return self


class ParallelConfig(Section):
    """Size of each mesh axis; their product is the number of devices. -1 for `data`: every device the others leave."""

    data: int = Field(-1, description="Replicas that each see different rows; -1: all remaining devices.")
    fsdp: Positive = Field(1, description="Shards of parameters, gradients and moments.")
    tensor: Positive = Field(1, description="Shards of heads, MLP and vocabulary.")
    context: Positive = Field(1, description="Shards of the sequence.")
    expert: Positive = Field(1, description="Shards of the experts of a mixture-of-experts family.")

    @field_validator("data")
    @classmethod
    def _positive_or_rest(cls, value: int) -> int:
        if value < 1 and value != -1:
            raise ValueError(f"must be -1 (all remaining devices) or at least 1, not {value}")
        return value


class EvaluationConfig(Section):
    """Evaluation on the validation split."""

    every: Positive | None = Field(100, description="Steps between evaluations; null: only at the end.")
    batches: Positive | None = Field(None, description="Global batches per evaluation; null: the whole validation split.")


class CheckpointConfig(Section):
    """When to save and what to keep."""

    every: Positive | None = Field(100, description="Steps between checkpoints; null: only at the end.")
    keep: Positive | None = Field(2, description="Keep the newest N; null: all.")
    keep_every: Positive | None = Field(None, description="Besides, keep every checkpoint whose step is a multiple of this.")


class LoggingConfig(Section):
    """What is reported, how often, and where."""

    every: Positive = Field(10, description="Steps between two reports.")
    sinks: tuple[Literal["console", "jsonl", "tensorboard", "wandb"], ...] = Field(
        ("console", "jsonl", "tensorboard"), description="Where the reports go."
    )


class SampleConfig(Section):
    """The sample generated at the end of the run."""

    prompt: str = Field("", description="Text to continue; empty: from the end-of-text token.")
    max_new_tokens: NonNegative = Field(128, description="0: no sample.")
    temperature: Annotated[float, Field(ge=0.0)] = Field(
        0.8, description="Flattens (above 1) or sharpens (below 1); 0: greedy."
    )
    top_k: NonNegative = Field(40, description="Draw from the N likeliest tokens; 0: from all.")
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        1.0, description="Draw from the likeliest tokens that together have this probability."
    )


class JaxConfig(Section):
    """Only what has no meaning on the other backend."""

    attention: AttentionName = Field(
        "auto", description="Attention kernel; auto: splash on TPU, cudnn on NVIDIA GPUs in bf16, blocked on one CPU, else xla."
    )
    attention_block: Annotated[int, Field(ge=128, multiple_of=128)] | None = Field(
        None, description="Queries and keys that splash attention works on at once; default: by generation of TPU."
    )
    remat: RematPolicy | tuple[str, ...] = Field(
        "none",
        description="What each layer keeps for its backward pass. none: everything; full: its input; dots: products; "
        "offload: those, in host memory; or a list of its points: NAME, or NAME@host.",
    )
    offload_optimizer: OptimizerOffload = Field(
        "none", description="What is in host memory between its uses. moments: Adam's moments; all: the master weights, too."
    )
    cpu_devices: Positive = Field(1, description="Virtual devices to split the CPU into, to try a mesh without accelerators.")

    @field_validator("remat")
    @classmethod
    def _known_points(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not isinstance(value, str):
            check_remat_names(value)
        return value


class DeepSpeedConfig(Section):
    """Only what has no meaning on the other backend."""

    zero_stage: Literal[0, 1, 2, 3] = Field(
        0, description="What ZeRO shards: 1: moments; 2: gradients too; 3: parameters too; 0: nothing."
    )
    attention: Literal["auto", "sdpa", "eager"] = Field(
        "auto", description="Attention of the Hugging Face model; auto: sdpa, or eager where a model caps its scores."
    )
    offload_optimizer: Literal["none", "cpu"] = Field(
        "none", description="cpu: masters, moments and their update in host memory; needs zero_stage 1, 2 or 3."
    )
    offload_param: Literal["none", "cpu"] = Field(
        "none", description="cpu: parameters in host memory until a layer needs them; needs zero_stage 3."
    )
    activation_checkpointing: bool = Field(False, description="Recompute each layer in the backward pass.")
    torch_compile: bool = Field(False, description="Compile the model with torch.compile.")


class RunConfig(Section):
    """One run file: everything a training run is, for either backend."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field(..., description="Name of the run folder.")
    output_dir: Path = Field(Path("runs"), description="The run folder is output_dir/name.")
    seed: NonNegative = Field(0, description="Initial weights, data order, dropout and samples all follow from it.")
    backend: BackendName = Field("jax", description="Default backend; --backend overrides it.")
    model: ModelConfig
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)
    data: DataConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    training: TrainingConfig
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    sample: SampleConfig = Field(default_factory=SampleConfig)
    jax: JaxConfig = Field(default_factory=JaxConfig)
    deepspeed: DeepSpeedConfig = Field(default_factory=DeepSpeedConfig)

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.output_dir / self.name
