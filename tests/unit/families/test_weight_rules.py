"""The rule tables: exactly the weights of the transformers model, and rearrangements that lose nothing."""

from __future__ import annotations

from typing import Any

import einops
import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.config.schema import ModelConfig
from jaxllm.families import Model, WeightRule, flatten, resolve_model
from tests.unit.families.cases import CASES

torch = pytest.importorskip("torch", reason="needs the deepspeed extra")


def model(name: str) -> Model:
    return resolve_model(ModelConfig.model_validate(CASES[name]))


def reference(described: dict[str, Any]) -> Any:
    config = transformers.AutoConfig.for_model(**described)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", CASES)
def test_names_shapes_and_counts_are_those_of_transformers(name: str) -> None:
    mine = model(name)
    torch_model = reference(dict(mine.huggingface_config))
    theirs = {key: tuple(parameter.shape) for key, parameter in torch_model.named_parameters()}
    assert {key: rule.shape for key, rule, _ in flatten(mine.rules)} == theirs
    assert mine.parameters == sum(parameter.numel() for parameter in torch_model.parameters())


@pytest.mark.parametrize("name", CASES)
def test_aliases_are_the_tied_names(name: str) -> None:
    mine = model(name)
    torch_model = reference(dict(mine.huggingface_config))
    # The state dict also holds the second name of a tied weight; with the aliases the tables are complete.
    names = {key for rule in mine.rules for key in (*rule.names, *rule.aliases)}
    assert names == set(torch_model.state_dict())


@pytest.mark.parametrize("name", CASES)
def test_decay_is_on_matrices_and_embeddings_only(name: str) -> None:
    mine = model(name)
    torch_model = reference(dict(mine.huggingface_config))
    norms = {
        f"{path}.{key}"
        for path, module in torch_model.named_modules()
        if "Norm" in type(module).__name__
        for key, _ in module.named_parameters(recurse=False)
    }
    decayed = {key for key, rule, _ in flatten(mine.rules) if rule.decays}
    expected = {
        key
        for key, parameter in torch_model.named_parameters()
        if parameter.dim() >= 2 and key not in norms and not key.endswith(".bias")
    }
    assert decayed == expected


@pytest.mark.parametrize("name", CASES)
def test_flax_paths_are_unique_and_shapes_hold(name: str) -> None:
    mine = model(name)
    paths = [path for rule in mine.rules for path in rule.paths]
    assert len(paths) == len(set(paths))
    for rule in mine.rules:
        parts = rule.to_flax(np.zeros(rule.shape, np.float32))
        assert len(parts) == len(rule.paths)
        for part, axes, shape in zip(parts, rule.axes, rule.flax_shapes, strict=True):
            assert shape == (part.shape if rule.layers is None else (rule.layers, *part.shape))
            assert len(axes) == len(shape)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int8])
@pytest.mark.parametrize("name", CASES)
def test_there_and_back_is_bitwise(name: str, dtype: type[np.generic]) -> None:
    generator = np.random.default_rng(0)
    for rule in model(name).rules:
        tensor = np.frombuffer(generator.bytes(int(np.prod(rule.shape)) * np.dtype(dtype).itemsize), dtype).reshape(rule.shape)
        parts = rule.to_flax(tensor)
        assert sorted(np.concatenate([part.ravel() for part in parts]).tobytes()) == sorted(tensor.tobytes())
        back = rule.to_huggingface(*parts)
        assert back.shape == tensor.shape
        assert back.tobytes() == tensor.tobytes()
        again = rule.to_flax(back)
        assert all(one.tobytes() == other.tobytes() for one, other in zip(parts, again, strict=True))


def test_rules_read_torch_tensors_too() -> None:
    for rule in model("gpt2").rules:
        tensor = torch.randn(rule.shape)
        for mine, theirs in zip(rule.to_flax(tensor.numpy()), rule.to_flax(tensor), strict=True):
            assert np.array_equal(mine, np.asarray(theirs))


