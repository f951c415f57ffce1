"""The keys of a family are those of its transformers config: the same names, the same defaults, the same meaning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from jaxllm.config.schema import ModelConfig, RunConfig
from jaxllm.errors import ConfigError
from jaxllm.families import FAMILIES, Model, Task, Vocabulary, architectures, check_sequence_length, resolve_model
from jaxllm.families.keys import ACTIVATIONS, BOOKKEEPING_KEYS
from jaxllm.families.rope import RopeSpec
from tests.tiny import TINY, tiny
from tests.unit.families.cases import CASES, GPT2, LLAMA

REFERENCES = {family: transformers.models.auto.configuration_auto.CONFIG_MAPPING[family] for family in FAMILIES}
ACTIVATION_KEYS = {
    "gpt2": "activation_function",
    "gemma2": "hidden_activation",
    "gemma3_text": "hidden_activation",
    "t5": "feed_forward_proj",
}


DECODERS = [family for family in FAMILIES if "causal-lm" in architectures(family)]


def model(**keys: Any) -> Model:
    task = Task(next(iter(architectures(keys.get("family", "llama")))))
    return resolve_model(ModelConfig.model_validate(keys), task=task)


def refused(tokenizer_size: int | None = None, /, **keys: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        resolve_model(ModelConfig.model_validate(keys), Vocabulary(tokenizer_size))
    return caught.value


def without_bookkeeping(config: transformers.PreTrainedConfig) -> dict[str, Any]:
    follows = {"dense_act_fn", "is_gated_act"} if config.model_type == "t5" else set()  # from feed_forward_proj
    spelt = {"num_local_experts": "num_experts"} if config.model_type == "qwen3_moe" else {}  # as published configs have it
    return {spelt.get(key, key): value for key, value in config.to_dict().items() if key not in BOOKKEEPING_KEYS | follows}


def test_every_family_is_in_the_table_of_tiny_models() -> None:
    assert TINY.keys() == set(DECODERS)


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_and_defaults_are_those_of_transformers(family: str) -> None:
    keys = FAMILIES[family].Keys().model_dump()
    keys.pop("decoder_start_token_id", None)  # a key of generation, which an encoder-decoder cannot do without
    assert keys == without_bookkeeping(REFERENCES[family]())


@pytest.mark.parametrize("name", CASES)
def test_described_model_is_the_same_in_transformers(name: str) -> None:
    """config.json as jaxllm writes it is a fixed point of transformers' reading and writing."""
    described = dict(model(**CASES[name]).huggingface_config)
    reference = REFERENCES[str(described["model_type"])](**{k: v for k, v in described.items() if k != "model_type"})
    assert without_bookkeeping(reference) == {k: v for k, v in described.items() if k not in BOOKKEEPING_KEYS}
    assert reference.architectures == described["architectures"]
    assert hasattr(transformers, reference.architectures[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_no_key_is_bookkeeping(family: str) -> None:
    # What says nothing of a decoder tells an encoder to be one, which is refused, and an encoder-decoder how to begin.
    assert BOOKKEEPING_KEYS & FAMILIES[family].Keys.model_fields.keys() <= {"is_decoder", "decoder_start_token_id"}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_activation_is_accepted(family: str) -> None:
    key = ACTIVATION_KEYS.get(family, "hidden_act")
    for name, activation in ACTIVATIONS.items():
        # transformers reads the "gelu" of the first Gemma's config files as what the model was trained with.
        expected = "gelu_tanh" if (family, name) == ("gemma", "gelu") else activation
        assert model(**{"family": family, key: name}).spec.mlp.activation == expected


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "t5"])  # which has no longest sequence
def test_longest_sequence_key(family: str) -> None:
    spec = model(**{"family": family, FAMILIES[family].MAX_POSITIONS_KEY: 77}).spec
    assert spec.max_positions + spec.position_offset == 77


def test_older_spellings_of_rope() -> None:
    old = model(**LLAMA, rope_theta=5e5, rope_scaling=None)
    assert old.spec.attention.rope == RopeSpec(5e5)
    assert old == model(**LLAMA, rope_parameters={"rope_theta": 5e5})
    assert model(**LLAMA, rope_parameters=None) == model(**LLAMA, rope_scaling={"type": "default"}) == model(**LLAMA)


