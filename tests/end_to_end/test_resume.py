"""Every checkpoint can be resumed: on the same backend bit for bit, on another mesh, process count, ZeRO stage or backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from jaxllm.checkpointing import open_state
from jaxllm.config.schema import Precision
from jaxllm.generation.load import load_trained
from jaxllm.parity.tolerances import TOLERANCES, relative_error
from jaxllm.state import TrainingState
from tests.end_to_end.runs import STEPS, Site

STOPPED_AT = 4


def _final_state(site: Site, name: str) -> TrainingState:
    trained = load_trained(site.path(name), STEPS, print)
    assert trained.checkpoint is not None
    assert trained.checkpoint.progress.step == STEPS
    return open_state(trained.checkpoint.folder, trained.run.model)


def _tensors(state: TrainingState) -> dict[str, np.ndarray[Any, Any]]:
    assert state.exp_avg is not None
    assert state.exp_avg_sq is not None
    readers = {"params": state.params, "exp_avg": state.exp_avg, "exp_avg_sq": state.exp_avg_sq}
    return {f"{part}/{name}": reader.read(name) for part, reader in readers.items() for name in reader.names()}


def assert_same_bits(site: Site, name: str, reference: str) -> None:
    assert site.losses(name) == site.losses(reference)
    assert site.losses(name, "validation") == site.losses(reference, "validation")
    found, wanted = _tensors(_final_state(site, name)), _tensors(_final_state(site, reference))
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        np.testing.assert_array_equal(found[key], value, err_msg=key, strict=True)


def _assert_same_trajectory(site: Site, name: str, reference: str, precision: Precision) -> None:
    bound = TOLERANCES[precision]
    for split in ("train", "validation"):
        found, wanted = site.losses(name, split), site.losses(reference, split)
        assert found.keys() == wanted.keys()
        for step, loss in wanted.items():
            assert found[step] == pytest.approx(loss, rel=bound.trajectory_loss), (split, step)
    found_state, wanted_state = _final_state(site, name), _final_state(site, reference)
    for parameter in wanted_state.params.names():
        error = relative_error(found_state.params.read(parameter), wanted_state.params.read(parameter))
        assert error <= bound.trajectory_parameters, parameter


def _resume(site: Site, source: str, name: str, *arguments: object, **changes: Any) -> None:
    config = site.write(name, **changes)
    site.fork(source, name, STOPPED_AT, config)
    done = site.run("train", config, "--resume", *arguments)
    assert f"going on after step {STOPPED_AT}" in done.stdout


@pytest.mark.parametrize("backend", ["jax", "deepspeed"])
def test_same_backend_continues_bit_for_bit(shared_site: Site, finished: Callable[..., str], backend: str) -> None:
    reference = finished(backend)
    _resume(shared_site, reference, f"{backend}-again", "--backend", backend)
    assert_same_bits(shared_site, f"{backend}-again", reference)


@pytest.mark.parametrize("precision", ["fp64", "fp32", pytest.param("bf16", marks=pytest.mark.nightly)])
@pytest.mark.parametrize(("first", "second"), [("jax", "deepspeed"), ("deepspeed", "jax")])
def test_the_other_backend_goes_on(
    shared_site: Site, finished: Callable[..., str], first: str, second: str, precision: Precision
) -> None:
    name = f"{first}-to-{second}-{precision}"
    _resume(shared_site, finished(first, precision), name, "--backend", second, training={"precision": precision})
    if precision == "bf16":  # no bound of its own: rounding to 8 bits differs between any two programs
        assert sorted(shared_site.losses(name)) == list(range(1, STEPS + 1))
        return
    _assert_same_trajectory(shared_site, name, finished(first, precision), precision)
    assert not list((shared_site.path(name) / "checkpoints").glob(".*"))


@pytest.mark.parametrize("second_stage", [2, 3])
def test_one_process_to_two_at_another_zero_stage(shared_site: Site, finished: Callable[..., str], second_stage: int) -> None:
    name = f"zero-{second_stage}"
    arguments = ("--backend", "deepspeed", "--processes", 2)
    _resume(shared_site, finished("deepspeed"), name, *arguments, deepspeed={"zero_stage": second_stage})
    _assert_same_trajectory(shared_site, name, finished("deepspeed"), "fp32")


def test_zero_2_on_two_processes_to_zero_3_on_one_and_to_jax(shared_site: Site, finished: Callable[..., str]) -> None:
    first = shared_site.write("zero-2-first", deepspeed={"zero_stage": 2})
    shared_site.run("train", first, "--backend", "deepspeed", "--processes", 2)
    _assert_same_trajectory(shared_site, "zero-2-first", finished("deepspeed"), "fp32")
    _resume(shared_site, "zero-2-first", "zero-3-one", "--backend", "deepspeed", deepspeed={"zero_stage": 3})
    _assert_same_trajectory(shared_site, "zero-3-one", finished("deepspeed"), "fp32")
    _resume(shared_site, "zero-2-first", "zero-2-to-jax", "--backend", "jax")
    _assert_same_trajectory(shared_site, "zero-2-to-jax", finished("deepspeed"), "fp32")


def test_autotp_with_offload_to_jax_and_to_ulysses(shared_site: Site, finished: Callable[..., str]) -> None:
    two = ("--backend", "deepspeed", "--processes", 2)
    offload = {"zero_stage": 2, "offload_optimizer": "cpu"}
    first = shared_site.write("autotp", parallel={"tensor": 2}, deepspeed=offload)
    shared_site.run("train", first, *two)
    _assert_same_trajectory(shared_site, "autotp", finished("jax"), "fp32")
    _resume(shared_site, "autotp", "autotp-to-jax", "--backend", "jax")
    _assert_same_trajectory(shared_site, "autotp-to-jax", finished("jax"), "fp32")
    _resume(shared_site, "autotp", "ulysses", *two, parallel={"context": 2}, deepspeed={"zero_stage": 3})
    _assert_same_trajectory(shared_site, "ulysses", finished("jax"), "fp32")


def test_eight_devices_to_one_and_to_two_processes(shared_site: Site, finished: Callable[..., str]) -> None:
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    changes: dict[str, Any] = {"parallel": mesh, "jax": {"cpu_devices": 8}, "training": {"micro_batch": 2}}
    shared_site.run("train", shared_site.write("mesh-8", **changes))
    _assert_same_trajectory(shared_site, "mesh-8", finished("jax"), "fp32")
    _resume(shared_site, "mesh-8", "mesh-8-to-1")
    _assert_same_trajectory(shared_site, "mesh-8-to-1", finished("jax"), "fp32")
    two = {"parallel": {"fsdp": 2}, "jax": {"cpu_devices": 2}, "training": {"micro_batch": 2}}
    _resume(shared_site, "mesh-8", "mesh-8-to-2x2", "--processes", 2, **two)
    _assert_same_trajectory(shared_site, "mesh-8-to-2x2", finished("jax"), "fp32")


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(shared_site: Site, finished: Callable[..., str]) -> None:
    reference = finished("deepspeed")
    config = shared_site.write("damaged")
    shared_site.fork(reference, "damaged", 8, config)
    weights = shared_site.path("damaged") / "checkpoints/step-00000008/weights/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    done = shared_site.run("train", config, "--resume", "--backend", "deepspeed")
    assert "step-00000008 is damaged: the checksum of weights/model.safetensors does not match" in done.stderr
    assert "going on after step 4" in done.stdout
    assert_same_bits(shared_site, "damaged", reference)


def test_a_changed_run_is_refused_until_allowed(shared_site: Site, finished: Callable[..., str]) -> None:
    config = shared_site.write("changed", optimizer={"learning_rate": 1e-3})
    shared_site.fork(finished("jax"), "changed", STOPPED_AT, config)
    refused = shared_site.run("train", config, "--resume", check=False)
    assert refused.returncode == 1
    assert "optimizer.learning_rate (was 0.003, now 0.001)" in refused.stderr
    assert "--allow-changed optimizer.learning_rate" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    shared_site.run("train", config, "--resume", "--allow-changed", "optimizer.learning_rate")
    assert shared_site.metrics("changed")[-1]["step"] == STEPS


def test_resuming_a_complete_run_says_so(shared_site: Site, finished: Callable[..., str]) -> None:
    config = shared_site.write("complete")
    shared_site.fork(finished("jax"), "complete", STEPS, config)
    assert "already complete" in shared_site.run("train", config, "--resume").stdout
    assert_same_bits(shared_site, "complete", "jax-fp32")
