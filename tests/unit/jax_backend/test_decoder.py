"""The decoder's logits are those of the full forward pass."""

from __future__ import annotations

import numpy as np
import pytest

from jaxllm.data.batch import Batch
from jaxllm.state import Progress, TrainingState
from tests.unit.jax_backend import cases


def full_logits(reference, tokens):
    inputs = np.asarray([tokens], np.int32)
    ones = np.ones_like(inputs)
    positions = np.arange(len(tokens), dtype=np.int32)[None]
    return reference.logits(Batch(inputs, ones, ones.astype(np.float32), positions, ones)).detach().numpy()[0]


@pytest.mark.parametrize(
    ("family", "mesh"), [*((family, "one") for family in cases.FAMILIES), ("llama", "eight"), ("gpt2", "eight")]
)
def test_prefill_and_decode_equal_the_full_forward_pass(start, family, mesh):
    parallel = {"data": 1} if mesh == "one" else {"data": 2, "fsdp": 2, "tensor": 2}
    run = cases.make_run(
        cases.FAMILIES[family],
        training={"precision": "fp64"},
        parallel=parallel,
        jax={"cpu_devices": 1 if mesh == "one" else 8},
    )
    reference = cases.Reference(run.model, "fp64")
    decoder = start(run, TrainingState(Progress(), reference), training=False).decoder(40)
    tokens = np.random.default_rng(0).integers(0, 96, 40).tolist()
    wanted = full_logits(reference, tokens)
    # The logits leave the device as float32.
    for prompt in (1, 5, 16, 17):
        np.testing.assert_allclose(decoder.prefill(tokens[:prompt]), wanted[prompt - 1], rtol=1e-6, atol=1e-6)
        for index in range(prompt, 22):
            np.testing.assert_allclose(decoder.decode(tokens[index]), wanted[index], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(decoder.prefill(tokens), wanted[-1], rtol=1e-6, atol=1e-6)
    # Buckets of 16, 32 and 40 tokens, and single tokens.
    assert decoder._run._cache_size() == 4


def test_lengths_that_do_not_fit_are_refused(start):
    decoder = start(cases.make_run(), training=False).decoder(4)
    with pytest.raises(ValueError, match="prefill comes before decode"):
        decoder.decode(1)
    for prompt in ([], [1] * 5):
        with pytest.raises(ValueError, match="does not fit"):
            decoder.prefill(prompt)
    decoder.prefill([1, 2, 3])
    assert decoder.decode(1).dtype == np.float32
    with pytest.raises(ValueError, match="already has the 4 tokens"):
        decoder.decode(1)
