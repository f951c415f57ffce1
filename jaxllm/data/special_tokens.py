"""The special tokens of the tokenizers trained here: the names, numbers and templates of the models that made them usual."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_ALPHABET = 1000  # characters, as BERT's trainer has it
END_OF_TEXT = "<|endoftext|>"
_SENTINELS = tuple(f"<extra_id_{number}>" for number in range(100))


@dataclass(frozen=True)
class Convention:
    """Special tokens of one kind of model.

    tokens: in the order of their numbers, from 0.  roles: role (`pad_token`, ...) -> token.  single, pair: templates in the
    notation of `tokenizers`, or None where nothing is put around a text.  extra: special tokens without a role.
    token_types: whether the model tells the texts of a pair apart, so that transformers is to hand out their types.
    mask_takes_blank: whether the mask token, written out in a text, stands for the blank before it as well.
    """

    tokens: tuple[str, ...]
    roles: Mapping[str, str]
    single: str | None = None
    pair: str | None = None
    extra: tuple[str, ...] = ()
    token_types: bool = False
    mask_takes_blank: bool = False

    def number(self, role: str) -> int | None:
        """The number of the token that has a role, which a tokenizer trained here gives it; None where none has."""
        token = self.roles.get(role)
        return None if token is None else self.tokens.index(token)

    def companions(self) -> dict[str, str]:
        """The files beside tokenizer.json that transformers reads the roles from."""
        special: dict[str, Any] = dict(self.roles)
        if self.extra:
            special["additional_special_tokens"] = list(self.extra)
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **special,
            "clean_up_tokenization_spaces": False,
            "add_prefix_space": False,
        }
        if self.token_types:
            settings["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
        return {
            "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
            "special_tokens_map.json": json.dumps(special, indent=2) + "\n",
        }


CONVENTIONS: Mapping[str, Convention] = {
    "gpt2": Convention((END_OF_TEXT,), dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)),
    "bert": Convention(
        ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
        {
            "unk_token": "[UNK]",
            "sep_token": "[SEP]",
            "pad_token": "[PAD]",
            "cls_token": "[CLS]",
            "mask_token": "[MASK]",
        },
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        token_types=True,
    ),
    "roberta": Convention(
        ("<s>", "<pad>", "</s>", "<unk>", "<mask>"),
        {
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "sep_token": "</s>",
            "pad_token": "<pad>",
            "cls_token": "<s>",
            "mask_token": "<mask>",
        },
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        mask_takes_blank=True,  # in byte-level BPE the blank is part of the word that is hidden
    ),
    "t5": Convention(
        ("<pad>", "</s>", "<unk>", *_SENTINELS),
        {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
        single="$A </s>",
        pair="$A </s> $B </s>",
        extra=_SENTINELS,
    ),
}


def train_bpe(texts: Iterable[str], vocab_size: int, convention: Convention, progress: bool) -> Any:
    """A byte-level BPE (Sennrich et al., arXiv:1508.07909; bytes as in GPT-2) as a `tokenizers.Tokenizer`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    mask = convention.roles.get("mask_token") if convention.mask_takes_blank else None
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(each, lstrip=each == mask, normalized=False, special=True) for each in convention.tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=progress,
    )
    backend.train_from_iterator(texts, trainer)
    return with_template(backend, convention)


def train_wordpiece(texts: Iterable[str], vocab_size: int, convention: Convention, progress: bool) -> Any:
    """BERT's lower-case WordPiece (arXiv:1810.04805) as a `tokenizers.Tokenizer`; the same texts always give the same one.

    The trainer of `tokenizers` numbers the pieces that continue a word in the order of a hash table, which differs from
    process to process, and breaks ties by these numbers.  Here they are handed to it, sorted, before it begins.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    lines: list[str] = []
    unknown = convention.roles["unk_token"]
    counts: Counter[str] = Counter()
    for text in texts:
        lines.append(" ".join(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))))
        counts.update(lines[-1])
    del counts[" "]
    most = sorted(counts, key=lambda character: (-counts[character], character))
    alphabet = sorted(most[: min(_ALPHABET, (vocab_size - len(convention.tokens)) // 2)])
    continuing = [f"##{character}" for character in alphabet]
    trained = Tokenizer(models.WordPiece(unk_token=unknown))
    trained.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*convention.tokens, *alphabet, *continuing],
        limit_alphabet=len(alphabet),
        initial_alphabet=alphabet,
        show_progress=progress,
    )
    trained.train_from_iterator(lines, trainer)
    backend = Tokenizer(models.WordPiece(trained.get_vocab(), unk_token=unknown))
    backend.normalizer, backend.pre_tokenizer = normalizer, splitter
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(list(convention.tokens))
    return with_template(backend, convention)


def with_template(backend: Any, convention: Convention) -> Any:
    """The tokenizer, putting the convention's special tokens around what it encodes."""
    from tokenizers import processors

    if convention.single is not None:
        named = {token: backend.token_to_id(token) for token in convention.tokens}
        used = [(token, number) for token, number in named.items() if token in f"{convention.single} {convention.pair}"]
        backend.post_processor = processors.TemplateProcessing(
            single=convention.single, pair=convention.pair, special_tokens=used
        )
    return backend