def test_tokenizer_gives_what_the_run_file_leaves_open() -> None:
    known = Vocabulary(1000, end=3)
    resolved = resolve_model(ModelConfig.model_validate({"family": "llama"}), known)
    assert resolved.spec.vocab_size == 1000
    assert resolved.huggingface_config["bos_token_id"] == resolved.huggingface_config["eos_token_id"] == 3
    written = resolve_model(ModelConfig.model_validate({"family": "llama", "vocab_size": 2000, "eos_token_id": None}), known)
    assert written.spec.vocab_size == 2000
    assert written.huggingface_config["eos_token_id"] is None


# ------------------------------------------------------------------------------------------------------------- refusals


def test_unknown_family() -> None:
    assert (
        str(refused(family="lama"))
        == f"model.family: unknown family 'lama'; did you mean 'llama'? (allowed: {', '.join(sorted(FAMILIES))})"
    )


def test_misspelt_key_names_the_nearest() -> None:
    error = refused(**{**LLAMA, "num_atention_heads": 4})
    assert error.key == "model.num_atention_heads"
    assert error.message.startswith("unknown key; did you mean 'num_attention_heads'? (allowed: attention_bias, ")


def test_key_of_the_other_family() -> None:
    error = refused(**{**GPT2, "hidden_act": "silu"})
    assert error.key == "model.hidden_act"
    assert error.message.startswith("unknown key; ")


def test_wrong_type_is_not_converted() -> None:
    error = refused(**{**LLAMA, "num_attention_heads": "6"})
    assert str(error) == 'model.num_attention_heads: must be a whole number, not "6"'


def test_several_wrong_keys_are_all_reported() -> None:
    error = refused(**{**LLAMA, "hidden_size": -1, "rms_norm_eps": "x", "tie_word_embeddings": 1})
    assert str(error).splitlines() == [
        "model.hidden_size: must be at least 1, not -1",
        'model.rms_norm_eps: must be a number, not "x"',
        "model.tie_word_embeddings: must be true or false, not 1",
    ]


@pytest.mark.parametrize(
    ("keys", "key", "message"),
    [
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, "model.rope_parameters.rope_type",
         '"su" is not allowed; allowed: "default", "linear", "dynamic", "yarn", "longrope", "llama3"'),
        ({"rope_parameters": {"rope_type": "linear"}}, "model.rope_parameters", 'rope_type "linear" needs factor'),
        ({"rope_parameters": {"rope_theta": 1e4, "factor": 8.0}}, "model.rope_parameters",
         'factor says nothing with rope_type "default", which takes rope_theta; remove it'),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}}, "model",
         "short_factor has 1 numbers; heads that rotate 8 dimensions need 4"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "model",
         "the family rotates whole heads; remove partial_rotary_factor"),
        ({"hidden_act": "gelu_fast"}, "model.hidden_act",
         ('"gelu_fast" is not allowed; did you mean "gelu"? '
          '(allowed: "silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")')),
        ({"num_attention_heads": 5}, "model",
         "hidden_size 48 is not divisible by num_attention_heads 5; change one of them"),
        ({"num_key_value_heads": 4}, "model",
         ("num_attention_heads 6 is not divisible by num_key_value_heads 4; each key/value head serves the same number of "
          "query heads")),
        ({"head_dim": 7}, "model", "head_dim 7 is odd; rotary positions pair its dimensions"),
        ({"pad_token_id": -1}, "model", "pad_token_id -1 is not in the vocabulary of 103; leave it out or correct it"),
        ({"torch_dtype": "bfloat16"}, "model.torch_dtype", "says nothing about the model that is trained; remove it"),
    ],
)  # fmt: skip
def test_what_llama_refuses(keys: dict[str, Any], key: str, message: str) -> None:
    error = refused(**{**LLAMA, **keys})
    assert (error.key, error.message) == (key, message)


@pytest.mark.parametrize(
    ("family", "keys", "key", "message"),
    [
        ("phi3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "model",
         'rope_type "linear" is not one that the family has; allowed: "default", "longrope"'),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "model.attn_logit_softcapping",
         "50.0 is not supported; leave the key out"),
        ("gemma2", {"use_bidirectional_attention": True}, "model.use_bidirectional_attention",
         "true is not allowed; allowed: false"),
        ("gemma2", {"layer_types": ["full_attention"]}, "model", "layer_types names 1 layers, num_hidden_layers is 4"),
        ("gemma2", {"sliding_window": None}, "model",
         "layer_types has sliding_attention, but sliding_window is null; give the window's size"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 2}, "model.layer_types[0]",
         '"chunked_attention" is not allowed; did you mean "full_attention"? (allowed: "full_attention", "sliding_attention"'),
        ("olmo2", {"quantization_config": {"bits": 4}}, "model.quantization_config",
         "quantised weights are not supported; start from the checkpoint they were made from"),
        ("qwen2", {"auto_map": {"AutoModel": "x.Y"}}, "model.auto_map",
         "code that comes with a checkpoint is never run; remove auto_map if transformers' own qwen2 is this model"),
    ],
)  # fmt: skip
def test_what_other_decoders_refuse(family: str, keys: dict[str, Any], key: str, message: str) -> None:
    error = refused(**tiny(family, **keys))
    assert error.key == key
    assert error.message.startswith(message)


