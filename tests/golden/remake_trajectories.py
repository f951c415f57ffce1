"""The losses of the first steps of each family in float64, written down: both backends together must not drift from them.

python tests/golden/remake_trajectories.py     writes the files beside this script; look at the difference before you commit it

The tokens are random and come from a seed, the weights from the initialiser, so that nothing but the repository is needed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
sys.path.insert(0, str(ROOT))

from jaxllm.metrics.environment import package_versions  # noqa: E402 - the path above
from tests.parity.trajectories import MODELS, Trained, make_run, train  # noqa: E402

STEPS = 20
COMMAND = "python tests/golden/remake_trajectories.py"


def golden_file(family: str) -> Path:
    """Where a family's losses are written."""
    return HERE / f"trajectory_{family}.json"


def document(family: str, trained: Trained) -> dict[str, Any]:
    """What is written of a family."""
    packages = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "numpy")
    return {
        "remake": COMMAND,
        "versions": package_versions(packages),
        "model": MODELS[family],
        "loss": list(trained.losses.values()),
        "gradient_norm": list(trained.norms.values()),
    }


if __name__ == "__main__":
    for each in sys.argv[1:] or MODELS:
        found = train("jax", make_run(each, "fp64", STEPS))
        golden_file(each).write_text(json.dumps(document(each, found), indent=1) + "\n")
