"""A padding token that occurs in the text: neither backend lets its embedding learn from the inputs."""

from __future__ import annotations

import numpy as np
import pytest

from jaxllm.backend import create_probe
from jaxllm.parity.tolerances import TOLERANCES, relative_error
from jaxllm.state.initial import InitialWeights
from tests.distributed.deepspeed_cases import make_batch, make_run

PADDING = 7
EMBEDDING = "model.embed_tokens.weight"


@pytest.mark.parametrize("tied", [False, True])
def test_both_backends_leave_the_padding_row_to_the_output_head(tied: bool) -> None:
    run = make_run("llama-heads", precision="fp64", model={"pad_token_id": PADDING, "tie_word_embeddings": tied})
    plain = make_run("llama-heads", precision="fp64", model={"tie_word_embeddings": tied})
    batch = make_batch(0)
    batch.inputs[:, ::3] = PADDING
    gradients = {}
    for key, backend, of in (("jax", "jax", run), ("torch", "deepspeed", run), ("plain", "jax", plain)):
        probe = create_probe(backend)  # type: ignore[arg-type]
        probe.load(of, InitialWeights(run.model, run.config.seed))
        gradients[key] = probe.passes(batch).gradients
    for name, gradient in gradients["torch"].items():
        assert relative_error(gradients["jax"][name], gradient) <= TOLERANCES["fp64"].value, name
    row = gradients["jax"][EMBEDDING][PADDING]
    assert np.any(row) == tied
    assert np.abs(gradients["plain"][EMBEDDING][PADDING] - row).max() > 1e-6, "the token must matter to the test"