@pytest.mark.parametrize("key", ["scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"])
def test_what_gpt2_refuses(key: str) -> None:
    assert str(refused(**{**GPT2, key: True})) == f"model.{key}: true is not allowed; allowed: false"


def test_gpt2_heads() -> None:
    assert str(refused(**{**GPT2, "n_head": 7})) == "model: n_embd 48 is not divisible by n_head 7; change one of them"


def test_tokenizer_larger_than_the_vocabulary() -> None:
    error = refused(200, **LLAMA)
    assert error.key == "model.vocab_size"
    assert error.message == (
        "the model's vocabulary of 103 is smaller than the tokenizer's 200; set vocab_size to at least 200 or use a smaller "
        "tokenizer"
    )


def test_sequence_longer_than_the_positions() -> None:
    config = RunConfig.model_validate(
        {
            "name": "x",
            "model": LLAMA,
            "data": {"tokenizer": {"train": "bpe", "vocab_size": 103}, "sequence_length": 65},
            "optimizer": {"learning_rate": 1e-3},
            "training": {"steps": 1, "global_batch": 1},
        }
    )
    with pytest.raises(ConfigError) as caught:
        check_sequence_length(model(**LLAMA), config)
    assert str(caught.value) == (
        "data.sequence_length: 65 tokens do not fit into the model's 64 positions (max_position_embeddings); "
        "shorten it or raise model.max_position_embeddings"
    )


# ----------------------------------------------------------------------------------------------------------- model.from


def test_from_a_folder_of_transformers(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="needs the deepspeed extra")
    config = transformers.LlamaConfig(**{k: v for k, v in LLAMA.items() if k != "family"})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    loaded = model(**{"from": str(tmp_path)})
    assert loaded.pretrained == str(tmp_path)
    assert (loaded.spec, loaded.rules) == (model(**LLAMA).spec, model(**LLAMA).rules)


@pytest.mark.parametrize(
    ("config", "weights", "said"),
    [
        (None, True, "holds no config.json; give a folder that save_pretrained wrote"),
        ("{", True, "config.json cannot be read as JSON: "),
        ("[]", True, "config.json is of family None, which jaxllm does not have"),
        ('{"model_type": "mamba"}', True, "config.json is of family 'mamba', which jaxllm does not have"),
        ('{"model_type": "llama"}', False, "holds no *.safetensors weights; convert it with save_pretrained"),
        ('{"model_type": "llama", "quantization_config": {}}', True,
         "config.json: quantization_config: quantised weights are not supported; start from"),
    ],
)  # fmt: skip
def test_from_a_folder_that_cannot_be_used(tmp_path: Path, config: str | None, weights: bool, said: str) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    if weights:
        (tmp_path / "model.safetensors").touch()
    error = refused(**{"from": str(tmp_path)})
    assert error.key == "model.from"
    assert str(tmp_path) in error.message
    assert said in error.message


def test_from_ignores_what_changes_no_number(tmp_path: Path) -> None:
    config = {"model_type": "gpt2", "use_cache": False, "torch_dtype": "float16", "n_ctx": 1024, "summary_type": "x"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").touch()
    assert model(**{"from": str(tmp_path)}).spec == model(family="gpt2").spec


def test_tokenizer_larger_than_a_loaded_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (tmp_path / "model.safetensors").touch()
    error = refused(60000, **{"from": str(tmp_path)})
    assert str(error) == (
        "model.from: the model's vocabulary of 50257 is smaller than the tokenizer's 60000; use a smaller tokenizer"
    )


@pytest.mark.parametrize("name", ["not//a name", "/nowhere/at/all"])
def test_from_a_name_that_is_nothing(name: str) -> None:
    error = refused(**{"from": name})
    assert error.key == "model.from"
    assert error.message.startswith(f"{name!r} is neither a local folder nor a model the hub gives (")
    assert "\n" not in str(error)
