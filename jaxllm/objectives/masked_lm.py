"""masked-lm: chosen tokens are predicted from all the others of their document (BERT, arXiv:1810.04805, section 3.1).

Which tokens, and what stands for them, is a function of the run's seed and of the row's place in the data, so that both
backends, every mesh and every resumed run see the same masks.

R rows, S tokens per row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from jaxllm.config.objective import MaskedLmObjective
from jaxllm.config.schema import RunConfig
from jaxllm.data.batch import Batch
from jaxllm.data.order import words
from jaxllm.data.packing import Rows
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import ConfigError
from jaxllm.objectives.causal_lm import running
from jaxllm.objectives.examples import Indices

_UNIT = 2.0**-64


@dataclass(frozen=True)
class MaskedLM:
    """Which tokens are predicted, and what the model sees in their place.

    settings: shares and kinds of masks.  special, continues (V,): of each token of the vocabulary, whether it is special and
    whether it goes on with a word.  seed: of the run.
    """

    settings: MaskedLmObjective
    mask_token: int
    special: NDArray[np.bool_]
    continues: NDArray[np.bool_]
    seed: int
    cross_document_attention: bool
    overlap: ClassVar[int] = 0

    @classmethod
    def of(cls, settings: MaskedLmObjective, tokenizer: Tokenizer, config: RunConfig) -> MaskedLM:
        """The objective of a run.  ConfigError when the tokenizer has no mask token."""
        mask_token = tokenizer.special_id("mask_token")
        if mask_token is None:
            raise ConfigError(
                "objective.kind",
                "masked-lm needs a tokenizer with a mask token; train one with the special_tokens of bert or roberta",
            )
        special = np.zeros(tokenizer.vocab_size, np.bool_)
        special[list(tokenizer.special_ids)] = True
        return cls(settings, mask_token, special, tokenizer.continues_word, config.seed, config.data.cross_document_attention)

    def batch(self, rows: Rows, indices_R: Indices, places_R: Indices) -> Batch:
        """Rows of S tokens -> a batch of S."""
        segments_RS, positions_RS = running(rows, self.cross_document_attention)
        inputs_RS = rows.tokens.copy()
        chosen_RS = np.zeros(inputs_RS.shape, np.bool_)
        seeds = places_R if self.settings.dynamic else indices_R
        for row, place in enumerate(seeds.tolist()):
            draws_3S = words(self.seed, "masks", place, 3 * inputs_RS.shape[1]).reshape(3, -1)
            chosen_RS[row] = self._choose(rows.tokens[row], rows.segments[row], draws_3S[0])
            self._replace(inputs_RS[row], chosen_RS[row], draws_3S[1] * _UNIT, draws_3S[2])
        return Batch(
            inputs=inputs_RS,
            targets=np.where(chosen_RS, rows.tokens, np.int32(0)),
            weights=chosen_RS.astype(np.float32),
            positions=positions_RS,
            segments=segments_RS,
        )

    def _choose(
        self, tokens_S: NDArray[np.int32], segments_S: NDArray[np.int32], draws_S: NDArray[np.uint64]
    ) -> NDArray[np.bool_]:
        """The tokens to predict: in the order of their draws until the share is reached, whole words with `whole_words`."""
        candidates_S = (segments_S > 0) & ~self.special[tokens_S]
        wanted = max(1, round(self.settings.fraction * int(candidates_S.sum()))) if candidates_S.any() else 0
        (places,) = np.nonzero(candidates_S)
        if not self.settings.whole_words:
            chosen = places[np.argsort(draws_S[places], kind="stable")[:wanted]]
            return np.isin(np.arange(tokens_S.size), chosen)
        # A word begins where its token does not go on with another, after anything that is no candidate, and with a document.
        before = np.r_[-2, places[:-1]]
        starts = ~self.continues[tokens_S[places]] | (places != before + 1) | (segments_S[places] != segments_S[before])
        word = np.cumsum(starts) - 1
        sizes = np.bincount(word) if word.size else np.zeros(0, np.int64)
        chosen_words: list[int] = []
        left = wanted
        for number in np.argsort(draws_S[places[starts]], kind="stable").tolist():
            # As in BERT, a word that is too long for what is left is passed over; unless it would be the only one.
            if sizes[number] <= left or (not chosen_words and number == np.argmin(sizes)):
                chosen_words.append(number)
                left -= int(sizes[number])
            if left <= 0:
                break
        return np.isin(np.arange(tokens_S.size), places[np.isin(word, chosen_words)])

    def _replace(
        self, inputs_S: NDArray[np.int32], chosen_S: NDArray[np.bool_], unit_S: NDArray[np.float64], draws_S: NDArray[np.uint64]
    ) -> None:
        """What the model sees in place of the chosen tokens: mostly the mask token, sometimes any token, sometimes itself."""
        settings = self.settings
        inputs_S[chosen_S & (unit_S < settings.mask)] = self.mask_token
        random_S = chosen_S & (unit_S >= settings.mask) & (unit_S < settings.mask + settings.random)
        inputs_S[random_S] = (draws_S[random_S] % np.uint64(self.special.size)).astype(np.int32)
