"""A run file and a topology in, what is known of the compiled step out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxllm.config import RunConfig, resolve_batch, tokens_per_step
from jaxllm.errors import ConfigError
from jaxllm.families import Model, Vocabulary, resolve_model, task_of
from jaxllm.metrics.flops import flops_per_token
from jaxllm.planning.tpu.compiler import CompiledStep, compile_step
from jaxllm.planning.tpu.expected import Rows, expected_matmul_flops
from jaxllm.planning.tpu.hlo import parse
from jaxllm.planning.tpu.kernels import AttentionShape
from jaxllm.planning.tpu.memory import MemoryDivision
from jaxllm.planning.tpu.prediction import Prediction, TpuCosts, predict
from jaxllm.planning.tpu.program import read_program
from jaxllm.planning.tpu.ragged import GRADIENT
from jaxllm.planning.tpu.topology import Topology


@dataclass(frozen=True)
class Study:
    """A compiled step, understood.  needed_bytes: of one device; capacity_bytes: what it has.  tokens: of one step.

    attention_block: queries and keys of the attention kernel's blocks, where all its passes take the same number of both.
    memory and prediction: None when the step does not fit.  model_flops: of one step over all devices.  processor_seconds: of
    tracing and compiling, for machines that do other things too.
    """

    config: RunConfig
    model: Model
    topology: Topology
    mesh: Mapping[str, int] | None
    micro_batch: int | None
    accumulation: int | None
    tokens: int
    fits: bool
    needed_bytes: int | None
    capacity_bytes: int
    memory: MemoryDivision | None
    prediction: Prediction | None
    model_flops: float
    attention: str | None
    attention_block: int | None
    trace_seconds: float | None
    compile_seconds: float | None
    processor_seconds: float | None
    wall_seconds: float

    def to_json(self) -> dict[str, Any]:
        """The study as plain data; the run file only as far as the step depends on it."""
        config = self.config
        return {
            "name": config.name,
            "family": self.model.family,
            "parameters": self.model.parameters,
            "topology": str(self.topology),
            "chips": self.topology.chips,
            "devices": self.topology.devices,
            "mesh": self.mesh,
            "global_batch": config.training.global_batch,
            "micro_batch": self.micro_batch,
            "accumulation": self.accumulation,
            "sequence_length": config.data.sequence_length,
            "precision": config.training.precision,
            "jax": config.jax.model_dump(mode="json"),
            "attention": self.attention,
            "attention_block": self.attention_block,
            "fits": self.fits,
            "needed_bytes": self.needed_bytes,
            "capacity_bytes": self.capacity_bytes,
            "memory": None if self.memory is None else self.memory.to_json(),
            "model_flops": self.model_flops,
            "prediction": None if self.prediction is None else self.prediction.to_json(),
            "trace_seconds": self.trace_seconds,
            "compile_seconds": self.compile_seconds,
            "processor_seconds": self.processor_seconds,
            "wall_seconds": self.wall_seconds,
        }


def vocabulary_of(config: RunConfig) -> int | None:
    """The vocabulary as far as the run file tells it without its tokenizer being made or downloaded.

    ConfigError when it does not.
    """
    if config.model.from_ is not None or "vocab_size" in config.model.huggingface:
        return None
    if config.data.tokenizer.vocab_size is not None:
        return config.data.tokenizer.vocab_size
    folder = Path(str(config.data.tokenizer.from_)).expanduser()
    if folder.is_dir():
        from jaxllm.data.tokenizer import Tokenizer

        return Tokenizer.load(str(folder)).vocab_size
    raise ConfigError("model.vocab_size", f"is not given, and the tokenizer {folder} is not on this machine; give it")


def study(config: RunConfig, topology: Topology, *, keep: Path | None = None) -> Study:
    """Compile the run's step for a topology and read the program.  keep: a folder for the compiler's files.

    JaxllmError for what the run file says and cannot be on this topology, and when there is no compiler.
    """
    vocab_size = vocabulary_of(config)
    model = resolve_model(config.model, Vocabulary(vocab_size), weights=False, task=task_of(config.objective))
    compiled = compile_step(config, topology, vocab_size, keep=keep)
    length, tokens = config.data.sequence_length, tokens_per_step(config)
    model_flops = flops_per_token(model.spec, length, config.data.target_length).training * tokens
    answer = compiled.answer
    plan = resolve_batch(config, int(answer["data_parallel"])) if compiled.fits else None
    blocks = answer.get("attention_blocks")
    return Study(
        config=config,
        model=model,
        topology=topology,
        mesh=answer.get("mesh"),
        micro_batch=None if plan is None else plan.micro_batch,
        accumulation=None if plan is None else plan.accumulation,
        tokens=tokens,
        fits=compiled.fits,
        needed_bytes=compiled.peak_bytes,
        capacity_bytes=topology.generation.chip.memory_bytes,
        memory=compiled.memory,
        prediction=_predict(compiled, config, model, topology, tokens, model_flops),
        model_flops=model_flops,
        attention=None if not compiled.fits else "splash" if blocks else "xla",
        attention_block=_block_of(blocks),
        trace_seconds=answer.get("trace_seconds"),
        compile_seconds=answer.get("compile_seconds"),
        processor_seconds=answer.get("processor_seconds"),
        wall_seconds=compiled.wall_seconds,
    )


def _block_of(blocks: Mapping[str, Any] | None) -> int | None:
    sizes = {blocks[name] for name in ("query", "key", "back_query", "back_key")} if blocks else set()
    return int(sizes.pop()) if len(sizes) == 1 else None


def _predict(
    compiled: CompiledStep, config: RunConfig, model: Model, topology: Topology, tokens: int, model_flops: float
) -> Prediction | None:
    if compiled.program is None:
        return None
    answer, length = compiled.answer, config.data.sequence_length
    shape = _attention_shape(answer.get("attention_blocks"), model, length, int(answer["mesh"]["context"]))
    costs = TpuCosts(topology, answer["coordinates"], shape, answer["mesh"]["expert"])
    program = read_program(parse(compiled.program), answer["mesh"], costs)
    rows = Rows(config.training.global_batch, length, config.data.target_length)
    expected = expected_matmul_flops(
        model.spec,
        rows,
        topology.devices,
        config.jax.remat,
        shape is not None,
        answer["mesh"]["tensor"],
        expert_kernel=any(kernel.name == GRADIENT for kernel in program.kernels),
    )
    return predict(program, topology, tokens, model_flops, expected)


def _attention_shape(blocks: Mapping[str, Any] | None, model: Model, length: int, ring: int) -> AttentionShape | None:
    if blocks is None:
        return None
    windows = tuple(attention.window for attention in model.spec.attentions)
    forward, backward = (blocks["query"], blocks["key"]), (blocks["back_query"], blocks["back_key"])
    return AttentionShape(length, model.spec.attention.causal, windows, forward, backward, blocks["fused"], ring)
