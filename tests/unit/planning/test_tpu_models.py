"""Topologies, links, the attention kernel's FLOPs, the division of memory, and changes of a run file."""

import pytest

from jaxllm.config import RunConfig
from jaxllm.errors import JaxllmError
from jaxllm.families import resolve_model
from jaxllm.jax_backend.attention.splash import blocks_for
from jaxllm.metrics.flops import flops_per_token
from jaxllm.planning.devices import parse_devices
from jaxllm.planning.setting import setting_of
from jaxllm.planning.speed import speed
from jaxllm.planning.tpu.changes import changed, micro_batch_of, rows_per_device, sizes_of, spelled
from jaxllm.planning.tpu.expected import Rows, expected_matmul_flops
from jaxllm.planning.tpu.generations import GENERATIONS
from jaxllm.planning.tpu.hlo import Array, parse
from jaxllm.planning.tpu.kernels import AttentionShape, kernel_work
from jaxllm.planning.tpu.links import Links, wire_bytes
from jaxllm.planning.tpu.memory import divide, peak_bytes
from jaxllm.planning.tpu.prediction import TpuCosts
from jaxllm.planning.tpu.remedies import single_changes
from jaxllm.planning.tpu.topology import EXAMPLES, parse_topology
from jaxllm.planning.tpu.tuning import POINTS, candidates, meshes, passes
from jaxllm.planning.utilization import expected_utilization

# What JAX calls the devices.
KINDS = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "tpu7x": "TPU7x"}


def make_config(**sections):
    return RunConfig.model_validate(
        {
            "name": "planned",
            "model": {
                "family": "llama",
                "hidden_size": 256,
                "intermediate_size": 512,
                "num_attention_heads": 8,
                "num_key_value_heads": 4,
                "num_hidden_layers": 2,
                "vocab_size": 512,
            },
            "data": {"tokenizer": {"train": "bpe", "vocab_size": 512}, "sequence_length": 256},
            "optimizer": {"learning_rate": 1e-3},
            "training": {"steps": 1, "global_batch": 16},
            **sections,
        }
    )


def test_every_example_of_a_topology_is_one():
    for listed in EXAMPLES.values():
        for name in listed.split():
            topology = parse_topology(name)
            assert topology.name == name
            assert topology.generation.clock_hz * (topology.generation.chip.flops_per_cycle or 0) > 1e14


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("h100:8x8", "there are v4:2x2x1"),
        ("v5p", "is not a TPU topology"),
        ("v5p:4x4", "gives 2 dimensions, but v5p has 3"),
        ("v6e:4x4x4", "gives 3 dimensions, but v6e has 2"),
        ("v5p:3x4x4", "cannot be cut into hosts of 2x2x1"),
        ("v5e:0x4", "0"),
    ],
)
def test_an_impossible_topology_is_refused(name, said):
    with pytest.raises(JaxllmError) as caught:
        parse_topology(name)
    assert said in str(caught.value)


def test_devices_of_a_topology():
    assert parse_topology("v5p:4x4x8").devices == 128
    assert parse_topology("tpu7x:2x2x1").devices == 8
    assert parse_topology("v6e:4x4", slices=2).devices == 32


def places(x, y, z=1, slices=1):
    return [(s, i, j, k, 0) for s in range(slices) for k in range(z) for j in range(y) for i in range(x)]


def test_a_gather_over_a_line_and_over_a_ring():
    size = 1e9
    link = GENERATIONS["v5p"].link
    line = Links(parse_topology("v5p:2x2x1"), places(2, 2))
    assert line.seconds("all-gather", [(0, 1)], size) == pytest.approx(size / 2 / link, rel=0.01)
    ring = Links(parse_topology("v5p:4x4x4"), places(4, 4, 4))
    assert ring.seconds("all-gather", [(0, 1, 2, 3)], size) == pytest.approx(size * 3 / 4 / (2 * link), rel=0.01)
    whole = ring.seconds("all-gather", [tuple(range(64))], size)
    assert whole == pytest.approx(size * 63 / 64 / (6 * link), rel=0.01)
    assert ring.seconds("all-reduce", [tuple(range(64))], size) == pytest.approx(2 * whole, rel=0.01)


