"""Turning pydantic's findings into one sentence: the key, the value, what is allowed, the nearest valid key."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ValidationError

from jaxllm.errors import ConfigError


def nearest(name: str, allowed: Iterable[str]) -> str:
    """`did you mean X?` when one is close, and always what is allowed."""
    choices = sorted(allowed)
    close = difflib.get_close_matches(name, choices, n=1)
    listed = f"allowed: {', '.join(choices)}"
    return f"did you mean {close[0]!r}? ({listed})" if close else listed


def one_sentence(error: ValidationError, prefix: str, allowed: type[BaseModel]) -> ConfigError:
    """The first finding of a pydantic error as a ConfigError.  prefix: dotted path of the section that was validated."""
    raise NotImplementedError  # PLACEHOLDER written by the config helper
