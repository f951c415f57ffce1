"""Drawing the next token from logits, on the host in double precision.

The draw for position i is a function of (seed, i) alone, so that both backends, given the same logits, write the same text.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn.

    temperature: 0 takes the most likely token.  top_k: only the k most likely tokens (0: all).  top_p: only the smallest set of
    most likely tokens whose probability reaches top_p (Holtzman et al., arXiv:1904.09751).  seed: of the draws.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 1.0
    seed: int = 0


def probabilities(logits: NDArray[np.floating], sampling: Sampling) -> NDArray[np.float64]:
    """The distribution (V,) that `sample` draws from.  logits: (V,).  Needs temperature > 0."""
    scaled = np.asarray(logits, np.float64) / sampling.temperature
    order = np.argsort(-scaled, kind="stable")
    kept = scaled[order] - scaled[order[0]]
    weights = np.exp(kept)
    if sampling.top_k:
        weights[sampling.top_k :] = 0.0
    weights /= weights.sum()
    # A token stays when the ones before it have not reached top_p, so that the most likely one always stays.
    weights[np.cumsum(weights) - weights >= sampling.top_p] = 0.0
    result = np.zeros_like(scaled)
    result[order] = weights / weights.sum()
    return result


def sample(logits: NDArray[np.floating], sampling: Sampling, position: int) -> int:
    """The token at `position` of the sequence, drawn from logits (V,)."""
    if sampling.temperature == 0.0:
        return int(np.argmax(logits))
    cumulative = np.cumsum(probabilities(logits, sampling))
    uniform = np.random.Generator(np.random.Philox(key=sampling.seed, counter=position)).random()
    return int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
