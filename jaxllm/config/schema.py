"""The RunConfig tree: what one run file may say.

Every section is frozen and refuses unknown keys.  `model` is the exception: beside `family` it holds that family's Hugging
Face config keys verbatim, which `jaxllm.families` checks, so that there is no second vocabulary to learn.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import ConfigDict, Field, field_validator, model_validator

from jaxllm.config.loss_chunk import LossChunk
from jaxllm.config.messages import closest
from jaxllm.config.objective import CausalLmObjective, ObjectiveConfig
from jaxllm.config.remat import RematPolicy, check_remat_names
from jaxllm.config.section import Fraction, NonNegative, Positive, Section
from jaxllm.config.source import PythonSource, Source

Precision: TypeAlias = Literal["fp32", "bf16", "fp64"]
BackendName: TypeAlias = Literal["jax", "deepspeed"]
AttentionName: TypeAlias = Literal["auto", "xla", "blocked", "splash", "cudnn"]
OptimizerOffload: TypeAlias = Literal["none", "moments", "all"]


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


class TokenizerConfig(Section):
    """A tokenizer trained here (`train: bpe` or `wordpiece`), or an existing one (`from:` a folder or hub name)."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {
                    "properties": {"train": {"type": "string"}, "vocab_size": {"type": "integer"}, "from": {"type": "null"}},
                    "required": ["train", "vocab_size"],
                },
                {
                    "properties": {"from": {"type": "string"}, "train": {"type": "null"}, "vocab_size": {"type": "null"}},
                    "required": ["from"],
                },
            ]
        }
    )

    train: Literal["bpe", "wordpiece"] | None = Field(
        None, description="Train one on the training documents: bpe: byte-level; wordpiece: BERT's, lower case."
    )
    special_tokens: Literal["gpt2", "bert", "roberta", "t5"] | None = Field(
        None, description="Whose special tokens one trained here has; default: gpt2 for bpe, bert for wordpiece."
    )
    vocab_size: Positive | None = Field(None, description="Entries of the tokenizer trained here, special tokens included.")
    from_: str | None = Field(None, alias="from", description="Local folder or hub name of an existing tokenizer.")

    @model_validator(mode="after")
    def _one_kind(self) -> TokenizerConfig:
        if (self.train is None) == (self.from_ is None):
            raise ValueError("give either `train: bpe` with `vocab_size:`, or `from:` a folder or hub name")
        if self.train is not None and self.vocab_size is None:
            raise ValueError(f"`train: {self.train}` needs `vocab_size:`")
        if self.from_ is not None and self.vocab_size is not None:
            raise ValueError("`vocab_size:` belongs to `train: bpe`; a tokenizer taken `from:` a folder has its own size")
        if self.from_ is not None and self.special_tokens is not None:
            raise ValueError("`special_tokens:` belongs to `train:`; a tokenizer taken `from:` a folder has its own")
        if (self.train == "wordpiece") != (self.convention == "bert") and self.train is not None:
            raise ValueError(
                f"`train: {self.train}` cannot have the special tokens of {self.convention}; "
                "wordpiece has those of bert, bpe those of gpt2, roberta or t5"
            )
        return self

    @property
    def convention(self) -> Literal["gpt2", "bert", "roberta", "t5"]:
        """Whose special tokens a tokenizer trained here has."""
        return self.special_tokens or ("bert" if self.train == "wordpiece" else "gpt2")


class DataConfig(Section):
    """Where the text comes from and how it becomes sequences of tokens."""

    source: Source = Field(default_factory=PythonSource)
    validation_source: Source | None = Field(None, description="Validation documents; else a fraction of `source`.")
    validation_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.02, description="Fraction of the documents held out for validation when there is no `validation_source`."
    )
    tokenizer: TokenizerConfig
    sequence_length: Annotated[int, Field(ge=2)] = Field(..., description="Tokens per sequence.")
    target_length: Annotated[int, Field(ge=2)] | None = Field(
        None, description="seq2seq, span-corruption: tokens per target; default: sequence_length."
    )
    packing: Literal["concatenate", "none"] = Field(
        "concatenate", description="concatenate: documents fill sequences end to end; none: one (cut or padded) document each."
    )
    truncate: bool = Field(
        False,
        description="Labelled and paired examples: cut what is too long, the longer of a pair first, instead of stopping.",
    )
    cross_document_attention: bool = Field(
        False, description="Whether tokens of a packed sequence may attend to earlier documents in the same sequence."
    )
    append_eos: bool | None = Field(
        None,
        description="causal-lm: end every document with the tokenizer's end-of-text token; default: true. Other objectives "
        "have the special tokens that the tokenizer puts around a text.",
    )
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
    frozen: tuple[str, ...] = Field(
        (), description="Patterns (`*`, `?`) of the Hugging Face names of weights that stay as they are."
    )
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        1.0, description="Each layer's learning rate as a fraction of that of the layer above it; the head has the full one."
    )

    @field_validator("frozen", mode="before")
    @classmethod
    def _list(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value


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
    loss_chunk: LossChunk = Field(
        "auto",
        description="Tokens of a device whose logits exist at once, in cross-entropy over a vocabulary; none: all; auto: 1024 "
        "where the logits of all are many, 2048 on a TPU.",
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
        description="What each layer keeps for its backward pass. none: everything; full: its input; dots: products with "
        "weights; products: those and what attention gives; offload: the same, in host memory; or a list of its points: NAME, "
        "or NAME@host.",
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
    liger: bool = Field(False, description="Liger kernels for norms, rotary embedding, gated MLP on CUDA.")


class RunConfig(Section):
    """One run file: everything a training run is, for either backend."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field(..., description="Name of the run folder.")
    output_dir: Path = Field(Path("runs"), description="The run folder is output_dir/name.")
    seed: NonNegative = Field(0, description="Initial weights, data order, dropout and samples all follow from it.")
    backend: BackendName = Field("jax", description="Default backend; --backend overrides it.")
    model: ModelConfig
    objective: ObjectiveConfig = Field(default_factory=CausalLmObjective)
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