def test_what_a_kernel_computes_is_what_the_linear_layer_computes() -> None:
    """The rearranged kernels, used as the Flax model uses them, give the numbers of torch's layers."""
    mine = model("llama-head-dim")
    rules = {rule.name.rpartition("self_attn.")[2]: rule for rule in mine.rules if "self_attn" in rule.name}
    x_BE = np.random.default_rng(1).standard_normal((5, mine.spec.hidden_size))
    query = np.random.default_rng(2).standard_normal(rules["q_proj.weight"].shape)
    (kernel_EHD,) = rules["q_proj.weight"].to_flax(query)
    expected = torch.nn.functional.linear(torch.tensor(x_BE), torch.tensor(query)).view(5, 6, 10).numpy()
    assert np.allclose(np.einsum("be,ehd->bhd", x_BE, kernel_EHD), expected, rtol=1e-13)
    output = np.random.default_rng(3).standard_normal(rules["o_proj.weight"].shape)
    (kernel_HDE,) = rules["o_proj.weight"].to_flax(output)
    joined = torch.nn.functional.linear(torch.tensor(expected).flatten(1), torch.tensor(output)).numpy()
    assert np.allclose(np.einsum("bhd,hde->be", expected, kernel_HDE), joined, rtol=1e-12)


def test_gpt2_splits_query_key_value_as_transformers_does() -> None:
    mine = model("gpt2")
    rule = next(rule for rule in mine.rules if rule.name.endswith("c_attn.weight"))
    fused = np.random.default_rng(4).standard_normal(rule.shape)
    for part, expected in zip(rule.to_flax(fused), torch.tensor(fused).split(48, dim=1), strict=True):
        assert np.array_equal(einops.rearrange(part, "e h d -> e (h d)"), expected.numpy())


ALL_RULES = [(name, rule) for name in CASES for rule in model(name).rules]


@st.composite
def slices(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[slice, ...]:
    cuts = []
    for size in shape:
        start = draw(st.integers(0, size - 1))
        cuts.append(slice(start, draw(st.integers(start + 1, size))))
    return tuple(cuts)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), case=st.sampled_from(range(len(ALL_RULES))))
def test_reading_a_slice_is_slicing_the_whole(data: st.DataObject, case: int) -> None:
    rule: WeightRule = ALL_RULES[case][1]
    whole = np.arange(np.prod(rule.shape), dtype=np.int64).reshape(rule.shape)
    path = data.draw(st.integers(0, len(rule.paths) - 1))
    flax = rule.to_flax(whole)[path]
    index = data.draw(slices(flax.shape))
    assert np.array_equal(rule.read_slice(lambda source: whole[source], path, index), flax[index])


@pytest.mark.parametrize(
    ("case", "name", "index", "expected"),
    [
        ("llama", "embed_tokens", (slice(3, 5), slice(0, 48)), (slice(3, 5), slice(0, 48))),
        ("llama", "q_proj", (slice(0, 48), slice(2, 4), slice(0, 8)), (slice(16, 32), slice(0, 48))),
        ("llama", "q_proj", (slice(5, 7), slice(0, 6), slice(0, 8)), (slice(0, 48), slice(5, 7))),
        ("llama", "q_proj", (slice(0, 48), slice(0, 6), slice(1, 3)), (slice(0, 48), slice(0, 48))),
        ("llama", "down_proj", (slice(10, 20), slice(0, 24)), (slice(0, 24), slice(10, 20))),
        ("gpt2", "c_attn.weight", (slice(4, 8), slice(0, 6), slice(0, 8)), (slice(4, 8), slice(0, 144))),
    ],
)
def test_a_slice_reads_as_little_as_it_can(case: str, name: str, index: tuple[slice, ...], expected: tuple[slice, ...]) -> None:
    rule = next(rule for rule in model(case).rules if name in rule.name)
    whole = np.arange(np.prod(rule.shape)).reshape(rule.shape)
    asked: list[tuple[slice, ...]] = []

    def reader(source: tuple[slice, ...]) -> np.ndarray[Any, Any]:
        asked.append(source)
        return whole[source]

    rule.read_slice(reader, 0, index)
    assert asked == [expected]
