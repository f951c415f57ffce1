"""Tiny runs of every objective beside causal-lm: each family with each of its heads, every feature on, padded rows."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

from jaxllm.config import RunConfig
from jaxllm.parity.subject import Subject, examine
from tests.tiny import TINY, WORDLESS, tiny

LENGTH = 48
LEARNING_RATE = 1e-3
"""At 1e-2 a run of bert-single amplifies rounding, as control runs of 12 steps in fp64 show.  The transformers model ends up
7.5e-11 away from JAX in its parameters; JAX from initial weights that are moved by one rounding (a relative 2^-52, up or down)
ends up 7.4e-11 and 1.0e-10 away from itself.  It is the same element each time, in the embedding of a position that few
examples reach; every other tensor stays within 5e-13.  At 1e-3 the figures are 6e-14 and 8e-14."""
_ENCODER: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "layer_norm_eps": 1e-5,
}
_T5: dict[str, Any] = {
    "family": "t5",
    "d_model": 32,
    "d_kv": 10,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,  # shorter than a source
}
MODELS: dict[str, dict[str, Any]] = {
    # The padding token, which the last token of a row is told from, is the tokenizer's.
    **{family: {**tiny(family, initializer_range=0.3), "pad_token_id": None} for family in TINY},
    # Qwen2's positions turn faster than usual.  Its upper layer has a window of 6 tokens, and a classifier's last token is its
    # only query: with a rope_theta of 10000 the slowest pair of a head hardly turns over 5 positions, so a bias of the keys
    # adds almost the same to all scores and has almost no gradient there.  Gradients agreed to 7e-15 of the largest; the first
    # step of Adam divides each by its own size, and the bias was then off by 2e-11 to 5e-11.
    "qwen2": {
        **tiny("qwen2", initializer_range=0.3),
        "pad_token_id": None,
        "rope_parameters": {**TINY["qwen2"]["rope_parameters"], "rope_theta": 100.0},
    },
    "bert": {"family": "bert", "hidden_act": "gelu_new", **_ENCODER},
    "roberta": {"family": "roberta", "type_vocab_size": 1, **_ENCODER},
    "t5": _T5,
    "t5-1.1": {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}
TOKENIZERS: dict[str, dict[str, Any]] = {
    **{family: {"train": "bpe", "vocab_size": 320} for family in TINY},
    "bert": {"train": "wordpiece", "vocab_size": 320},
    "roberta": {"train": "bpe", "special_tokens": "roberta", "vocab_size": 320},
    "t5": {"train": "bpe", "special_tokens": "t5", "vocab_size": 400},
    "t5-1.1": {"train": "bpe", "special_tokens": "t5", "vocab_size": 400},
}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "masked-lm": {"kind": "masked-lm", "whole_words": True},
    "single": {"kind": "sequence-classification", "labels": ["short", "middling", "long"]},
    "multi": {
        "kind": "sequence-classification",
        "num_labels": 4,
        "problem_type": "multi_label_classification",
    },
    "regression": {"kind": "sequence-classification", "problem_type": "regression", "num_labels": 2},
    "words": {"kind": "token-classification", "labels": ["O", "B", "I"]},
    "seq2seq": {"kind": "seq2seq"},
    "spans": {"kind": "span-corruption"},
}
_PAIRED = ("seq2seq", "spans")


def _has(family: str, objective: str) -> bool:
    if family in TINY:
        some = ("single",) if family in WORDLESS else ("single", "words")
        return objective in (*some, "multi", "regression") if family == "llama" else objective in some
    return (objective in _PAIRED) == ("t5" in family)


CASES = [(family, objective) for family in MODELS for objective in OBJECTIVES if _has(family, objective)]


def write_examples(file: Path, objective: str) -> None:
    """Lines of a module of Python's as examples, with labels that follow from the text."""
    source = Path(inspect.getsourcefile(inspect) or "").read_text().splitlines()
    lines = [line.split() for line in source if 2 <= len(line.split()) <= 12 and len(line) < 60][:120]
    with file.open("w") as out:
        for number, words in enumerate(lines):
            row: dict[str, Any] = {"text": " ".join(words), "second": " ".join(lines[number - 1][:3])}
            row["label"] = {
                "single": ["short", "middling", 2][min(len(words) // 4, 2)],
                "multi": [label for label in range(4) if label in map(len, words)],
                "regression": [len(words) / 4 - 1, float(number % 3) - 1.0],
                "words": [("B", "O", "I")[len(word) % 3] for word in words],
            }.get(objective, 0)
            if objective == "words":
                row["text"] = words
            out.write(json.dumps(row) + "\n")


def config(family: str, objective: str, folder: Path, **changes: Any) -> RunConfig:
    """A run of a tiny model.  folder: for the data and what is made of it."""
    folder.mkdir(parents=True, exist_ok=True)
    source: dict[str, Any] = {"kind": "text", "files": inspect.getsourcefile(inspect), "document": "paragraph"}
    data: dict[str, Any] = {"source": source, "packing": "concatenate"}
    if objective == "spans":
        data["target_length"] = LENGTH // 2
    elif objective != "masked-lm":
        file = folder / f"{objective}.jsonl"
        write_examples(file, objective)
        source = {"kind": "jsonl", "files": str(file), "label_field": "label"}
        if objective == "seq2seq":
            source = {"kind": "jsonl", "files": str(file), "target_field": "second"}
        elif objective != "words":
            source["second_field"] = "second"
        data = {"source": source, "packing": "none", "truncate": True}
        if objective == "seq2seq":
            data["target_length"] = LENGTH // 2
    return RunConfig.model_validate(
        {
            "name": f"parity-{family}-{objective}",
            "model": MODELS[family],
            "objective": OBJECTIVES[objective],
            "data": {**data, "tokenizer": TOKENIZERS[family], "sequence_length": LENGTH, "cache_dir": str(folder)},
            "optimizer": {"learning_rate": LEARNING_RATE, "weight_decay": 0.1},
            "training": {"steps": 12, "global_batch": 4, "micro_batch": 2},
            **changes,
        }
    )


def subject(family: str, objective: str, folder: Path, **changes: Any) -> Subject:
    """The run as parity examines it: without dropout."""
    return examine(config(family, objective, folder, **changes), folder)