def test_a_gather_over_slices_takes_the_data_centre_network():
    links = Links(parse_topology("v5p:2x2x1", 2), places(2, 2, 1, 2))
    dcn = GENERATIONS["v5p"].dcn
    across = links.seconds("all-reduce", [(0, 4)], 1e9)
    assert across == pytest.approx(1e9 / dcn, rel=0.01)
    assert links.seconds("all-reduce", [tuple(range(8))], 1e9) > across / 4


def test_bytes_on_the_wire():
    assert wire_bytes("all-gather", 4, 100) == 75
    assert wire_bytes("all-reduce", 4, 100) == 150
    assert wire_bytes("collective-permute", 2, 100) == 100
    assert wire_bytes("all-gather", 1, 100) == 0


def test_the_kernel_computes_the_blocks_that_are_not_hidden():
    causal = AttentionShape(1024, True, (None,), forward_blocks=(256, 256), backward_blocks=(512, 512), fused=False)
    assert causal.computed_fraction((256, 256)) == (4 * 5 / 2) / 16
    assert causal.computed_fraction((1024, 1024)) == 1.0
    window = AttentionShape(1024, True, (256,), (256, 256), (256, 256), False)
    assert window.computed_fraction((256, 256)) == 7 / 16
    mixed = AttentionShape(1024, True, (256, None, None), (256, 256), (256, 256), False)  # as Gemma's layers
    assert mixed.computed_fraction((256, 256)) == (7 + 10 + 10) / 48
    ring = AttentionShape(4096, True, (None,), (256, 256), (256, 256), False, ring=4)
    assert [ring.computed_fraction((256, 256), length) for length in ring.lengths] == [10 / 16, 1.0]
    query = Array("bf16", (2, 4, 2, 1024, 64), 0)
    operands = (Array("s8", (1, 4, 4), 0), query, Array("bf16", (2, 4, 1024, 64), 0))
    square = 2 * query.elements * 1024
    forward = kernel_work("a/splash_mqa_fwd_segmented_residuals/b", operands, causal)
    assert (forward.flops, forward.steps) == (2 * square * 10 / 16, 2 * 4 * 2 * 16)
    assert kernel_work("splash_mqa_dkv_segmented", operands, causal).flops == 4 * square * 3 / 4
    assert kernel_work("splash_mqa_dq", operands, causal).flops == 3 * square * 3 / 4
    assert kernel_work("another_kernel", operands, causal).flops == 0


def test_kernels_of_experts_multiply_each_row_once():
    """Two experts here of eight that four devices share: a quarter of the rows, on average."""
    costs = TpuCosts(parse_topology("v5e:2x2"), [], None, spread=4)
    sizes = Array("s32", (3,), 0)
    rows, weights, gradient = (Array("bf16", dims, 0) for dims in ((1024, 64), (2, 64, 32), (1024, 32)))
    product = costs.kernel("jvp()/shard_map/ragged_dot_general/ragged-dot-none", (sizes, rows, weights))
    assert product == costs.kernel("transpose(jvp())/shard_map/jit(tgmm)/pallas_call", (sizes, rows, gradient))
    assert product[1] == 2 * 1024 * 64 * 32 / 4
    assert product[0] > 0


def test_blocks_are_those_that_the_model_of_the_kernel_prefers():
    """Of the sizes in question, for rows of 8,192 tokens: the time of one head, forward and backward."""

    def seconds(generation, block):
        shape = AttentionShape(8192, True, (None,), (block, block), (block, block), False)
        query = Array("bf16", (1, 8192, 128), 0)
        costs = TpuCosts(parse_topology(EXAMPLES[generation.name].split()[-1]), [], shape)
        return sum(costs.kernel(f"splash_mqa_{phase}", (query,))[0] for phase in ("fwd", "dq", "dkv"))

    for generation in GENERATIONS.values():
        chosen = blocks_for(KINDS[generation.name], 8192).query
        assert seconds(generation, chosen) < 1.03 * min(seconds(generation, block) for block in (256, 512, 1024, 2048))


