"""Counter-based initial weights: a function of seed, name and index alone, with the distribution transformers asks for."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.config.schema import ModelConfig
from jaxllm.families import flatten, initialization, resolve_model
from jaxllm.families.initialization import Initializer, initial_values
from tests.unit.families.cases import CASES

torch = pytest.importorskip("torch", reason="needs the deepspeed extra")

NORMAL = Initializer("normal", 0.02)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), shape=st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple), seed=st.integers(0, 2**40))
def test_a_slice_is_the_slice_of_the_whole(data: st.DataObject, shape: tuple[int, ...], seed: int) -> None:
    index = []
    for size in shape:
        start = data.draw(st.integers(0, size))
        index.append(slice(start, data.draw(st.integers(start, size))))
    init = data.draw(
        st.sampled_from([NORMAL, Initializer("normal", 1.0, zero_row=0), Initializer("ones"), Initializer("zeros")])
    )
    whole = initial_values(init, seed, "name", shape)
    part = initial_values(init, seed, "name", shape, index)
    assert part.dtype == whole.dtype == np.float32
    assert part.shape == whole[tuple(index)].shape
    assert part.tobytes() == whole[tuple(index)].tobytes()


@pytest.mark.parametrize("chunk", [1, 3, 4, 1000])
def test_how_much_is_computed_at_once_changes_nothing(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    whole = initial_values(NORMAL, 0, "a", (50, 7))
    part = initial_values(NORMAL, 0, "a", (50, 7), (slice(3, 31), slice(1, 6)))
    monkeypatch.setattr(initialization, "_CHUNK", chunk)
    assert np.array_equal(initial_values(NORMAL, 0, "a", (50, 7)), whole)
    assert np.array_equal(initial_values(NORMAL, 0, "a", (50, 7), (slice(3, 31), slice(1, 6))), part)


def test_open_slices() -> None:
    whole = initial_values(NORMAL, 0, "a", (6, 5))
    assert np.array_equal(initial_values(NORMAL, 0, "a", (6, 5), (slice(None), slice(2, None))), whole[:, 2:])
    assert np.array_equal(initial_values(NORMAL, 0, "a", (6, 5), (slice(-2, None), slice(None))), whole[-2:])


def test_seed_and_name_matter_and_shape_does_not() -> None:
    values = initial_values(NORMAL, 0, "a", (8, 4))
    assert not np.array_equal(values, initial_values(NORMAL, 1, "a", (8, 4)))
    assert not np.array_equal(values, initial_values(NORMAL, 0, "b", (8, 4)))
    assert np.array_equal(values.ravel(), initial_values(NORMAL, 0, "a", (2, 16)).ravel())


def test_distribution_is_normal() -> None:
    values = initial_values(NORMAL, 0, "a", (1000, 1000)).ravel().astype(np.float64)
    count = values.size
    # Five standard errors of each moment of a normal sample.
    assert abs(values.mean()) < 5 * 0.02 / np.sqrt(count)
    assert abs(values.std() / 0.02 - 1) < 5 / np.sqrt(2 * count)
    assert abs(scipy.stats.skew(values)) < 5 * np.sqrt(6 / count)
    assert abs(scipy.stats.kurtosis(values)) < 5 * np.sqrt(24 / count)
    assert scipy.stats.kstest(values[:100_000] / 0.02, "norm").pvalue > 1e-4
    neighbours = np.corrcoef(values[:-1], values[1:])[0, 1]
    assert abs(neighbours) < 5 / np.sqrt(count)


def test_parameters_are_independent() -> None:
    one, other = (initial_values(NORMAL, 0, f"layers.{i}", (500, 500)).ravel() for i in range(2))
    assert abs(np.corrcoef(one, other)[0, 1]) < 5 / np.sqrt(one.size)


def test_first_values_never_change() -> None:
    """Written down once: runs that were started with an older jaxllm must start the same with a newer one."""
    values = initial_values(Initializer("normal", 1.0), 0, "model.norm.weight", (6,))
    expected = [-1.61592531, -0.25621146, -0.623005271, -0.159901813, 0.286765069, -0.057981357]
    assert np.allclose(values, np.array(expected, np.float32), rtol=2e-7, atol=0)


def test_padding_row_starts_at_zero() -> None:
    init = Initializer("normal", 0.02, zero_row=3)
    values = initial_values(init, 0, "a", (5, 4))
    assert not values[3].any()
    assert np.array_equal(np.delete(values, 3, 0), np.delete(initial_values(NORMAL, 0, "a", (5, 4)), 3, 0))


@pytest.mark.parametrize("name", CASES)
def test_deviations_are_those_of_transformers(name: str) -> None:
    """Each kind of weight has the standard deviation that transformers gives it, measured on a model it initialised."""
    mine = resolve_model(ModelConfig.model_validate(CASES[name]))
    torch.manual_seed(0)
    described = dict(mine.huggingface_config)
    reference = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**described))
    theirs = dict(reference.named_parameters())
    for key, rule, _ in flatten(mine.rules):
        values = theirs[key].detach().numpy()
        if rule.init.kind != "normal":
            assert np.array_equal(values, initial_values(rule.init, 0, key, rule.shape)), key
            continue
        # Six standard errors of a deviation estimated from as many numbers.
        assert abs(values.std() / rule.init.std - 1) < 6 / np.sqrt(2 * values.size) + 1 / rule.shape[0], key
        if rule.init.zero_row is not None:
            assert not values[rule.init.zero_row].any()
