"""What a run file and a model come to, written down: resolved configs, and tables of parameters with their weight decay.

python tests/golden/remake.py        writes the files beside this script; look at the difference before you commit it
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
PATTERNS = ("parameters-*.json", "resolved-*.yaml")
sys.path.insert(0, str(ROOT))

from jaxllm.cli.run_summary import resolve, summarize  # noqa: E402 - the path above
from jaxllm.config import load_run, write_yaml  # noqa: E402
from jaxllm.config.schema import ModelConfig  # noqa: E402
from jaxllm.families import Model, resolve_model  # noqa: E402
from jaxllm.run_folder import resolved  # noqa: E402
from tests.unit.families.cases import CASES  # noqa: E402


def parameter_table(model: Model) -> list[dict[str, Any]]:
    """One row for each weight rule, in checkpoint order."""
    return [
        {
            "name": rule.name,
            "shape": list(rule.shape),
            "layers": rule.layers,
            "decay": rule.decays,
            "init": rule.init.kind if rule.init.kind != "normal" else f"normal {rule.init.std:.6g}",
            "pattern": rule.pattern,
            "flax": {path: list(shape) for path, shape in zip(rule.paths, rule.flax_shapes, strict=True)},
            "axes": list(rule.axes[0]) if len(set(rule.axes)) == 1 else [list(axes) for axes in rule.axes],
        }
        for rule in model.rules
    ]


def golden_files() -> dict[str, str]:
    """Name and text of every golden file."""
    files = {}
    for name, keys in CASES.items():
        table = parameter_table(resolve_model(ModelConfig.model_validate(keys)))
        rows = ",\n".join("  " + json.dumps(row) for row in table)
        files[f"parameters-{name}.json"] = f"[\n{rows}\n]\n"
    for file in sorted((ROOT / "configs").glob("*.yaml")):
        config = load_run(file).config
        if config.model.from_ is not None:  # described by a folder or by the hub, which a test does not ask
            continue
        model = resolve(config)
        comments = "".join(f"# {label}: {text}\n" for label, text in summarize(config, model).lines())
        files[f"resolved-{file.stem}.yaml"] = comments + write_yaml(resolved(config, model))
    return files


if __name__ == "__main__":
    for pattern in PATTERNS:
        for old in HERE.glob(pattern):
            old.unlink()
    for name, text in golden_files().items():
        (HERE / name).write_text(text)
