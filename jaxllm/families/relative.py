"""Which bucket a distance between two tokens falls into (arXiv:1910.10683, section 2.1, as in its authors' code)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from jaxllm.families.spec import RelativeSpec


def distance_buckets(
    distances_D: NDArray[np.int64], spec: RelativeSpec, *, causal: bool, dtype: type[np.floating] = np.float32
) -> NDArray[np.int32]:
    """The bucket (D,) of each distance: place of the key minus place of the query.

    dtype: of the logarithm, which decides where a range ends; it is that of the statistics, as in transformers.
    """
    buckets = spec.buckets if causal else spec.buckets // 2
    behind = np.maximum(-distances_D, 0) if causal else np.abs(distances_D)
    single = buckets // 2  # distances that have a bucket of their own
    ranges = dtype(math.log(spec.max_distance / single))
    share = np.log(np.maximum(behind, 1).astype(dtype) / dtype(single)) / ranges * dtype(buckets - single)
    bucket = np.where(behind < single, behind, np.minimum(single + share.astype(np.int64), buckets - 1))
    ahead = 0 if causal else np.where(distances_D > 0, buckets, 0)
    return (bucket + ahead).astype(np.int32)
