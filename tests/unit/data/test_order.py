"""The order of an epoch is Grain's own, for every size, seed and epoch; and a permutation where Grain's is not."""

import grain
import numpy as np
import pytest

from jaxllm.data.order import shuffled


@pytest.mark.parametrize("seed", [0, 1234567, 2**32 - 1])
@pytest.mark.parametrize("size", [1, 2, 3, 594, 2**16 - 1, 2**16, 2**16 + 2, 1_000_003])
def test_equals_grain(size: int, seed: int) -> None:
    places = np.random.default_rng(size).integers(0, 3 * size, 12)
    reference = grain.MapDataset.range(size).shuffle(seed).repeat(3)
    np.testing.assert_array_equal(shuffled(places, size, seed), [reference[int(place)] for place in places])


@pytest.mark.parametrize("size", [1, 2, 594, 2**16, 2**16 + 1, 2**18 + 1])
def test_is_a_permutation(size: int) -> None:
    second_epoch = np.arange(size, 2 * size)
    np.testing.assert_array_equal(np.sort(shuffled(second_epoch, size, 7)), np.arange(size))


def test_an_index_of_grain_is_lost_at_a_power_of_two() -> None:
    """The reason for a larger block there; when this fails, Grain's order can be used as it is."""
    size = 2**16 + 1
    reference = grain.MapDataset.range(size).shuffle(7)
    assert reference[0] == reference[size - 1]
