"""Where weights come from: the initialiser, and folders written by transformers."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from jaxllm.backend import create_backend
from jaxllm.errors import CheckpointError
from jaxllm.families import flatten, resolve_model
from jaxllm.families.initialization import initial_values
from jaxllm.run import Run
from jaxllm.state.initial import InitialWeights, check_shapes, pretrained_weights
from jaxllm.state.training_state import Progress
from jaxllm.torch_backend.model import build_model
from jaxllm.torch_backend.transfer import read_flat
from tests.distributed.deepspeed_cases import MODELS, Arrays, make_run, materialise

CPU = torch.device("cpu")


def _pretrained_folder(family: str, folder: Path, dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor]:
    """A folder as transformers' own `save_pretrained` writes it, and its weights."""
    model = build_model(make_run(family).model, "eager", dtype, CPU)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(folder)
    return {name: parameter.detach().float() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", list(MODELS))
def test_a_run_starts_from_a_folder_that_transformers_wrote(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    expected = _pretrained_folder(family, tmp_path, dtype)
    config = make_run(family).config
    model = resolve_model(config.model.model_validate({"from": str(tmp_path)}))
    backend = create_backend("deepspeed")
    backend.start(Run(config, model, 10), None)
    started = materialise(backend.export(Progress()).params)
    backend.close()
    assert started.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(started[name], values.numpy())


def test_a_tied_weight_may_be_stored_under_its_other_name(tmp_path: Path) -> None:
    expected = _pretrained_folder("gpt2", tmp_path, torch.float32)
    stored = load_file(tmp_path / "model.safetensors")
    stored["lm_head.weight"] = stored.pop("transformer.wte.weight")
    save_file(stored, tmp_path / "model.safetensors")
    reader = pretrained_weights(make_run("gpt2").model, tmp_path)
    np.testing.assert_array_equal(reader.read("transformer.wte.weight"), expected["transformer.wte.weight"].numpy())


def test_missing_weights_are_listed(tmp_path: Path) -> None:
    _pretrained_folder("llama", tmp_path, torch.float32)
    stored = load_file(tmp_path / "model.safetensors")
    del stored["model.norm.weight"]
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks model\.norm\.weight"):
        pretrained_weights(make_run("llama").model, tmp_path)


def test_weights_of_another_shape_are_listed() -> None:
    model = make_run("llama").model
    wrong = materialise(InitialWeights(model, 0))
    wrong["model.norm.weight"] = np.zeros(3, np.float32)
    del wrong["lm_head.weight"]
    with pytest.raises(CheckpointError) as refused:
        check_shapes(model, Arrays(wrong))
    assert "model.norm.weight has shape [3] instead of [20]" in str(refused.value)
    assert "lm_head.weight is missing" in str(refused.value)


@pytest.mark.parametrize("family", list(MODELS))
def test_flat_slices_are_those_of_the_whole_tensor(family: str) -> None:
    model = make_run(family).model
    reader = InitialWeights(model, 5)
    for name, rule, _ in flatten(model.rules):
        whole = initial_values(rule.init, 5, name, rule.shape).reshape(-1)
        size = math.prod(rule.shape)
        for start, stop in ((0, size), (0, size // 3), (size // 3, size // 3 + 1), (size // 2, size)):
            np.testing.assert_array_equal(read_flat(reader, name, start, stop).numpy(), whole[start:stop])
