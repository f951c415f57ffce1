"""What fraction of a chip's peak real runs have reached: published figures, each with its source.

MFU is model FLOPs over peak bf16 FLOPs (arXiv:2204.02311, appendix B).  Most sources count attention's full square, jaxllm only
the half that is not masked: at sequence 2,048 that is a few per cent less, at 8,192 more; it is noted as `full`, and a plan
that uses such a figure counts in the same way.  A plan says which figure it used: the median of those of the chip's generation,
of models nearest in size.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from jaxllm.metrics.chips import Chip
from jaxllm.metrics.flops import FlopsPerToken


@dataclass(frozen=True)
class Published:
    """One figure.  chip: keys of chips it holds for.  parameters: of the model.  attention: `causal` or `full` count."""

    chips: tuple[str, ...]
    parameters: float
    mfu: float
    what: str
    attention: str
    source: str


_V4 = "https://github.com/AI-Hypercomputer/maxtext/blob/main/MaxText/configs/v4/README.md"
_V5E = "https://github.com/AI-Hypercomputer/maxtext/blob/main/MaxText/configs/v5e/README.md"
_V5P = "https://github.com/AI-Hypercomputer/maxtext/blob/main/MaxText/configs/v5p/README.md"
_TIERS = "https://github.com/AI-Hypercomputer/maxtext/blob/main/docs/reference/models/tiering.md"
_MOSAIC = "https://github.com/mosaicml/llm-foundry/blob/main/scripts/train/benchmarking/README.md"
_TITAN = "https://github.com/pytorch/torchtitan/blob/main/docs/performance.md"
_A100, _H100 = ("a100", "a100-40"), ("h100", "h200", "gh200")

PUBLISHED: tuple[Published, ...] = (
    Published(("v4",), 540e9, 0.462, "PaLM 540B on 6,144 v4 chips", "full", "arXiv:2204.02311, table 3"),
    Published(("v4",), 22e9, 0.567, "MaxText 22B on v4-128", "full", _V4),
    Published(("v4",), 52e9, 0.560, "MaxText 52B on v4-384", "full", _V4),
    Published(("v5e",), 16e9, 0.611, "MaxText 16B on 256 v5e chips", "full", _V5E),
    Published(("v5e",), 32e9, 0.6686, "MaxText 32B on 256 v5e chips", "full", _V5E),
    Published(("v5e",), 64e9, 0.599, "MaxText 64B on 256 v5e chips", "full", _V5E),
    Published(("v5e",), 128e9, 0.5606, "MaxText 128B on 256 v5e chips", "full", _V5E),
    Published(("v5p",), 32e9, 0.7147, "MaxText 32B on v5p-128", "full", _V5P),
    Published(("v5p",), 70e9, 0.654, "Llama 2 70B with MaxText on 512 v5p chips, sequence 4,096", "full", _TIERS),
    Published(("v5p",), 128e9, 0.6868, "MaxText 128B on v5p-256", "full", _V5P),
    Published(("v5p",), 512e9, 0.6399, "MaxText 512B on v5p-1024", "full", _V5P),
    Published(("v6e",), 8e9, 0.4546, "Llama 3.1 8B with MaxText on 256 v6e chips, sequence 8,192", "full", _TIERS),
    Published(("v6e",), 70e9, 0.5033, "Llama 3.1 70B with MaxText on 256 v6e chips, sequence 8,192", "full", _TIERS),
    Published(("v6e",), 70e9, 0.438, "Llama 2 70B with MaxText on 256 v6e chips, sequence 4,096", "full", _TIERS),
    Published(("v6e",), 405e9, 0.3855, "Llama 3.1 405B with MaxText on 256 v6e chips, sequence 8,192", "full", _TIERS),
    Published(_A100, 13e9, 0.5957, "MPT 13B on 8 A100 80GB, sequence 2,048", "full", _MOSAIC),
    Published(_A100, 30e9, 0.553, "MPT 30B on 8 A100 80GB, sequence 2,048", "full", _MOSAIC),
    Published(_A100, 70e9, 0.5333, "MPT 70B on 64 A100 80GB, sequence 2,048", "full", _MOSAIC),
    Published(_A100, 1000e9, 0.563, "1T with Megatron-LM on 512 A100", "full", "arXiv:2205.05198, table 5"),
    Published(_H100, 0.76e9, 0.349, "MPT 760M on 8 H100, sequence 2,048", "full", _MOSAIC),
    Published(_H100, 1.3e9, 0.4182, "MPT 1B on 8 H100, sequence 2,048", "full", _MOSAIC),
    Published(_H100, 6.7e9, 0.4644, "MPT 7B on 8 H100, sequence 2,048", "full", _MOSAIC),
    Published(_H100, 8e9, 0.39, "Llama 3.1 8B with torchtitan on 8 or 128 H100, FSDP and torch.compile", "full", _TITAN),
    Published(_H100, 12.9e9, 0.3979, "MPT 13B on 8 H100, sequence 2,048", "full", _MOSAIC),
    Published(_H100, 30e9, 0.4392, "MPT 30B on 32 H100, sequence 2,048", "full", _MOSAIC),
    Published(_H100, 65e9, 0.4257, "MPT 70B on 64 H100, sequence 2,048", "full", _MOSAIC),
    Published(_H100, 405e9, 0.41, "Llama 3 405B on 8,192 to 16,384 H100", "full", "arXiv:2407.21783, table 4"),
)

ASSUMED = 0.35
"""Where nothing is published for a chip: below every figure above, since a plan should not promise."""


@dataclass(frozen=True)
class Utilization:
    """An expected MFU and where it comes from.  whole_square: it counts attention's masked half, too."""

    mfu: float
    source: str
    whole_square: bool = False

    def counted(self, flops: FlopsPerToken) -> float:
        """Training FLOPs per token as the source of the figure counts them, so that peak x MFU / these is a real speed."""
        return flops.training + (3.0 * flops.attention if self.whole_square else 0.0)


def expected_utilization(chip: Chip, parameters: float) -> Utilization:
    """The median of the figures published for the chip, of the three models nearest in size."""
    known = [each for each in PUBLISHED if chip.key in each.chips]
    if not known:
        return Utilization(ASSUMED, f"assumed: no published figure for {chip.name} is in the table")
    nearest = sorted(known, key=lambda each: abs(math.log(each.parameters / parameters)))[:3]
    median = statistics.median_low(each.mfu for each in nearest)
    chosen = next(each for each in nearest if each.mfu == median)
    return Utilization(chosen.mfu, f"{chosen.what}, {chosen.source}", chosen.attention == "full")
