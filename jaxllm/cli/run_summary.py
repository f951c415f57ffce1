"""What a run file comes to: parameters, steps, tokens, the batch on each device, the arithmetic it takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jaxllm.backend import check_layout
from jaxllm.config import BatchPlan, RunConfig, data_parallel, resolve_batch, tokens_per_step, total_steps
from jaxllm.config.schema import TokenizerConfig
from jaxllm.data.fields import check_examples
from jaxllm.data.special_tokens import CONVENTIONS
from jaxllm.families import Model, Vocabulary, check_sequence_length, resolve_model, task_of
from jaxllm.families.rates import rate_scales
from jaxllm.metrics.flops import flops_per_token
from jaxllm.schedule import check_schedule


@dataclass(frozen=True)
class RunSummary:
    """Counts of a run.  training_flops: model FLOPs of all steps, forward and backward."""

    family: str
    parameters: int
    embedding_parameters: int
    decayed_parameters: int
    steps: int
    sequences_per_step: int
    sequence_length: int
    tokens_per_step: int
    tokens: int
    training_flops: float
    devices: int
    data_parallel: int
    batch: BatchPlan

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def lines(self) -> Iterator[tuple[str, str]]:
        """Label and text of each line that a person reads."""
        yield "model", f"{self.family}, {self.parameters:,} parameters, {self.embedding_parameters:,} of them in embeddings"
        yield "weight decay", f"on {self.decayed_parameters:,} parameters"
        yield "steps", f"{self.steps:,}"
        yield "tokens per step", f"{self.sequences_per_step:,} x {self.sequence_length:,} = {self.tokens_per_step:,}"
        yield "tokens", f"{self.tokens:,}, {self.tokens / self.parameters:.1f} per parameter"
        yield "training FLOPs", f"{self.training_flops:.3g}"
        yield (
            "devices",
            f"{self.devices:,}, of which {self.data_parallel:,} see different rows (data x fsdp, on either backend)",
        )
        factors = (
            f"{self.batch.micro_batch} sequences x {self.batch.accumulation} accumulated x {self.data_parallel} data-parallel"
        )
        yield "batch", f"{factors} = {self.sequences_per_step}"


def resolve(config: RunConfig) -> Model:
    """The model as far as it is known before the data is prepared: the tokenizer is the one it asks for, or a local one."""
    tokenizer = config.data.tokenizer
    known = _trained(tokenizer) if tokenizer.from_ is None else _local(tokenizer.from_)
    return resolve_model(config.model, known, weights=False, task=task_of(config.objective))


def _trained(tokenizer: TokenizerConfig) -> Vocabulary:
    """Of a tokenizer that will be trained."""
    special = CONVENTIONS[tokenizer.convention].number
    return Vocabulary(tokenizer.vocab_size, special("eos_token"), special("bos_token"), special("pad_token"))


def _local(name: str) -> Vocabulary:
    """Unknown for a tokenizer of the hub, which is not downloaded for this."""
    if not Path(name).expanduser().is_dir():
        return Vocabulary()
    from jaxllm.data.tokenizer import Tokenizer

    return Tokenizer.load(name).vocabulary


def summarize(config: RunConfig, model: Model, devices: int | None = None) -> RunSummary:
    """Count, and check what needs no device.

    ConfigError for a batch, mesh, schedule or sequence length that does not fit, and for what the backend cannot combine.
    devices: default, the fewest that the mesh allows.
    """
    check_examples(config)
    check_sequence_length(model, config)
    rate_scales(model, config.optimizer)
    check_schedule(total_steps(config), config.schedule)
    check_layout(config, model, devices)
    devices = devices or fewest_devices(config)
    groups = data_parallel(config.parallel, devices)
    tokens = total_steps(config) * tokens_per_step(config)
    return RunSummary(
        family=model.family,
        parameters=model.parameters,
        embedding_parameters=sum(rule.parameters for rule in model.rules if rule.kind == "embedding"),
        decayed_parameters=sum(rule.parameters for rule in model.rules if rule.decays),
        steps=total_steps(config),
        sequences_per_step=config.training.global_batch,
        sequence_length=config.data.sequence_length,
        tokens_per_step=tokens_per_step(config),
        tokens=tokens,
        training_flops=tokens * flops_per_token(model.spec, config.data.sequence_length, config.data.target_length).training,
        devices=devices,
        data_parallel=groups,
        batch=resolve_batch(config, groups),
    )


def fewest_devices(config: RunConfig) -> int:
    """Devices of the mesh, with one data-parallel replica where the run file leaves their number open."""
    parallel = config.parallel
    return max(parallel.data, 1) * parallel.fsdp * parallel.tensor * parallel.context * parallel.expert


def sentence(file: Path, config: RunConfig, summary: RunSummary) -> str:
    """What `config check` says of a valid file."""
    return (
        f"{file}: valid: {config.name} trains a {summary.family} of {summary.parameters:,} parameters "
        f"for {summary.steps:,} steps of {summary.tokens_per_step:,} tokens"
    )
