"""What the TPU compiler is told of a training step, by generation: the one table of its flags.

| flag | generations | what it does |
|---|---|---|
| xla_enable_async_all_gather | all | gathers weights beside the work before they are needed |
| xla_jf_spmd_threshold_for_windowed_einsum_mib | all | size from which a product with a sharded operand is cut into pieces that go round the ring; the pieces fill half of the matrix units, so: never |
| xla_tpu_enable_async_collective_fusion, ..._fuse_all_gather, ..._multiple_steps | v5e | runs collectives in pieces inside the products around them; newer compilers refuse it elsewhere, because results may be wrong |
| xla_tpu_overlap_compute_collective_tc | v5e | lets the TensorCore compute while it drives a collective |
| xla_tpu_scoped_vmem_limit_kib | v6e | vector memory that one fusion or kernel may take; its larger kernels need more than the default |

They are given with the step itself (`jax.jit(compiler_options=...)`), so that a trial compile and a run on the real chips have the
same ones, and no environment variable is needed.  Flags of the user's own in LIBTPU_INIT_ARGS hold beside them.
"""  # noqa: E501 - a table's rows

from __future__ import annotations

from collections.abc import Mapping

Options = Mapping[str, bool | str]

_EVERYWHERE: Options = {
    "xla_enable_async_all_gather": True,
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
}
_FUSED: Options = {
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_overlap_compute_collective_tc": True,
}

# By what JAX calls the device.
OPTIONS: Mapping[str, Options] = {
    "TPU v4": _EVERYWHERE,
    "TPU v5 lite": {**_EVERYWHERE, **_FUSED},
    "TPU v5": _EVERYWHERE,
    "TPU v6 lite": {**_EVERYWHERE, "xla_tpu_scoped_vmem_limit_kib": "98304"},
    "TPU7x": _EVERYWHERE,
}


def compiler_options(device_kind: str) -> dict[str, bool | str] | None:
    """For `jax.jit`; None on anything but a TPU of the table."""
    found = OPTIONS.get(device_kind)
    return None if found is None else dict(found)
