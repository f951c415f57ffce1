"""Finding a model's weights in checkpoints that transformers wrote, with and without a head, tied or not."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from safetensors import safe_open

from jaxllm.config.schema import ModelConfig
from jaxllm.families import flatten, resolve_model, stored_names
from tests.unit.families.cases import CASES

pytest.importorskip("torch", reason="needs the deepspeed extra")


def tensors(folder: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(folder / "model.safetensors", "numpy") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - not a mapping


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "gpt2-untied"])
def test_every_weight_is_found(tmp_path: Path, name: str, head: bool) -> None:
    model = resolve_model(ModelConfig.model_validate(CASES[name]))
    config = transformers.AutoConfig.for_model(**dict(model.huggingface_config))
    builder = transformers.AutoModelForCausalLM if head else transformers.AutoModel
    builder.from_config(config).save_pretrained(tmp_path)
    stored = tensors(tmp_path)
    found = stored_names(model, stored)
    missing = {key for key, _, _ in flatten(model.rules)} - found.keys()
    assert missing == ({"lm_head.weight"} if not head and not model.spec.tie_embeddings else set())
    assert sorted(found.values()) == sorted(stored)
    shapes = {key: rule.shape for key, rule, _ in flatten(model.rules)}
    assert all(stored[theirs] == shapes[mine] for mine, theirs in found.items())


def test_a_tied_weight_under_its_other_name() -> None:
    model = resolve_model(ModelConfig.model_validate(CASES["llama-tied"]))
    assert stored_names(model, {"lm_head.weight"}) == {"model.embed_tokens.weight": "lm_head.weight"}
