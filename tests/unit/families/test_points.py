"""The points of `jaxllm parity --find` lie where the transformers model of every decoder has modules."""

from __future__ import annotations

import pytest
import transformers

from jaxllm.config.schema import ModelConfig
from jaxllm.families import module_points, resolve_model
from jaxllm.probe import point_names
from tests.tiny import TINY, tiny

torch = pytest.importorskip("torch", reason="needs the deepspeed extra")


@pytest.mark.parametrize("family", TINY)
def test_every_point_has_a_module(family: str) -> None:
    model = resolve_model(ModelConfig.model_validate(tiny(family, vocab_size=96)))
    places = module_points(model)
    assert {*places, "logits"} == set(point_names(model.spec))
    with torch.device("meta"):
        reference = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**dict(model.huggingface_config))
        )
    for place in places.values():
        reference.get_submodule(place.module)
