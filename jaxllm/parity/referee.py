"""float64 as the referee of what breaks its bound in fp32: each backend against itself in float64.

Where both are as far from float64 as from each other, the difference is rounding that the model amplifies.  Where one of them
is much further away than the other, that one loses digits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import chain

from jaxllm.parity.inputs import counted
from jaxllm.parity.levels import BACKENDS, OnePass, backward, forward
from jaxllm.parity.results import Check
from jaxllm.parity.tolerances import relative_error
from jaxllm.probe import Array, Pass

_REFEREED = 8
"""Checks that are looked at: those furthest beyond their bounds."""

_NAMES = {"jax": "JAX", "deepspeed": "PyTorch"}


def refereed(one_pass: OnePass, exact: Callable[[], OnePass]) -> Iterator[Check]:
    """The levels `forward` and `backward`; where a bound of fp32 breaks, fp64 is asked.  exact: makes the same pass in fp64."""
    broken = []
    for check in chain(forward(one_pass), backward(one_pass)):
        if not check.passed:
            broken.append(check)
        yield check
    if broken and one_pass.run.config.training.precision == "fp32":
        yield from referee(one_pass, exact(), broken)


def referee(one_pass: OnePass, exact: OnePass, broken: Sequence[Check]) -> Iterator[Check]:
    """Two checks without a bound for each broken one.  broken: of `forward` and `backward`; exact: the same pass in fp64."""
    for check in sorted(broken, key=lambda check: math.inf if math.isnan(check.measured) else check.measured)[-_REFEREED:]:
        label = str(check.detail["input"])
        for side in BACKENDS:
            found, wanted = (_compared(check, each.passes[side][label], each) for each in (one_pass, exact))
            name = f"referee: {check.name}, {_NAMES[side]} against itself in fp64"
            detail = {"referee": True, "side": side, "of": check.name, "input": label}
            yield Check(check.level, check.precision, name, relative_error(found, wanted), math.inf, detail)


def _compared(check: Check, found: Pass, one_pass: OnePass) -> Array | float:
    """What a check compares, of one side."""
    if check.level == "backward":
        return found.gradients[str(check.detail["parameter"])]
    if check.name.startswith("loss"):
        return found.loss
    return found.logits[counted(one_pass.inputs[str(check.detail["input"])], found.logits)]
