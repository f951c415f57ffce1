"""What DeepSpeed cannot combine: the one table of refusals.

Every row is checked before a process is started, by `jaxllm config check` and `jaxllm train` alike, from the run file and the
model's description alone: nothing here imports torch.  docs/deepspeed_backend.md shows the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from jaxllm.config.batch import data_parallel
from jaxllm.config.schema import DeepSpeedConfig, ParallelConfig, RunConfig
from jaxllm.errors import ConfigError
from jaxllm.families import Model
from jaxllm.families.spec import Activation, AttentionSpec

AUTOTP_FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2"})
"""Families whose training under AutoTP a test has shown to be the training of one process.

Not among them: gpt2, whose layers (transformers' Conv1D) keep their weights the other way round than AutoTP's training layers
compute with them; mixtral and qwen3_moe, whose experts are one stacked tensor, which AutoTP does not cut; encoders and
encoder-decoders, for which transformers has no tensor-parallel plan.
"""

LIGER_ACTIVATIONS: Mapping[str, Activation] = {
    **dict.fromkeys(("llama", "mistral", "mixtral", "olmo2", "phi3", "qwen2", "qwen3", "qwen3_moe"), "silu"),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), "gelu_tanh"),
}
"""Families that liger-kernel has kernels for, and the activation that its MLP computes, whatever the config says."""


@dataclass(frozen=True)
class Case:
    """A run that is about to start, as the table sees it."""

    config: RunConfig
    model: Model

    @property
    def parallel(self) -> ParallelConfig:
        """The mesh asked for."""
        return self.config.parallel

    @property
    def deepspeed(self) -> DeepSpeedConfig:
        """DeepSpeed's own section."""
        return self.config.deepspeed

    @property
    def fp64(self) -> bool:
        """Whether the run is one of proof, in plain torch."""
        return self.config.training.precision == "fp64"

    @property
    def attention(self) -> AttentionSpec:
        """The heads to be shared."""
        return self.model.spec.attention


@dataclass(frozen=True)
class Refusal:
    """A row.  key: whose value is refused; combination, reason, remedy: for the reader; found: whether a run asks for it."""

    key: str
    combination: str
    reason: str
    remedy: str
    found: Callable[[Case], bool]

    def error(self, case: Case) -> ConfigError:
        """The row as a sentence about this run."""
        section, name = self.key.split(".")
        value = getattr(getattr(case.config, section), name)
        shown = str(value).lower() if isinstance(value, bool) else value
        return ConfigError(self.key, f"{shown} is not possible ({self.combination}): {self.reason}; {self.remedy}")


_PLAIN = "DeepSpeed has no float64, so fp64 runs in plain torch"
_TRACED = "torch.compile does not trace the collectives inside the layers"

REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "parallel.expert",
        "expert above 1",
        "the deepspeed backend does not split experts",
        "set it to 1",
        lambda case: case.parallel.expert > 1,
    ),
    Refusal(
        "parallel.context",
        "context above 1 with another objective than causal-lm",
        "labels of whole rows, token types and sources are not shared among processes",
        "set it to 1",
        lambda case: case.parallel.context > 1 and case.config.objective.kind != "causal-lm",
    ),
    Refusal(
        "deepspeed.zero_stage",
        "zero_stage above 0 with precision fp64",
        _PLAIN,
        "set zero_stage to 0",
        lambda case: case.fp64 and case.deepspeed.zero_stage > 0,
    ),
    Refusal(
        "deepspeed.torch_compile",
        "torch_compile with precision fp64",
        f"{_PLAIN}, whose float64 mode torch.compile does not see",
        "set torch_compile to false",
        lambda case: case.fp64 and case.deepspeed.torch_compile,
    ),
    Refusal(
        "deepspeed.zero_stage",
        "fsdp above 1 with zero_stage 0",
        "fsdp shards optimiser states, and ZeRO stage 0 shards nothing",
        "set zero_stage to 1, 2 or 3",
        lambda case: case.parallel.fsdp > 1 and case.deepspeed.zero_stage == 0,
    ),
    Refusal(
        "deepspeed.offload_optimizer",
        "offload_optimizer with zero_stage 0",
        "DeepSpeed offloads the optimiser states that ZeRO holds, and stage 0 has none",
        "set zero_stage to 1, 2 or 3, or offload_optimizer to none",
        lambda case: case.deepspeed.offload_optimizer != "none" and case.deepspeed.zero_stage == 0,
    ),
    Refusal(
        "deepspeed.offload_param",
        "offload_param with zero_stage below 3",
        "only ZeRO stage 3 takes parameters apart",
        "set zero_stage to 3, or offload_param to none",
        lambda case: case.deepspeed.offload_param != "none" and case.deepspeed.zero_stage < 3,
    ),
    Refusal(
        "training.loss_chunk",
        "loss_chunk in tokens with tensor above 1 and a head of its own",
        "AutoTP splits the head by vocabulary and gathers the logits of all tokens; a head tied to the embedding stays whole",
        "set it to auto or none, or tensor to 1",
        lambda case: (
            isinstance(case.config.training.loss_chunk, int) and case.parallel.tensor > 1 and not case.model.spec.tie_embeddings
        ),
    ),
    Refusal(
        "deepspeed.torch_compile",
        "torch_compile with tensor above 1",
        f"{_TRACED} of AutoTP",
        "set torch_compile to false, or tensor to 1",
        lambda case: case.deepspeed.torch_compile and case.parallel.tensor > 1,
    ),
    Refusal(
        "deepspeed.torch_compile",
        "torch_compile with context above 1",
        f"{_TRACED} of Ulysses",
        "set torch_compile to false, or context to 1",
        lambda case: case.deepspeed.torch_compile and case.parallel.context > 1,
    ),
    Refusal(
        "deepspeed.liger",
        "liger with precision fp64",
        "Liger's kernels compute in float32",
        "set liger to false",
        lambda case: case.deepspeed.liger and case.fp64,
    ),
    Refusal(
        "deepspeed.liger",
        "liger with a family that it has no kernels for",
        "liger-kernel replaces parts of the models in its own table",
        f"set liger to false, or train one of: {', '.join(sorted(LIGER_ACTIVATIONS))}",
        lambda case: case.deepspeed.liger and case.model.family not in LIGER_ACTIVATIONS,
    ),
    Refusal(
        "deepspeed.liger",
        "liger with an activation that it has no kernel for",
        "Liger's MLP computes silu, or for gemma, gemma2 and gemma3_text gelu_pytorch_tanh, whatever the model's config says",
        "set liger to false",
        lambda case: case.deepspeed.liger and case.model.spec.mlp.activation != LIGER_ACTIVATIONS.get(case.model.family),
    ),
    Refusal(
        "deepspeed.liger",
        "liger with torch_compile",
        "both make kernels of the same operations, and what they compute together has not been measured",
        "set one of them to false",
        lambda case: case.deepspeed.liger and case.deepspeed.torch_compile,
    ),
    Refusal(
        "deepspeed.liger",
        "liger with tensor or context above 1",
        "what Liger's kernels compute in layers that processes share has not been measured",
        "set liger to false, or tensor and context to 1",
        lambda case: case.deepspeed.liger and case.parallel.tensor * case.parallel.context > 1,
    ),
    Refusal(
        "parallel.tensor",
        "tensor above 1 with a family that AutoTP does not split",
        "AutoTP follows the tensor-parallel plan that transformers has for a model: encoders and encoder-decoders have none, "
        "experts are one stacked tensor that it does not cut, and gpt2 keeps its weights the other way round than its layers "
        "compute",
        f"set it to 1 and use fsdp or context, or train one of: {', '.join(sorted(AUTOTP_FAMILIES))}",
        lambda case: case.parallel.tensor > 1 and case.model.family not in AUTOTP_FAMILIES,
    ),
    Refusal(
        "parallel.tensor",
        "tensor that does not divide the attention heads and the key/value heads",
        "AutoTP gives every process whole heads, as many as any other",
        "use a divisor of both numbers of heads",
        lambda case: bool(case.attention.heads % case.parallel.tensor or case.attention.kv_heads % case.parallel.tensor),
    ),
    Refusal(
        "parallel.context",
        "context that does not divide the attention heads (of each tensor shard)",
        "Ulysses gives every process of a sequence whole heads, as many as any other",
        "use a divisor of the number of heads / tensor",
        lambda case: bool(case.attention.heads // case.parallel.tensor % case.parallel.context),
    ),
    Refusal(
        "parallel.context",
        "context that neither divides the key/value heads (of each tensor shard) nor is a multiple of them",
        "Ulysses gives every process whole key/value heads, or the same number of processes a copy of each",
        "use a divisor or a multiple of the number of key/value heads / tensor",
        lambda case: _uneven(case.attention.kv_heads // case.parallel.tensor, case.parallel.context),
    ),
    Refusal(
        "parallel.context",
        "context that does not divide data.sequence_length",
        "every process takes the same number of tokens of a sequence",
        "use a divisor of data.sequence_length",
        lambda case: bool(case.config.data.sequence_length % case.parallel.context),
    ),
)


def _uneven(heads: int, processes: int) -> bool:
    return heads % processes != 0 and processes % heads != 0


def refusals(case: Case) -> Iterable[ConfigError]:
    """Every row that the run asks for."""
    return (row.error(case) for row in REFUSALS if row.found(case))


def check_combinations(config: RunConfig, model: Model, processes: int | None) -> None:
    """ConfigError unless DeepSpeed can run `config` in so many processes (None: in as many as the mesh needs)."""
    for error in refusals(Case(config, model)):
        raise error
    if processes is not None:
        _check_processes(config.parallel, processes)


def _check_processes(parallel: ParallelConfig, processes: int) -> None:
    inner = parallel.tensor * parallel.context
    wanted = data_parallel(parallel, processes) * inner
    if wanted != processes:
        raise ConfigError(
            "parallel.data",
            f"data {parallel.data} x fsdp {parallel.fsdp} x context {parallel.context} x tensor {parallel.tensor} is a run of "
            f"{wanted} processes, but {processes} were started; use --processes {wanted} or data -1",
        )
