"""JaxBackend through its protocol: steps, accumulation, the non-finite guard, dropout, evaluation, export."""

from __future__ import annotations

import logging
import re
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxllm.errors import BackendError, ConfigError
from jaxllm.families import flatten
from jaxllm.families.initialization import initial_values
from jaxllm.state import Progress
from tests.unit.jax_backend import cases


def test_accumulating_equals_one_large_batch(start):
    found = {}
    for micro_batch in (16, 4, 1):
        run = cases.make_run(training={"precision": "fp64", "micro_batch": micro_batch})
        found[micro_batch] = cases.take_steps(start(run), run, range(3))
    for micro_batch in (4, 1):
        assert found[micro_batch].losses == pytest.approx(found[16].losses, rel=1e-13)
        assert found[micro_batch].norms == pytest.approx(found[16].norms, rel=1e-12)
        for name, wanted in found[16].params.items():
            assert cases.relative(found[micro_batch].params[name], wanted) <= cases.PARAMETER_BOUND, name


def test_steps_equal_torch(start):
    """Loss, clipping, update: three steps of the transformers model under torch.optim.AdamW."""
    import torch

    run = cases.make_run(cases.GPT2, training={"precision": "fp64", "micro_batch": 8})
    reference = cases.Reference(run.model, "fp64")
    from jaxllm.state import TrainingState

    backend = start(run, TrainingState(Progress(), reference))
    ours = cases.take_steps(backend, run, range(3))
    decays = {name: rule.decays for name, rule, _ in flatten(run.model.rules)}
    named = dict(reference.module.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [named[name] for name in named if decays[name]], "weight_decay": run.config.optimizer.weight_decay},
            {"params": [named[name] for name in named if not decays[name]], "weight_decay": 0.0},
        ],
        lr=run.config.optimizer.learning_rate,
        betas=run.config.optimizer.betas,
        eps=run.config.optimizer.eps,
    )
    for step in range(3):
        optimizer.zero_grad()
        loss = reference.loss(cases.make_batch(step))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(named.values()), run.config.optimizer.clip_norm)
        optimizer.step()
        assert ours.losses[step] == pytest.approx(loss.item(), rel=1e-12)
        assert ours.norms[step] == pytest.approx(norm.item(), rel=1e-12)
    for name, parameter in named.items():
        pair = (cases.without_key_bias(name, side) for side in (ours.params[name], parameter.detach().numpy()))
        assert cases.relative(*pair) <= cases.PARAMETER_BOUND, name
        assert cases.relative(ours.exp_avg[name], optimizer.state[parameter]["exp_avg"].numpy()) <= 1e-11, name
        assert cases.relative(ours.exp_avg_sq[name], optimizer.state[parameter]["exp_avg_sq"].numpy()) <= 1e-11, name


def test_the_step_compiles_once_before_there_are_weights(start, caplog):
    run = cases.make_run()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        backend = start(run)
        started = _compiled(caplog.messages)
        cases.take_steps(backend, run, range(3))
        assert _compiled(caplog.messages).count("jit(step)") == 1
    assert started.index("jit(step)") < started.index("jit(init)"), "the moments come after"
    assert backend._started.train_step._cache_size() == 1


def _compiled(messages: list[str]) -> list[str]:
    """The programs that JAX says it has compiled, in order."""
    return [said.group(1) for said in map(re.compile(r"Finished XLA compilation of (\S+)").match, messages) if said]


def test_a_non_finite_step_leaves_everything_as_it_was(start):
    run = cases.make_run()
    backend = start(run)
    before = cases.take_steps(backend, run, [0])
    poisoned = cases.make_batch(1)
    poisoned.weights[0, 0] = np.inf
    result = backend.step(poisoned, cases.hyper_of(1, run))
    assert not np.isfinite(float(result.loss))
    state = backend.export(Progress(2))
    for found, wanted in (
        (state.params, before.params), (state.exp_avg, before.exp_avg), (state.exp_avg_sq, before.exp_avg_sq)
    ):  # fmt: skip
        for name, values in wanted.items():
            np.testing.assert_array_equal(found.read(name), values)
    assert np.isfinite(float(backend.step(cases.make_batch(2), cases.hyper_of(1, run)).loss))


def test_initial_weights_are_the_counter_based_ones_bit_for_bit(start):
    for model in (cases.LLAMA, cases.GPT2):
        run = cases.make_run(model)
        state = start(run, training=False).export(Progress())
        assert state.exp_avg is None
        assert list(state.params.names()) == [name for name, _, _ in flatten(run.model.rules)]
        for name, rule, _ in flatten(run.model.rules):
            wanted = initial_values(rule.init, run.config.seed, name, rule.shape)
            np.testing.assert_array_equal(state.params.read(name), wanted)
            assert state.params.shape(name) == rule.shape


