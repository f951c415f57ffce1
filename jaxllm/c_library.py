"""Functions of the C library that Python does not wrap: what only some systems have."""

from __future__ import annotations

import ctypes
from collections.abc import Callable


def c_function(name: str) -> Callable[..., int] | None:
    """The C library's function of that name, from C integers to a C int; None where it has none."""
    try:
        found: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError, TypeError):
        return None
    return found
