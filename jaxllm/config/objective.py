"""The `objective` section: what a model learns, and how examples are made for it."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, field_validator, model_validator

from jaxllm.config.section import Fraction, Positive, Section

ProblemType: TypeAlias = Literal["single_label_classification", "multi_label_classification", "regression"]
Labels: TypeAlias = tuple[str, ...]


class CausalLmObjective(Section):
    """causal-lm: every token from the ones before it."""

    kind: Literal["causal-lm"] = Field("causal-lm", description="Every token from the ones before it.")


class MaskedLmObjective(Section):
    """masked-lm: chosen tokens from all the others (BERT, arXiv:1810.04805)."""

    kind: Literal["masked-lm"] = Field(..., description="Chosen tokens from all the others (arXiv:1810.04805).")
    fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.15, description="Share of each row's tokens to predict, special tokens left out; at least one."
    )
    mask: Fraction = Field(0.8, description="Share of the chosen tokens that the mask token stands for.")
    random: Fraction = Field(0.1, description="Share of them that a random token stands for; the rest stay as they are.")
    whole_words: bool = Field(False, description="Choose all tokens of a word or none.")
    dynamic: bool = Field(True, description="Other tokens in every epoch (RoBERTa, arXiv:1907.11692), or always the same.")

    @model_validator(mode="after")
    def _shares(self) -> MaskedLmObjective:
        if self.mask + self.random > 1.0:
            raise ValueError(f"mask {self.mask:g} and random {self.random:g} together are more than 1; lower one of them")
        return self


class _Labelled(Section):
    """Fields of the objectives whose examples carry labels."""

    labels: Labels | None = Field(None, description="Names of the labels in the order of their numbers; this or num_labels.")
    num_labels: Positive | None = Field(None, description="How many labels there are, where they have no names.")

    @field_validator("labels", mode="before")
    @classmethod
    def _list(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("labels")
    @classmethod
    def _distinct(cls, value: Labels | None) -> Labels | None:
        if value is not None and len(set(value)) < len(value):
            twice = next(name for name in value if value.count(name) > 1)
            raise ValueError(f"names the label {twice!r} twice; every label needs a name of its own")
        return value

    def _check_count(self, least: int, *, optional: bool = False) -> None:
        """ValueError unless the labels are given in one way and are at least so many."""
        given = (self.labels is not None) + (self.num_labels is not None)
        if given == 2 or (given == 0 and not optional):
            raise ValueError("give either `labels:` (their names in the order of their numbers) or `num_labels:`")
        if len(self.names) < least:
            raise ValueError(f"has {len(self.names)} labels; there is nothing to tell apart with fewer than {least}")

    @property
    def names(self) -> Labels:
        """Names of the labels; their numbers where they have no names."""
        return self.labels if self.labels is not None else tuple(map(str, range(self.num_labels or 1)))


class SequenceClassificationObjective(_Labelled):
    """sequence-classification: labels, or a number, for a text or a pair of texts."""

    kind: Literal["sequence-classification"] = Field(..., description="Labels or numbers for a text or a pair of texts.")
    problem_type: ProblemType = Field(
        "single_label_classification", description="One label a text, any number of labels, or numbers (transformers' names)."
    )

    @model_validator(mode="after")
    def _counted(self) -> SequenceClassificationObjective:
        regression = self.problem_type == "regression"
        self._check_count(least=2 if self.problem_type == "single_label_classification" else 1, optional=regression)
        return self


class TokenClassificationObjective(_Labelled):
    """token-classification: a label for every word."""

    kind: Literal["token-classification"] = Field(..., description="A label for every word, at the word's first token.")

    @model_validator(mode="after")
    def _counted(self) -> TokenClassificationObjective:
        self._check_count(least=2)
        return self


class Seq2SeqObjective(Section):
    """seq2seq: a target text from a source text, every token from the source and the target's tokens before it."""

    kind: Literal["seq2seq"] = Field(..., description="A target text from a source text (teacher forcing).")
    prefix: str = Field("", description="Put before every source: what T5 was taught its tasks by, as 'summarize: '.")


class SpanCorruptionObjective(Section):
    """span-corruption: the spans that sentinel tokens stand for, as T5 was pretrained (arXiv:1910.10683, section 3.1.4)."""

    kind: Literal["span-corruption"] = Field(..., description="The spans that sentinels stand for (arXiv:1910.10683).")
    noise_density: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(0.15, description="Share of the tokens left out.")
    mean_span_length: Annotated[float, Field(ge=1.0)] = Field(3.0, description="Mean tokens of a span.")


ObjectiveConfig: TypeAlias = Annotated[
    CausalLmObjective
    | MaskedLmObjective
    | SequenceClassificationObjective
    | TokenClassificationObjective
    | Seq2SeqObjective
    | SpanCorruptionObjective,
    Field(discriminator="kind"),
]
LabelledObjective: TypeAlias = SequenceClassificationObjective | TokenClassificationObjective
