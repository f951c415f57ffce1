"""Which documents are for validation."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from jaxllm.data.order import permutation
from jaxllm.errors import DataError


def split_documents(count: int, fraction: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Numbers of the training and of the validation documents, both ascending.

    round(fraction * count) documents, at least one, are held out.  DataError when a side would be empty.
    """
    if count < 2:
        raise DataError(
            f"the source has {count} document, which cannot be split into training and validation; "
            "give more documents, smaller ones (data.source.document), or a data.validation_source"
        )
    held_out = max(1, round(fraction * count))
    if held_out >= count:
        raise DataError(
            f"data.validation_fraction {fraction} of {count} documents leaves none for training; give a smaller fraction"
        )
    order = permutation(count, seed, "validation documents")
    return np.sort(order[held_out:]), np.sort(order[:held_out])