def test_a_state_goes_in_and_out_bit_for_bit(start):
    """Hugging Face -> JAX on a sharded mesh -> Hugging Face, weights and both moments, whole and in slices."""
    for model in (cases.LLAMA, cases.GPT2):
        run = cases.make_run(model)
        backend = start(run)
        cases.take_steps(backend, run, range(2))
        state = backend.export(Progress(2, 2, 32, 700))
        sharded = start(
            cases.make_run(model, parallel={"data": 1, "fsdp": 4, "tensor": 2}, jax={"cpu_devices": 8}), state
        )  # fmt: skip
        again = sharded.export(state.progress)
        for before, after in (
            (state.params, again.params),
            (state.exp_avg, again.exp_avg),
            (state.exp_avg_sq, again.exp_avg_sq),
        ):
            for name in before.names():
                np.testing.assert_array_equal(after.read(name), before.read(name))
                cut = tuple(slice(1, max(2, size // 2)) for size in before.shape(name))
                np.testing.assert_array_equal(after.read(name, cut), before.read(name)[cut])


def test_pretrained_weights_are_read_from_their_folder(start, tmp_path):
    run = cases.make_run(cases.GPT2)
    reference = cases.Reference(run.model, "fp32")
    reference.module.save_pretrained(tmp_path)
    pretrained = replace(run, model=replace(run.model, pretrained=str(tmp_path)))
    state = start(pretrained, training=False).export(Progress())
    for name in state.params.names():
        np.testing.assert_array_equal(state.params.read(name), reference.read(name))


def test_evaluation_sums_over_batches_and_ragged_ends(start):
    run = cases.make_run(training={"precision": "fp64", "micro_batch": 4})
    reference = cases.Reference(run.model, "fp64")
    from jaxllm.state import TrainingState

    backend = start(run, TrainingState(Progress(), reference), training=False)
    batches = [cases.make_batch(1), cases.make_batch(2).select(0, 5)]
    result = backend.evaluate(iter(batches))
    tokens = sum(batch.target_tokens for batch in batches)
    wanted = sum(reference.loss(batch).item() * batch.target_tokens for batch in batches)
    assert result.target_tokens == tokens
    assert result.loss_sum == pytest.approx(wanted, rel=1e-12)
    assert start(run).evaluate([]).target_tokens == 0.0


def test_dropout_depends_on_seed_step_and_micro_batch_and_is_off_in_evaluation(start):
    dropped = {**cases.GPT2, "resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2}
    batch = cases.make_batch(0)

    def losses(seed: int, steps: int, **training: object) -> list[float]:
        run = cases.make_run(dropped, optimizer={"learning_rate": 0.0}, training=training)
        run = replace(run, config=run.config.model_copy(update={"seed": seed}))
        backend = start(run)
        found = [float(backend.step(batch, cases.hyper_of(step, run)).loss) for step in range(steps)]
        return [*found, backend.evaluate([batch]).loss_sum]

    first, again, other = losses(3, 2), losses(3, 2), losses(4, 2)
    assert first == again
    assert first[0] != first[1]
    assert first[0] != other[0]
    without = start(cases.make_run(cases.GPT2, optimizer={"learning_rate": 0.0})).evaluate([batch]).loss_sum
    assert first[2] == pytest.approx(without, rel=1e-6)
    # Two equal halves get different masks.
    half = batch.select(0, 8)
    fields = ((name, getattr(half, name)) for name in batch.__dataclass_fields__)
    doubled = type(batch)(**{name: None if rows is None else np.concatenate([rows] * 2) for name, rows in fields})
    run = cases.make_run(dropped, optimizer={"learning_rate": 0.0}, training={"micro_batch": 8})
    halves = float(start(run).step(doubled, cases.hyper_of(0, run)).loss)
    alone = cases.make_run(dropped, optimizer={"learning_rate": 0.0}, training={"global_batch": 8})
    assert halves != float(start(alone).step(half, cases.hyper_of(0, alone)).loss)


def test_dropout_keeps_the_mean_and_the_rate():
    from jaxllm.jax_backend.model.dropout import Site, dropout

    x = jax.numpy.ones((400, 500), jax.numpy.float32)
    y = np.asarray(dropout(x, 0.3, jax.random.key(0), Site.MLP_OUTPUT))
    assert abs((y == 0).mean() - 0.3) < 0.005
    np.testing.assert_allclose(y[y != 0], 1 / 0.7, rtol=1e-6)
    other = np.asarray(dropout(x, 0.3, jax.random.key(0), Site.EMBEDDING))
    assert (y != other).any()


def test_calls_out_of_order_are_refused(start):
    from jaxllm.jax_backend import JaxBackend

    with pytest.raises(BackendError, match="call start first"):
        JaxBackend().step(cases.make_batch(), cases.hyper_of(0, cases.make_run()))
    run = cases.make_run()
    with pytest.raises(BackendError, match="without an optimiser"):
        start(run, training=False).step(cases.make_batch(), cases.hyper_of(0, run))
    with pytest.raises(ValueError, match="does not fit the 16 rows"):
        start(run).step(cases.make_batch(rows=17), cases.hyper_of(0, run))


def test_one_process_has_all_rows_and_describes_itself(start):
    backend = start(cases.make_run())
    assert (backend.shard.index, backend.shard.count) == (0, 1)
    assert backend.is_main
    assert backend.any(True)
    assert not backend.any(False)
    backend.barrier("alone")
    memory = backend.memory_bytes()
    assert memory is not None
    assert memory > 2**20
    description = backend.device_description()
    assert description["devices"] == 1
    assert description["chip"] == "cpu"


def test_a_batch_that_cannot_be_divided_is_refused(start):
    with pytest.raises(ConfigError, match="global_batch"):
        start(cases.make_run(training={"global_batch": 6}, parallel={"data": 8}, jax={"cpu_devices": 8}))