def test_products_by_formula():
    model = resolve_model(make_config().model)
    parts = flops_per_token(model.spec, 256)
    common = {"model": model.spec, "rows": Rows(1000, 256), "ways": 256_000 // 250}
    none = expected_matmul_flops(**common, remat="none", attention_in_kernel=True)
    assert none == pytest.approx(250 * 3 * (parts.projections + parts.mlp + parts.head))
    full = expected_matmul_flops(**common, remat="full", attention_in_kernel=True)
    assert full - none == pytest.approx(250 * (parts.projections + parts.mlp * 2 / 3))
    kept = ("query", "attention_residual", "mlp_gate", "mlp_up@host")
    some = expected_matmul_flops(**common, remat=kept, attention_in_kernel=True)
    assert some - none == pytest.approx(250 * 2 * 2 * 2 * 256 * 128)  # keys and values of 4 heads of 32, in 2 layers
    assert expected_matmul_flops(**common, remat=kept, attention_in_kernel=False) is None


def test_without_a_kernel_every_row_meets_every_expert():
    small = make_config().model.huggingface
    config = make_config(model={**small, "family": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2})
    model = resolve_model(config.model).spec
    common = {"model": model, "rows": Rows(10, 128), "ways": 1, "remat": "none", "attention_in_kernel": True}
    products = 2 * model.layers * 3 * model.hidden_size * model.mlp.size * model.mlp.experts.per_token
    extra = expected_matmul_flops(**common) - expected_matmul_flops(**common, expert_kernel=True)
    assert extra == pytest.approx(10 * 128 * products * (model.mlp.experts.count - 1))


def test_memory_divides_at_the_fullest_moment():
    module = parse(
        """HloModule m

ENTRY %main (p: f32[64,16]) -> f32[64,16] {
  %p = f32[64,16]{1,0} parameter(0), metadata={op_name="params['layers.mlp.up.kernel']"}
  %m = f32[64,16]{1,0:S(5)} parameter(1), metadata={op_name="moments.exp_avg['layers.mlp.up.kernel']"}
  %b = s32[8]{0} parameter(2), metadata={op_name="batch.inputs"}
  %w = bf16[64,64]{1,0} convert(%p), metadata={op_name="jit(step)/convert_element_type"}
  %h = bf16[128,8]{1,0} negate(%w), metadata={op_name="jit(step)/jvp()/mul"}
  %g = f32[64,64]{1,0} negate(%h), metadata={op_name="jit(step)/transpose(jvp())/dot_general"}
  ROOT %r = f32[64,16]{1,0} negate(%g), metadata={op_name="jit(step)/add"}
}
"""
    )
    assignment = """BufferAssignment:
allocation 0: size 4096, parameter 0, shape |f32[64,16]| at ShapeIndex {}, maybe-live-out:
 value: <1 p @0> (size=4096,offset=0): f32[64,16]{1,0}
allocation 1: size 30000, preallocated-temp:
 value: <2 w @0> (size=8192,offset=0): bf16[64,64]{1,0}
 value: <3 h @0> (size=2048,offset=8192): bf16[128,8]{1,0}
 value: <4 g (phi) @0> (size=16384,offset=10240): f32[64,64]{1,0}
 value: <5 late @0> (size=20000,offset=0): f32[5000]{0}
allocation 2: size 99999, color 1, preallocated-temp:
 value: <6 vmem @0> (size=99999,offset=0): f32[2]{0}
allocation 3: size 1000000, color 5, preallocated-temp:
 value: <7 far @0> (size=1000000,offset=0): f32[250000]{0}
"""
    live = "  BufferLiveRange:\n    w{}:1-5\n    h{}:2-6\n    g{}:3-7\n    late{}:8-9\n    vmem{}:1-9\n    far{}:1-9\n"
    shards = {"layers.mlp.up.kernel": [[1, 64, 64], [1, 64, 16]]}
    found = divide(module, assignment, live, shards, 4096 + 32 + 30000)
    assert (found.parameters, found.moments, found.other, found.host) == (4096, 0, 32, 4096 + 1000000)
    assert (found.gradients, found.activations, found.temporaries) == (16384, 2048, 30000 - 16384 - 2048)
    assert found.total == 4096 + 32 + 30000
    analysis = {"argument_size": 4128, "peak_memory": 1004128}  # XLA's: the host's buffer is the largest
    assert peak_bytes(assignment, analysis) == 4128 + 30000
    without = assignment.replace("color 5", "color 6")
    assert peak_bytes(without, {**analysis, "peak_memory": 33000}) == 33000


def test_changes_of_a_run_file():
    config = make_config(parallel={"data": -1, "fsdp": 2})
    assert sizes_of(config, 16)["data"] == 8
    assert rows_per_device(config, 16) == micro_batch_of(config, 16) == 1
    other = changed(config, {"parallel.data": 1, "parallel.fsdp": 4, "jax.remat": "full"})
    assert (other.parallel.fsdp, other.jax.remat, rows_per_device(other, 4)) == (4, "full", 4)
    assert (
        spelled({"jax.remat": "full", "training.micro_batch": None}) == "--set jax.remat=full --set training.micro_batch=null"
    )
    assert spelled({"jax.remat": ("query", "mlp_up@host")}) == "--set 'jax.remat=[query, mlp_up@host]'"
    assert spelled({}) == "as it is"


def test_remedies_are_tried_from_the_cheapest():
    config = make_config(parallel={"data": 2, "fsdp": 2})
    changes = list(single_changes(config, 4))
    assert changes[0] == {"parallel.data": 1, "parallel.fsdp": 4}
    assert {"jax.remat": "full"} in changes
    assert {"training.micro_batch": 2} in changes
    assert {"training.micro_batch": 1} in changes
    assert changes[-1] == {"jax.offload_optimizer": "all"}
    sparing = changed(config, {"jax.remat": "full", "jax.offload_optimizer": "all", "training.micro_batch": 1})
    assert list(single_changes(changed(sparing, {"parallel.data": 1, "parallel.fsdp": 4}), 4)) == [{"jax.remat": "offload"}]


def test_what_tuning_tries():
    config = make_config()
    spec = resolve_model(config.model).spec
    splits = [tuple(mesh.values()) for mesh in meshes(spec, config, 8)]
    assert splits[0] == (1, 8, 1)
    assert (2, 2, 2) in splits
    assert all(data * fsdp * tensor == 8 and tensor <= 4 for data, fsdp, tensor in splits)  # 4 key/value heads
    tried = list(passes(changed(config, {"parallel.fsdp": 8, "parallel.data": 1}), 8))
    assert tried[0]["training.micro_batch"] == 2
    assert {"training.micro_batch": 1, "jax.remat": "full"} in tried


def test_tuning_compiles_the_largest_passes_that_may_fit_first():
    config = make_config(parallel={"data": -1, "fsdp": 4})
    model, where = resolve_model(config.model), parse_topology("v5e:2x2")
    ranked = candidates(model, config, where)
    assert ranked[0].needs <= 1.07 * where.generation.chip.memory_bytes
    assert [each.seconds for each in ranked] == sorted(each.seconds for each in ranked)
    equal = [each.rows for each in ranked if each.seconds == ranked[0].seconds and each.mesh == ranked[0].mesh]
    assert equal == sorted(equal, reverse=True)
    assert all("parallel.data" not in each.changes for each in ranked)  # it takes what the other axes leave


def test_points_by_name_cost_the_products_that_run_again():
    config, devices = make_config(), parse_devices("v5e:2x2")
    model, use = resolve_model(config.model), expected_utilization(devices.chip, 1e9)

    def arithmetic(remat):
        setting = setting_of(changed(config, {"jax.remat": remat}), "jax", 4, "splash")
        return speed(model, setting, devices, use).arithmetic

    assert arithmetic(POINTS[0]) == arithmetic("none")
    assert arithmetic("none") < arithmetic(POINTS[1]) < arithmetic(("layer_input",)) < arithmetic("full")
