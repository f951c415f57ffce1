"""The searches for remedies and for the fastest settings, over a compiler that answers at once."""

import pytest

from jaxllm.errors import ConfigError
from jaxllm.families import resolve_model
from jaxllm.planning.tpu import remedies
from jaxllm.planning.tpu.prediction import Prediction
from jaxllm.planning.tpu.remedies import find_remedies
from jaxllm.planning.tpu.study import Study
from jaxllm.planning.tpu.text import remedy_lines, trial_lines
from jaxllm.planning.tpu.topology import parse_topology
from jaxllm.planning.tpu.tuning import tune
from tests.unit.planning.test_tpu_models import make_config

WHERE = parse_topology("v5e:2x2")
GIB = 2**30
OWN_BLOCK = 1024


def prediction(speed):
    times = dict.fromkeys(("step", "compute", "attention", "expert", "exposed", "overlapped"), 1.0)
    return Prediction(
        **{f"{name}_seconds": value for name, value in times.items()},
        cycles=1,
        tokens_per_second_per_chip=speed,
        mfu=speed / 1e4,
        by_kind={},
        by_source={},
        by_phase={},
        collectives=(),
        host_bytes=0.0,
        matmul_flops=1.0,
        kernel_flops=0.0,
        expected_matmul_flops=1.0,
        assumed={},
    )


@pytest.fixture
def compiler(monkeypatch):
    """`compiler(needed, speed)`: a compiler by two functions of the run file; what it was asked is in its result."""

    def install(needed, speed):
        asked = []

        def study(config, topology):
            asked.append(config)
            if config.parallel.fsdp == 3:
                raise ConfigError("parallel.fsdp", "3 does not divide")
            size, capacity = needed(config), topology.generation.chip.memory_bytes
            found = prediction(speed(config)) if size <= capacity else None
            return Study(
                config, resolve_model(config.model), topology, None, 1, 1, 1, size <= capacity, int(size), capacity,
                None, found, 1.0, "splash", OWN_BLOCK, None, None, None, 0.0,
            )  # fmt: skip

        monkeypatch.setattr(remedies, "study", study)
        return asked

    return install


def gib(config):
    """Less with more shards, smaller micro-batches and less kept."""
    kept = {"none": 8, "dots": 6, "offload": 3, "full": 2}.get(config.jax.remat, 5)
    state = 8 / config.parallel.fsdp / {"none": 1, "moments": 2, "all": 4}[config.jax.offload_optimizer]
    return GIB * (state + kept * (config.training.micro_batch or 4))


def rate(config):
    kept = {"none": 4, "dots": 3.5, "offload": 2, "full": 3}.get(config.jax.remat, 3.2)
    return kept * 1000 + (config.training.micro_batch or 4)


def test_one_change_is_enough_and_the_fastest_comes_first(compiler):
    asked = compiler(gib, rate)
    config = make_config(parallel={"data": 1, "fsdp": 4}, training={"steps": 1, "global_batch": 16, "micro_batch": 2})
    found = find_remedies(config, WHERE, report=lambda _: None)
    assert [dict(remedy.changes) for remedy in found] == [
        {"training.micro_batch": 1},
        {"jax.remat": "full"},
        {"jax.remat": "offload"},
    ]
    assert all(remedy.fits for remedy in found)
    assert len(asked) == 5  # every single change, none added up
    text = "\n".join(remedy_lines(found, WHERE))
    assert "--set training.micro_batch=1" in text
    assert text.index("micro_batch") < text.index("remat=full")


def test_changes_are_added_up_and_needless_ones_taken_away(compiler):
    compiler(lambda config: gib(config) * 6, rate)
    config = make_config(parallel={"data": 1, "fsdp": 4}, training={"steps": 1, "global_batch": 16, "micro_batch": 2})
    (found,) = find_remedies(config, WHERE, report=lambda _: None)
    assert found.fits
    assert found.changes["training.micro_batch"] == 1
    assert found.changes["jax.remat"] == "full"
    for key in found.changes:
        section = key.split(".")[0]
        fewer = {name: value for name, value in found.changes.items() if not name.startswith(section)}
        assert not fewer or not remedies.attempt(config, WHERE, fewer, lambda _: None).fits


def test_when_nothing_fits_it_is_said_by_how_much(compiler):
    compiler(lambda config: gib(config) * 1000, rate)
    found = find_remedies(make_config(parallel={"data": 1, "fsdp": 4}), WHERE, report=lambda _: None)
    assert len(found) == 1
    (line,) = [line for line in remedy_lines(found, WHERE) if line]
    assert "no change makes it fit" in line
    assert "GiB more per chip" in line


def test_tuning_spends_its_trials_and_ranks_them(compiler):
    asked = compiler(gib, rate)
    config = make_config(training={"steps": 1, "global_batch": 16})
    found = tune(config, WHERE, trials=9, report=lambda _: None)
    assert len(found) == len(asked) == 9
    assert len({trial.model_dump_json() for trial in asked}) == 9, "a trial was made twice"
    speeds = [trial.speed for trial in found]
    assert speeds == sorted(speeds, reverse=True)
    assert found[0].fits
    text = "\n".join(trial_lines(found, WHERE))
    assert text.startswith("best of 9 trials on v5e:2x2")
    assert f"{found[0].speed:,.0f}" in text.splitlines()[2]


def test_tuning_does_not_compile_the_block_that_the_kernel_takes_anyway(compiler):
    asked = compiler(gib, rate)
    data = {"tokenizer": {"train": "bpe", "vocab_size": 512}, "sequence_length": 4096}
    config = make_config(training={"steps": 1, "global_batch": 16}, data=data)
    found = tune(config, WHERE, trials=9, report=lambda _: None)
    assert len(found) == len(asked) == 9
    blocks = [trial.jax.attention_block for trial in asked]
    assert [block for block in blocks if block is not None] == [512, 2048]
    assert blocks[-1] is None, "the trial that is left goes to another setting"


def test_tuning_falls_back_to_what_needs_least(compiler):
    compiler(lambda config: gib(config) * 3.9, rate)
    found = tune(make_config(), WHERE, trials=40, report=lambda _: None)
    assert found[0].fits
    assert found[0].changes["jax.remat"] == "full"
    assert found[0].changes["training.micro_batch"] == 1


def test_tuning_says_when_nothing_fits(compiler):
    compiler(lambda config: gib(config) * 1000, rate)
    found = tune(make_config(), WHERE, trials=3, report=lambda _: None)
    assert list(trial_lines(found, WHERE)) == ["none of 3 trials fits on v5e:2x2"]
