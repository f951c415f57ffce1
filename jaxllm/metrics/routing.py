"""What is reported of the routers of a mixture of experts: the same on either backend, over all layers and the global batch.

Padding does not count.  X experts, K of them for each token.
"""

from __future__ import annotations

from typing import Final

BALANCE_LOSS: Final = "router_balance_loss"
"""The load-balancing loss before its coefficient: K where all experts are chosen and weighted alike, at most X."""

LARGEST_LOAD: Final = "router_largest_load"
"""Tokens of the busiest expert over the mean of all: 1 where they share the work alike, at most X / K."""

SMALLEST_LOAD: Final = "router_smallest_load"
"""The same of the idlest expert: 0 where it got nothing."""

ENTROPY: Final = "router_entropy"
"""Entropy of a token's router probabilities in nats, on average: log X where it cannot decide, 0 where it is sure."""
