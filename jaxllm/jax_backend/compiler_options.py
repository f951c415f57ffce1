"""What the compiler is told of a training step, by generation of TPU, for GPUs and for CPUs: the one table of its flags.

| flag | generations | what it does |
|---|---|---|
| xla_enable_async_all_gather | all | gathers weights beside the work before they are needed |
| xla_jf_spmd_threshold_for_windowed_einsum_mib | all | size from which a product with a sharded operand is cut into pieces that go round the ring; the pieces fill half of the matrix units, so: never |
| xla_tpu_enable_deduplicated_calls | all | code for operations that are alike, as the products of key and value, is made once and called; the compiler does so by itself when a program is too large. The step of Llama 3 70B on v5p:4x4x8 compiles in 83 to 88 s on two processors instead of 88 to 94 (a pair in turn: 86 and 88), to the same cycles |
| xla_tpu_enable_async_collective_fusion, ..._fuse_all_gather, ..._multiple_steps | v5e | runs collectives in pieces inside the products around them; newer compilers refuse it elsewhere, because results may be wrong |
| xla_tpu_overlap_compute_collective_tc | v5e | lets the TensorCore compute while it drives a collective |
| xla_tpu_enable_sparse_core_collective_offload_all_gather, ..._2d_all_gather, ..._3d_all_gather, ..._all_reduce, ..._reduce_scatter, ..._nd_reduce_scatter | v5p, v6e | SparseCores move the data of collectives beside the TensorCores' work, and sums of gradients over several dimensions of the torus stay reduce-scatters instead of becoming all-reduces of twice the bytes. Without it every collective there is synchronous: Llama 3 8B on v6e:4x4 waits 320 of 3,360 ms, with it 21 of 3,066. tpu7x does so by itself; v5e has no such cores. Why they are set, v5p included: docs/tpu_compile.md |
| xla_tpu_use_tc_device_shape_on_sc, xla_sc_disable_megacore_partitioning | v5p, v6e | where the SparseCores' programs run: MaxText sets both wherever it moves collectives to SparseCores, also for its 32B run on v5p (https://github.com/AI-Hypercomputer/maxtext, benchmarks/xla_flags_library.py, src/maxtext/configs/tpu/v5p/32b.sh) |
| xla_tpu_prefer_async_allgather_to_allreduce | v5p, v6e | weights that a compiler would gather by writing zeros around each shard and adding them up are gathered: half the bytes, and nothing to write. Llama 3 70B over fsdp 128 on v5p:4x4x8 has 1,123 all-gathers instead of as many all-reduces, takes 24.8 instead of 25.7 s a step and 34.4 instead of 37.9 GiB |
| xla_tpu_scoped_vmem_limit_kib | v5e, v5p, v6e | vector memory that one fusion or kernel may take (default: 16 MiB; v4 has no more). With it an MLP's products, forward and backward, fill 0.96 of the matrix units on v5p instead of 0.76, 0.95 instead of 0.77 on v5e; still more of it makes 2 % at most, and compiling twice as slow |
| xla_disable_hlo_passes=while-loop-all-reduce-code-motion | all, with fsdp | that pass moves sums of gradients out of the loop over micro-batches, which makes gradients whole that should stay in shards; it fails on a loss in chunks there, and gets an embedding's gradient wrong (https://github.com/openxla/xla/issues/49143) |
| xla_gpu_enable_latency_hiding_scheduler | GPUs, with several | starts collectives early and waits late, with products between (https://docs.jax.dev/en/latest/gpu_performance_tips.html); NVIDIA's own images for JAX set it, too. No GPU was at hand to measure others |
| xla_cpu_use_fusion_emitters=false | CPUs, with several devices | meshes of a CPU's virtual devices are for trying: XLA's older emitters compile a step in 0.6 of the time, and a mixture of experts over `expert` needs 0.8 of the memory; loops of one device's step are slower by them (benchmarks/LOG.md). jaxlib 0.12 has them no more, and then the option is left out |
| xla_cpu_prefer_vector_width=512 | CPUs, with one device | loops use all of AVX-512's registers where a processor has it, instead of half (on others their own width is the limit). 100 million parameters, 2,048 tokens, fp32: a step takes 0.96 of the time on an AMD EPYC (0.91 to 1.00, by hand: benchmarks/LOG.md) |

They are given with the step itself (`jax.jit(compiler_options=...)`), so that a trial compile and a run on the real chips have the
same ones, and no environment variable is needed.  Flags of the user's own in LIBTPU_INIT_ARGS hold beside them.
"""  # noqa: E501 - a table's rows

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import jax
from jax.sharding import Mesh, SingleDeviceSharding

Options = Mapping[str, bool | str]

_EVERYWHERE: Options = {
    "xla_tpu_enable_deduplicated_calls": "ENABLED",
    "xla_enable_async_all_gather": True,
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
}
_FUSED: Options = {
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_overlap_compute_collective_tc": True,
}

_OFFLOADED = ("all_gather", "2d_all_gather", "3d_all_gather", "all_reduce", "reduce_scatter", "nd_reduce_scatter")
_SPARSE_CORES: Options = {
    **{f"xla_tpu_enable_sparse_core_collective_offload_{kind}": True for kind in _OFFLOADED},
    "xla_tpu_use_tc_device_shape_on_sc": True,
    "xla_sc_disable_megacore_partitioning": True,
    "xla_tpu_prefer_async_allgather_to_allreduce": True,
}

# By what JAX calls the device, or its platform.
OPTIONS: Mapping[str, Options] = {
    "TPU v4": _EVERYWHERE,
    "TPU v5 lite": {**_EVERYWHERE, **_FUSED, "xla_tpu_scoped_vmem_limit_kib": "32768"},
    "TPU v5": {**_EVERYWHERE, **_SPARSE_CORES, "xla_tpu_scoped_vmem_limit_kib": "32768"},
    "TPU v6 lite": {**_EVERYWHERE, **_SPARSE_CORES, "xla_tpu_scoped_vmem_limit_kib": "98304"},
    "TPU7x": _EVERYWHERE,
    "gpu": {"xla_gpu_enable_latency_hiding_scheduler": True},
    "cpu": {"xla_cpu_use_fusion_emitters": False},
}
ONE_CPU: Options = {"xla_cpu_prefer_vector_width": "512"}
"""For a CPU that is one device."""


# Where gradients are kept in shards.
_SHARDED: Options = {"xla_disable_hlo_passes": "while-loop-all-reduce-code-motion"}


def compiler_options(mesh: Mesh) -> dict[str, bool | str] | None:
    """For `jax.jit` on that mesh; None for devices that the table does not have."""
    device = mesh.devices.flat[0]
    alone = mesh.size == 1
    found = ONE_CPU if alone and device.platform == "cpu" else OPTIONS.get(device.device_kind, OPTIONS.get(device.platform))
    if found is None or (alone and device.platform not in ("cpu", "tpu")):
        return None
    if device.platform == "tpu":
        return {**found, **(_SHARDED if mesh.shape["fsdp"] > 1 else {})}
    return {name: value for name, value in found.items() if _is_known(name, value, device.platform)}


@cache
def _is_known(name: str, value: bool | str, platform: str) -> bool:
    """Whether the installed jaxlib still has an option.  Only its compiler can tell, by compiling something."""
    nothing = jax.ShapeDtypeStruct((), "int32", sharding=SingleDeviceSharding(jax.local_devices(backend=platform)[0]))
    try:
        jax.jit(lambda x: x, compiler_options={name: value}).lower(nothing).compile()
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" in str(error):
            return False
        raise
    return True
