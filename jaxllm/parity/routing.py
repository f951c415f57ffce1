"""Experts that two backends choose differently: ties that rounding breaks either way, or a mistake?

Which experts a token goes through is a decision, and no tolerance holds for a decision: two router logits that are equal to
within rounding send the token to one expert on one backend and to another on the other, and everything after it differs by as
much as two experts do.  The honest comparison is to ask two questions.  Are all decisions that differ such ties?  And given the
same decisions, is everything the same?

Shape legend: B sequences, S tokens, X experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jaxllm.data.batch import Batch
from jaxllm.probe import Choices


@dataclass(frozen=True)
class Decisions:
    """How two sides decide over one input.

    total: decisions, one for each token in each layer.  different: those in which the sets of chosen experts differ.
    gap: the relative error of router logits that explains all of them: half of how far apart the logits of the experts are
    that one side prefers to the other's, over the largest of the layer's logits, as `relative_error` has it; infinite where
    the sides choose other numbers of experts.
    """

    total: int = 0
    different: int = 0
    gap: float = 0.0

    def __str__(self) -> str:
        return f"{self.different} of {self.total} choices differ" if self.different else "no choice differs"


def decisions(batch: Batch, found: Mapping[str, Choices], wanted: Mapping[str, Choices]) -> Decisions:
    """By point, what JAX chose and what the transformers model chose by itself, whose logits tell how near a choice was."""
    real_BS = batch.segments > 0
    total = different = 0
    gap = 0.0
    for point, theirs in wanted.items():
        logits_TX = np.asarray(theirs.logits[real_BS], np.float64)
        one_TX, other_TX = (_is_chosen(each.chosen[real_BS], logits_TX.shape[-1]) for each in (theirs, found[point]))
        differs_T = (one_TX != other_TX).any(-1)
        total += differs_T.size
        different += int(differs_T.sum())
        if (one_TX.sum(-1) != other_TX.sum(-1)).any():
            gap = np.inf  # another number of experts: nothing that rounding could do
        elif differs_T.any():
            preferred_T = np.where(one_TX & ~other_TX, logits_TX, -np.inf).max(-1)[differs_T]
            instead_T = np.where(other_TX & ~one_TX, logits_TX, np.inf).min(-1)[differs_T]
            gap = max(gap, float((preferred_T - instead_T).max()) / 2.0 / float(np.abs(logits_TX).max()))
    return Decisions(total, different, gap)


def _is_chosen(chosen_TK: NDArray[np.int64], experts: int) -> NDArray[np.bool_]:
    is_chosen_TX = np.zeros((len(chosen_TK), experts), bool)
    np.put_along_axis(is_chosen_TX, chosen_TK, True, axis=-1)
    return is_chosen_TX
