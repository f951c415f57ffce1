"""The real step, compiled by the real TPU compiler for every generation: memory, sharding, products, communication."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner

from jaxllm.cli.main import main
from jaxllm.errors import ConfigError, JaxllmError
from jaxllm.families import flax_leaves, resolve_model
from jaxllm.planning.tpu import compiler
from jaxllm.planning.tpu.hlo import arrays, parse
from jaxllm.planning.tpu.program import HOST
from jaxllm.planning.tpu.study import study
from jaxllm.planning.tpu.text import lines
from jaxllm.planning.tpu.topology import parse_topology
from tests.tpu.conftest import MODELS, OTHERS, SMALLEST, make_config

CASES = [pytest.param(family, generation, id=f"{family}-{generation}") for generation in SMALLEST for family in MODELS]


@pytest.mark.parametrize(("family", "generation"), CASES)
def test_memory_and_sharding(compiled, family, generation):
    found = compiled(family, generation)
    assert found.fits
    assert found.mesh["fsdp"] == found.mesh["tensor"] == 2
    parameters = 4 * found.model.parameters
    leaves = [leaf for leaf in flax_leaves(found.model.rules) if len(set(leaf.axes) - {"layers"}) > 1]
    matrices = 4 * sum(math.prod(leaf.shape) for leaf in leaves)
    # Every matrix is cut in four (fsdp 2 x tensor 2); vectors at least in two, and the compiler pads small ones.
    assert matrices / 4 <= found.memory.parameters <= 1.2 * parameters / 4 + 2**16
    assert found.memory.moments == 2 * found.memory.parameters
    assert found.memory.total == found.needed_bytes < 0.05 * found.capacity_bytes
    gathered = max(row.received / row.times for row in found.prediction.collectives if row.kind == "all-gather")
    assert gathered < parameters / 4, "a step gathers the whole model at once"


@pytest.mark.parametrize(("family", "generation"), CASES)
def test_the_program_is_read_rightly(compiled, family, generation):
    prediction = compiled(family, generation).prediction
    assert prediction.counted == pytest.approx(1.0, abs=0.01)
    assert not prediction.assumed
    assert compiled(family, generation).attention == "splash"
    assert prediction.kernel_flops > 0
    kinds = {(row.kind, row.axes) for row in prediction.collectives}
    assert any(kind == "all-gather" and "fsdp" in axes for kind, axes in kinds)
    assert any(kind in ("reduce-scatter", "all-reduce") and "fsdp" in axes for kind, axes in kinds)
    assert any("tensor" in axes for _, axes in kinds)
    assert 0 < prediction.mfu < 1
    parts = prediction.compute_seconds + prediction.attention_seconds + prediction.exposed_seconds
    assert prediction.step_seconds == pytest.approx(parts)
    assert sum(prediction.by_kind.values()) == pytest.approx(prediction.step_seconds)
    assert {"mlp", "attention", "head", "optimizer"} <= set(prediction.by_source) | {"optimizer"}
    assert {"forward", "backward", "recompute", "update"} == set(prediction.by_phase)


@pytest.mark.parametrize("generation", SMALLEST)
def test_what_tensor_sums_is_scattered_at_once(compiled, generation):
    """Residuals are cut over the sequence: no sum over tensor is made whole on every device and sliced then."""
    rows = [row for row in compiled("llama", generation).prediction.collectives if row.axes == "tensor"]
    residual = 2 * 4 * 128 * 128  # bytes of a device's 4 rows of 128 tokens
    kinds = {row.kind for row in rows if row.received / row.times >= residual / 2}
    assert kinds == {"all-gather", "reduce-scatter"}


def test_the_optimiser_state_comes_from_the_host_when_its_turn_has_come():
    """Nothing of it is fetched before the backward pass is over, where it would stand beside the activations."""
    found = compiler.compile_step(make_config("llama", jax={"offload_optimizer": "moments"}), parse_topology("v5p:2x2x1"), 512)
    module = parse(found.program)
    entry = list(module.computations[module.entry].values())
    fetches = [
        i for i, each in enumerate(entry) if each.opcode == "copy-start" and {a.space for a in arrays(each.type)} >= {HOST, 0}
    ]
    loops = [i for i, each in enumerate(entry) if each.opcode == "while"]
    turns = [i for i, each in enumerate(entry) if each.opcode == "conditional"]
    assert turns
    assert min(turns + fetches) > max(loops)


def test_a_loss_in_chunks_within_micro_batches():
    """A pass of the compiler fails on them where it is let (`compiler_options`)."""
    training = {"steps": 1, "global_batch": 16, "micro_batch": 2, "precision": "bf16", "loss_chunk": 64}
    found = study(make_config("llama", training=training, parallel={"fsdp": 4}), parse_topology("v5p:2x2x1"))
    assert found.accumulation == 2
    assert found.prediction.counted == pytest.approx(1.0, abs=0.01)


def test_a_ring_meets_in_splash_kernels():
    data = {"tokenizer": {"train": "bpe", "vocab_size": 512}, "sequence_length": 1024}
    found = study(make_config("llama", data=data, parallel={"fsdp": 2, "context": 2}), parse_topology("v5p:2x2x1"))
    assert found.attention == "splash"
    assert found.prediction.counted == pytest.approx(1.0, abs=0.01)
    # Forward, recomputed and backward at home (3 of 4 blocks of 256... a causal half and the diagonal) and at one visit.
    assert found.prediction.kernel_flops > 0
    assert {row.kind for row in found.prediction.collectives if row.axes == "context"} >= {"collective-permute"}


def test_every_line_of_the_report(compiled):
    text = "\n".join(lines(compiled("llama", "tpu7x")))
    assert "on tpu7x:2x2x1 (4 chips, 8 devices)" in text
    assert "mesh data 2 x fsdp 2 x tensor 2" in text
    assert "GiB of HBM per device at the peak" in text
    assert "products counted in the program and by formula agree" in text
    assert "all-gather over fsdp" in text
    json.dumps(compiled("llama", "tpu7x").to_json(), allow_nan=False)


@pytest.mark.parametrize(
    "kind", [kind if kind in ("mixtral", "t5") else pytest.param(kind, marks=pytest.mark.nightly) for kind in OTHERS]
)
def test_other_models_than_decoders_compile_and_are_read_rightly(kind):
    found = study(make_config(kind), parse_topology("v5e:2x2"))
    assert found.fits
    parameters = 4 * found.model.parameters
    assert parameters / 4 <= found.memory.parameters <= 1.4 * parameters / 2
    assert found.memory.total == found.needed_bytes
    assert found.prediction.counted == pytest.approx(1.0, abs=0.01)
    assert not found.prediction.assumed
    assert 0 < found.prediction.mfu < 1
    if kind == "mixtral":  # nothing is multiplied by zero: what is more than the model's is recomputation
        assert found.prediction.matmul_flops * 4 < 1.5 * found.model_flops


@pytest.mark.nightly
def test_a_step_that_does_not_fit_gets_remedies(tmp_path):
    """Logits of 32,768 rows at once are larger than a v5e chip; smaller micro-batches fit."""
    config = make_config(
        "llama",
        model={**MODELS["llama"], "num_hidden_layers": 1},
        training={"steps": 1, "global_batch": 131072, "precision": "bf16"},
        parallel={"fsdp": 4},
    )
    file, out = tmp_path / "run.yaml", tmp_path / "report.json"
    file.write_text(json.dumps(config.model_dump(mode="json", by_alias=True, exclude_none=True)))
    done = CliRunner().invoke(main, ["compile", str(file), "--topology", "v5e:2x2", "--json", str(out)])
    assert done.exit_code == 1, done.output
    assert "does not fit: " in done.output
    assert "GiB too much" in done.output
    assert "it fits with (compiled, fastest first):" in done.output
    report = json.loads(out.read_text())
    assert report["needed_bytes"] > report["capacity_bytes"]
    assert report["remedies"][0]["changes"]["training.micro_batch"] < 32768
    assert report["remedies"][0]["study"]["prediction"]["tokens_per_second_per_chip"] > 0


@pytest.mark.parametrize(
    ("sections", "key", "said"),
    [
        ({"parallel": {"fsdp": 3}}, "parallel", "fsdp 3 does not divide the 4 devices"),
        ({"parallel": {"data": 1, "fsdp": 2}}, "parallel", "the mesh fsdp 2 uses 2 of the 4 devices of 1 x v6e:2x2"),
        ({"parallel": {"tensor": 4}}, "parallel.tensor", "4 does not divide the number of"),
        ({"training": {"steps": 1, "global_batch": 3}, "parallel": {"fsdp": 4}}, "training.global_batch", "3 sequences"),
        ({"jax": {"attention": "cudnn"}, "parallel": {"fsdp": 4}}, "jax.attention", "this is tpu"),
    ],
)
def test_what_cannot_be_is_refused(sections, key, said):
    with pytest.raises(ConfigError) as caught:
        study(make_config("llama", **sections), parse_topology("v6e:2x2"))
    assert caught.value.key == key
    assert said in str(caught.value)


def test_without_libtpu_the_pip_line_is_given(monkeypatch, tmp_path):
    monkeypatch.setattr(compiler, "find_spec", lambda _: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(JaxllmError, match=r"pip install 'jaxllm\[tpu\]'"):
        compiler.require_libtpu()


def test_an_unknown_topology_lists_what_there_is(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("{}")
    done = CliRunner().invoke(main, ["compile", str(file), "--topology", "v9:2x2"])
    assert done.exit_code == 1
    assert "v5p:4x4x8" in done.output


def test_libtpu_does_not_disturb_a_run_on_the_cpu():
    """Without JAX_PLATFORMS, JAX would look for a TPU and warn."""
    program = (
        "import jax\n"
        "from jaxllm.jax_backend.process import configure_process\n"
        "from tests.tpu.conftest import make_config\n"
        "configure_process(make_config('llama'))\n"
        "print(jax.devices()[0].platform)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "cpu\n", "")


def test_kernel_blocks_can_be_set(compiled):
    smaller = study(make_config("llama", jax={"remat": "full", "attention_block": 128}), parse_topology("v5e:2x2"))
    assert smaller.fits
    assert np.isfinite(smaller.prediction.step_seconds)
    assert resolve_model(smaller.config.model).parameters == compiled("llama", "v5e").model.parameters
