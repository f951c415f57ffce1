"""jaxllm's step against MaxText's, row by row, by the same compiler: cycles per token and memory.

    python -m benchmarks.tpu_maxtext [--only NAME] [--json benchmarks/results/tpu_maxtext.json] [--libtpu .../libtpu.so]

Same model, slice, batch per chip, sequence and precision; pure fsdp.  The reference figures are of MaxText's train step
compiled ahead of time with jax 0.10.2 and libtpu 0.0.52 (give that one with --libtpu to compare under the same compiler).
Bound: at most as many cycles and at most as much HBM.
"""

from __future__ import annotations

from typing import Any

from benchmarks._tpu import Row, run
from jaxllm.planning.tpu.study import Study

LLAMA2_7B = (
    "model.vocab_size=32000", "model.intermediate_size=11008", "model.num_key_value_heads=32",
    "model.max_position_embeddings=4096", "model.bos_token_id=1", "model.eos_token_id=2",
    "model.rope_parameters={rope_type: default, rope_theta: 10000.0}", "data.sequence_length=4096",
)  # fmt: skip


def _batch(rows: int) -> tuple[str, ...]:
    return ("parallel.fsdp=16", f"training.micro_batch={rows}", f"training.global_batch={16 * rows}")


def _row(
    name: str, topology: str, overrides: tuple[str, ...], remat: str, mcycles: float, hbm_gib: float, **others: float
) -> Row:
    mark = {"mcycles": mcycles, "hbm_gib": hbm_gib, **others}
    return Row(name, "llama3-8b.yaml", topology, (*overrides, f"jax.remat={remat}"), mark)


# jax.remat is what each side may choose freely: only cycles and memory are compared.  On v6e MaxText either keeps two inputs of
# the MLP and has the rest in the host's memory, or recomputes everything; one step of jaxllm's, which recomputes, meets both.
ROWS = (
    _row("llama3.1-8b-v6e-offload", "v6e:4x4", _batch(3), "full", 4499, 27.9, matmul=3028, fusions=677, copies=169),
    _row("llama3.1-8b-v6e-full", "v6e:4x4", _batch(3), "full", 4797, 21.3, matmul=3224, fusions=892, copies=58),
    _row("llama3.1-8b-v5p", "v5p:2x2x4", _batch(2), "[query, attention_residual, mlp_gate, mlp_up]",
         3714, 57.5, matmul=3016, fusions=404, copies=72),
    _row("llama2-7b-v5p", "v5p:2x2x4", (*LLAMA2_7B, *_batch(4)),
         "[query, key, value, attention_residual, mlp_gate, mlp_up]", 4112, 51.2, matmul=3592, fusions=417, copies=91),
)  # fmt: skip


def judge(row: Row, found: Study) -> dict[str, Any]:
    """Ratios to MaxText's figures: below 1 is better."""
    if found.prediction is None or found.needed_bytes is None:
        return {"fits": False}
    clock = found.topology.generation.clock_hz
    kinds = {kind: seconds * clock / 1e6 for kind, seconds in found.prediction.by_kind.items()}
    mcycles, gib = found.prediction.cycles / 1e6, found.needed_bytes / 2**30
    return {
        "fits": found.fits,
        "mcycles": mcycles,
        "cycles_per_token": mcycles * 1e6 * found.topology.devices / found.tokens,
        "cycles_ratio": mcycles / row.reference["mcycles"],
        "hbm_gib": gib,
        "hbm_ratio": gib / row.reference["hbm_gib"],
        "matmul_mcycles": kinds.get("matmul", 0.0),
        "fusion_mcycles": kinds.get("fusion", 0.0),
        "copy_mcycles": kinds.get("copy", 0.0),
    }


if __name__ == "__main__":
    run(__doc__, ROWS, judge)
