"""The tokenizer: trained, loaded, saved for transformers, and streamed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers

from jaxllm.data.special_tokens import END_OF_TEXT
from jaxllm.data.tokenizer import StreamDecoder, Tokenizer
from jaxllm.errors import ConfigError, DataError

HARD = [
    "",
    "def f(x):\n    return  x\n\n\n",
    "é 日本語 😀\u200d🔥",
    "\r\n\t\x00 end ",
    f"before {END_OF_TEXT} after",
    " leading",
]


@pytest.fixture(scope="module")
def tokenizer(texts: list[str]) -> Tokenizer:
    return Tokenizer.train(texts, 500)


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    return folder


# ------------------------------------------------------------------------------------------------------------- trained


def test_trained(tokenizer: Tokenizer, texts: list[str]) -> None:
    assert tokenizer.vocab_size == 500
    assert tokenizer.eos_token == END_OF_TEXT
    assert tokenizer.eos_id == 0
    for text in [*texts, *HARD]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    # It has learned something: fewer tokens than bytes.
    assert sum(map(len, tokenizer.encode_batch(texts))) < 0.6 * sum(len(text.encode()) for text in texts)


def test_training_is_the_same_in_every_process(tokenizer: Tokenizer, texts: list[str], tmp_path: Path) -> None:
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    script = (
        "import json, sys; from pathlib import Path; from jaxllm.data.tokenizer import Tokenizer;"
        "texts = json.loads(Path(sys.argv[1]).read_text());"
        "sys.stdout.write(Tokenizer.train(iter(texts), 500).backend.to_str())"
    )
    for _ in range(2):
        run = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "texts.json")], check=True, capture_output=True, text=True
        )
        assert run.stdout == tokenizer.backend.to_str()


def test_little_text_gives_a_smaller_vocabulary() -> None:
    assert 257 <= Tokenizer.train(["ab ab ab"], 5000).vocab_size < 300


def test_vocabulary_without_room_for_the_bytes() -> None:
    with pytest.raises(ConfigError, match="use at least 257") as caught:
        Tokenizer.train(["a"], 256)
    assert caught.value.key == "data.tokenizer.vocab_size"


# -------------------------------------------------------------------------------------------------------------- loaded


def test_saved_and_loaded(tokenizer: Tokenizer, folder: Path, tmp_path: Path) -> None:
    loaded = Tokenizer.load(str(folder))
    assert loaded.backend.to_str() == tokenizer.backend.to_str()
    assert (loaded.eos_token, loaded.eos_id, loaded.vocab_size) == (END_OF_TEXT, 0, 500)
    loaded.save(tmp_path / "again")
    assert {path.name: path.read_text() for path in (tmp_path / "again").iterdir()} == {
        path.name: path.read_text() for path in folder.iterdir()
    }


@pytest.mark.parametrize("model_type", [None, "llama", "gpt2"])
def test_transformers_loads_the_saved_folder(tokenizer: Tokenizer, texts: list[str], tmp_path: Path, model_type: str) -> None:
    """As it is, also beside the config of a model whose own tokenizer class is another."""
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path)
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == tokenizer.vocab_size
    assert (theirs.eos_token_id, theirs.bos_token_id, theirs.pad_token_id) == (0, 0, 0)
    for text in [*texts, *HARD]:
        tokens = tokenizer.encode(text)
        assert theirs.encode(text) == tokens
        assert theirs.decode(tokens) == text
    assert theirs.decode([0, *tokenizer.encode("text")], skip_special_tokens=True) == "text"


def test_roberta_has_the_papers_special_tokens(texts: list[str], tmp_path: Path) -> None:
    """Numbers and names as in its dictionary; texts begin with <s> and end with </s>; there is no <|endoftext|> of GPT-2."""
    from transformers import AutoTokenizer, RobertaConfig, RobertaTokenizer

    tokenizer = Tokenizer.train(texts, 500, special_tokens="roberta")
    tokenizer.save(tmp_path)
    theirs, published = AutoTokenizer.from_pretrained(tmp_path), RobertaConfig()
    model = json.loads(tokenizer.backend.to_str())["model"]
    roberta = RobertaTokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])
    roles = {"bos_token": 0, "cls_token": 0, "pad_token": 1, "eos_token": 2, "sep_token": 2, "unk_token": 3, "mask_token": 4}
    for role, number in roles.items():
        assert tokenizer.special_id(role) == getattr(theirs, f"{role}_id") == getattr(roberta, f"{role}_id") == number
        assert getattr(theirs, role) == getattr(roberta, role)
    numbers = (published.bos_token_id, published.pad_token_id, published.eos_token_id)
    vocabulary = tokenizer.vocabulary
    assert (vocabulary.begin, vocabulary.padding, vocabulary.end) == numbers == (0, 1, 2)
    assert tokenizer.backend.token_to_id(END_OF_TEXT) is None
    for text in texts[:3]:
        assert theirs(text)["input_ids"] == roberta(text)["input_ids"] == [0, *tokenizer.encode(text), 2]
        assert theirs(text, "b")["input_ids"] == roberta(text, "b")["input_ids"]
    # Where a word is hidden, the blank before it is hidden as well.
    for written in (theirs.encode("a <mask> b"), theirs.encode("a<mask> b")):
        assert written == [0, *tokenizer.encode("a"), 4, *tokenizer.encode(" b"), 2]


def test_folders_that_name_no_roles_have_those_of_the_whole_convention(tmp_path: Path) -> None:
    """RoBERTa's vocabulary holds GPT-2's special token as well."""
    names = ["<s>", "<pad>", "</s>", "<unk>", "<|endoftext|>", "<mask>"]
    Backend(models.BPE({name: number for number, name in enumerate(names)}, [])).save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(str(tmp_path))
    assert (tokenizer.eos_id, tokenizer.special_id("bos_token"), tokenizer.special_id("pad_token")) == (2, 0, 1)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", {"eos_token": "b"}),
        ("tokenizer_config.json", {"eos_token": {"content": "b", "lstrip": False}}),
        ("special_tokens_map.json", {"eos_token": "b"}),
        ("generation_config.json", {"eos_token_id": [98, 99]}),
        ("config.json", {"eos_token_id": 98}),
    ],
)
def test_end_of_text_token_is_found_where_folders_name_it(tmp_path: Path, file: str, content: object) -> None:
    Backend(models.BPE({chr(code): code for code in range(128)}, [])).save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(str(tmp_path)).eos_id is None
    (tmp_path / file).write_text(json.dumps(content))
    assert Tokenizer.load(str(tmp_path)).eos_id == ord("b")


def test_settings_that_would_change_the_tokens_are_switched_off(tokenizer: Tokenizer, tmp_path: Path) -> None:
    backend = Backend.from_str(tokenizer.backend.to_str())
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    backend.save(str(tmp_path / "tokenizer.json"))
    text = "a text of more than three tokens"
    assert Tokenizer.load(str(tmp_path)).encode_batch([text]) == [tokenizer.encode(text)]


def test_bad_folders(tmp_path: Path) -> None:
    def message(name: Path | str) -> str:
        with pytest.raises(DataError) as caught:
            Tokenizer.load(str(name))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "there is no tokenizer folder" in message(tmp_path / "none")
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "tokenizer.model").write_bytes(b"x")
    assert "convert it once with transformers" in message(tmp_path / "slow")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "tokenizer.json").write_text("{")
    assert "is not a tokenizer" in message(tmp_path / "damaged")
    Backend(models.BPE({"a": 0}, [])).save(str(tmp_path / "damaged" / "tokenizer.json"))
    (tmp_path / "damaged" / "tokenizer_config.json").write_text("{")
    assert "tokenizer_config.json is not valid JSON" in message(tmp_path / "damaged")


def test_hub_name_without_a_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DataError, match="the tokenizer someone/something is neither a local folder nor readable from the hub"):
        Tokenizer.load("someone/something")


# ------------------------------------------------------------------------------------------------------------ streamed


def sentencepiece_like() -> Tokenizer:
    """Leading-space tokens and bytes as a last resort, as Llama 2's tokenizer decodes them."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocab |= {piece: 256 + number for number, piece in enumerate(("▁Hello", "▁world", "▁", "é", "s"))}
    backend = Backend(models.BPE(vocab, [], byte_fallback=True))
    backend.normalizer = normalizers.Prepend("▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(backend, None)


def streamed(tokenizer: Tokenizer, tokens: list[int], skip: bool = True) -> tuple[list[str], str]:
    decoder = StreamDecoder(tokenizer, skip)
    pushed = [decoder.push(token) for token in tokens]
    return pushed, decoder.flush()


def test_characters_come_out_whole(tokenizer: Tokenizer) -> None:
    text = "a é 日本語 😀\u200d🔥 b"
    pushed, rest = streamed(tokenizer, tokenizer.encode(text))
    assert "".join(pushed) == text
    assert rest == ""
    assert not [part for part in pushed if "\ufffd" in part]
    assert len([part for part in pushed if part]) > 5


def test_an_incomplete_end_is_kept_back_until_the_flush(tokenizer: Tokenizer) -> None:
    pushed, rest = streamed(tokenizer, [*tokenizer.encode("ok "), *tokenizer.encode("😀")[:-1]])
    assert "".join(pushed) == "ok "
    assert rest == "\ufffd"


@pytest.mark.parametrize("skip", [False, True])
def test_streaming_any_tokens_gives_what_decoding_gives(tokenizer: Tokenizer, skip: bool) -> None:
    """Random tokens are mostly not UTF-8."""
    generator = np.random.default_rng(0)
    for _ in range(100):
        tokens = generator.integers(0, tokenizer.vocab_size, 100).tolist()
        pushed, rest = streamed(tokenizer, tokens, skip)
        assert "".join(pushed) + rest == tokenizer.decode(tokens, skip)


def test_streaming_a_decoder_that_looks_at_its_neighbours() -> None:
    tokenizer = sentencepiece_like()
    generator = np.random.default_rng(1)
    tokens = [256, 257, *"日".encode(), 260, 258, 259, 257]
    assert tokenizer.decode(tokens) == "Hello world日s é world"
    assert "".join(streamed(tokenizer, tokens)[0]) == tokenizer.decode(tokens)
    for _ in range(50):
        tokens = generator.integers(256, 261, 40).tolist()
        pushed, rest = streamed(tokenizer, tokens)
        assert "".join(pushed) + rest == tokenizer.decode(tokens)
