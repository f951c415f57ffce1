"""The planner against what XLA, torch and DeepSpeed really do; `benchmarks.planner` has many more cases."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.planner.cases import BOUND, CASES, FLOPS_BOUND, Case
from benchmarks.planner.compare import compare
from benchmarks.planner.flops import compare_one
from jaxllm.config import RunConfig
from jaxllm.families import Model, resolve_model, task_of
from jaxllm.planning.deepspeed_memory import deepspeed_memory
from jaxllm.planning.jax_memory import jax_memory
from jaxllm.planning.setting import Setting, setting_of


def named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


@pytest.mark.parametrize("name", ["llama, full", "gpt2, none", "llama, dots"])
def test_jax_memory_is_within_a_tenth_of_what_xla_says(name: str) -> None:
    assert abs(compare(named(name))["error"]) <= BOUND


@pytest.mark.parametrize("name", ["llama, stage 0, bf16", "gpt2, stage 2, bf16"])
def test_deepspeed_memory_is_within_a_tenth_of_what_torch_allocates(name: str) -> None:
    assert abs(compare(named(name))["error"]) <= BOUND


@pytest.mark.parametrize("name", ["llama 1B", "mixtral 8x7b", "t5 base"])
def test_flops_are_within_two_hundredths_of_what_xla_counts(name: str) -> None:
    lines = compare_one(name)
    assert len(lines) == 2
    assert all(abs(line["error"]) <= FLOPS_BOUND for line in lines)


# ----------------------------------------------------------------------------------------------- what must hold everywhere


def setting(case: Case, backend: str = "jax") -> tuple[Model, Setting]:
    config = RunConfig.model_validate(case.config())
    attention = "splash" if backend == "jax" else "sdpa"
    model = resolve_model(config.model, task=task_of(config.objective))
    return model, setting_of(config, backend, case.devices, attention)


def test_each_remat_policy_saves_more_than_the_one_before() -> None:
    model, base = setting(named("llama 100M, fsdp 8"))
    peaks = [jax_memory(model, replace(base, remat=remat)).peak for remat in ("none", "dots", "full")]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == 3


def test_names_count_what_they_name_and_the_host_holds_what_goes_there() -> None:
    model, base = setting(named("llama 100M, fsdp 8"))
    full, named_norm, offloaded = (
        jax_memory(model, replace(base, remat=remat)) for remat in ("full", ("mlp_norm",), ("mlp_norm@host",))
    )
    norm = 4 * base.tokens * model.spec.hidden_size * model.spec.layers  # fp32
    saved = named_norm.fullest.parts["activations"] - full.fullest.parts["activations"]
    assert saved == norm
    assert offloaded.host == norm
    assert offloaded.peak == full.peak + 2 * norm / model.spec.layers  # of the layer at work, and of the next one


def test_fsdp_divides_the_state_and_offload_takes_it_away() -> None:
    model, base = setting(named("llama 100M, fsdp 8"))
    parts = jax_memory(model, base).fullest.parts
    assert parts["moments"] == pytest.approx(8 * model.parameters / 8, rel=0.001)
    moved = jax_memory(model, replace(base, offload_optimizer="moments"))
    assert moved.fullest.parts["moments"] == 0
    assert moved.host == parts["moments"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_each_zero_stage_keeps_less_between_steps(precision: str) -> None:
    model, base = setting(replace(named("llama, stage 1"), precision=precision), "deepspeed")
    kept = []
    for stage in (0, 1, 2, 3):
        memory = deepspeed_memory(model, replace(base, zero_stage=stage))
        kept.append(sum(memory.moments[0].parts[part] for part in ("parameters", "moments")))
    assert kept[0] > kept[1] >= kept[2] > kept[3]


def test_autotp_cuts_projections_and_the_head_but_neither_embeddings_nor_norms() -> None:
    model, base = setting(named("llama, stage 0"), "deepspeed")
    halved = replace(base, parallel=base.parallel.model_copy(update={"tensor": 5}))
    whole, cut = (deepspeed_memory(model, each).moments[0].parts["parameters"] for each in (base, halved))
    table = 4 * model.spec.vocab_size * model.spec.hidden_size
    norms = 4 * (2 * model.spec.layers + 1) * model.spec.hidden_size
    assert cut == pytest.approx(table + norms + (whole - table - norms) / 5)


@pytest.mark.parametrize("name", ["mixtral 8x7b, fsdp 8 x expert 8", "bert, masked-lm, data 4", "t5 base, fsdp 4"])
def test_every_kind_of_model_has_a_memory(name: str) -> None:
    model, base = setting(named(name))
    peaks = [jax_memory(model, replace(base, remat=remat)).peak for remat in ("none", "dots", "full")]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == 3
