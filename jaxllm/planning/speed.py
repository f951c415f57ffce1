"""How long a step takes, well enough to rank settings: arithmetic at a published utilisation, and what is sent between devices.

    arithmetic   model FLOPs and what rematerialisation computes again, at peak x MFU of `utilization`
    fsdp, ZeRO   weights gathered for each pass over them, gradients added up and scattered, beside the arithmetic
    tensor       two sums over the devices in each layer and pass, which the next product waits for
    offload      what remat keeps in host memory, beside the arithmetic; the optimiser's state, waited for
    context      keys and values (JAX's ring, beside the arithmetic) or all heads (Ulysses, waited for)

Bytes are those of ring algorithms over the device's links; between GPU hosts 400 Gbit/s per GPU are assumed.  `jaxllm compile`
predicts a TPU's step from the compiled program instead, and is the better judge of any single setting.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxllm.config.remat import HOST
from jaxllm.families import Model, ModelSpec
from jaxllm.metrics.flops import flops_per_token
from jaxllm.planning.devices import Devices
from jaxllm.planning.jax_activations import saved_bytes
from jaxllm.planning.setting import Setting, axes_of
from jaxllm.planning.stacks import stacks_of
from jaxllm.planning.tpu.expected import recomputed_flops
from jaxllm.planning.utilization import Utilization

BETWEEN_HOSTS = 50e9
"""Bytes/s that a GPU sends to another host: 400 Gbit/s, as in the published clusters of the table of utilisation."""

TO_HOST = 16e9
"""Bytes/s between a device and its host, one way: half of what PCIe 4 x16 has on paper, as several devices share it."""

# Forward passes that are computed again: of a layer's arithmetic, all with `full`; with `dots` what is no plain product, whose
# time is mostly memory traffic.
RECOMPUTED = {"none": 0.0, "dots": 0.1, "products": 0.1, "offload": 0.1, "full": 1.0}


@dataclass(frozen=True)
class Speed:
    """One step, in seconds.  arithmetic: computation; hidden: transfers beside it; waited: transfers that are waited for."""

    arithmetic: float
    hidden: float
    waited: float

    @property
    def seconds(self) -> float:
        """The whole step."""
        return max(self.arithmetic, self.hidden) + self.waited


def speed(model: Model, setting: Setting, devices: Devices, utilization: Utilization) -> Speed:
    """Seconds of an optimiser step."""
    spec, parallel, width = model.spec, setting.parallel, setting.compute_bytes
    flops = setting.step_tokens * utilization.counted(flops_per_token(spec, setting.sequence, setting.target))
    again = _again(spec, setting)
    arithmetic = flops * (1 + again / 3) / (devices.flops * utilization.mfu)
    rate = _rate(devices)
    held = (
        sum(rule.parameters / (parallel.expert if "experts" in axes_of(rule) else 1) for rule in model.rules) / parallel.tensor
    )
    passes = setting.accumulation
    shards = setting.groups * parallel.context if setting.backend == "deepspeed" else parallel.fsdp
    gathered = 0.0
    if setting.backend == "jax" and parallel.fsdp > 1:
        gathered = held * width * (3 * passes)  # gathered twice, scattered once, in every micro-batch
    elif setting.backend == "deepspeed" and setting.zero_stage == 3 and shards > 1:
        gathered = held * (2 * width + 4) * passes
    elif setting.zero_stage in (1, 2) and shards > 1:
        gathered = held * (width + 4 * (passes if setting.zero_stage == 2 else 1))
    summed = 0.0
    if setting.backend == "jax" and parallel.data > 1:
        summed = 2 * 4 * held / parallel.fsdp
    elif setting.backend == "deepspeed" and setting.zero_stage == 0 and shards > 1:
        summed = 2 * 4 * held
    residual = setting.tokens * spec.hidden_size * width
    residuals = sum(stack.layers * stack.tokens for stack in stacks_of(spec, setting)) * spec.hidden_size * width
    waited = 0.0
    if parallel.tensor > 1:
        share = (parallel.tensor - 1) / parallel.tensor
        sums = 4 + 2 * min(again, 1.0)  # two forward, two backward, two where the layer is computed again
        waited += sums * 2 * residuals * share * passes
    hidden = gathered + summed
    if parallel.context > 1:
        keys = setting.tokens * 2 * spec.attention.kv_heads * spec.attention.head_dim * width / parallel.tensor
        if setting.backend == "jax":
            hidden += keys * (parallel.context - 1) * 3 * spec.layers * passes
        else:
            waited += 3 * (2 * residual + keys) * spec.layers * passes
    to_host = 2.0 * saved_bytes(spec, setting)[1] * passes if setting.backend == "jax" else 0.0
    offloaded = 16 * held / shards / TO_HOST if setting.offload_optimizer != "none" else 0.0  # moments there and back
    return Speed(arithmetic, max(hidden / rate, to_host / TO_HOST), waited / rate + offloaded)


def _again(spec: ModelSpec, setting: Setting) -> float:
    """Forward passes that are computed again: of points by name, the products whose result is not kept."""
    if isinstance(setting.remat, str):
        return RECOMPUTED[setting.remat]
    points = {point.removesuffix(HOST) for point in setting.remat}
    forward = flops_per_token(spec, setting.sequence)
    attention = 0.0 if "attention_mixed" in points else forward.attention
    return min(1.0, (recomputed_flops(spec, points) + attention) / forward.forward)


def _rate(devices: Devices) -> float:
    """Bytes/s that a device sends."""
    chip = devices.chip
    if chip.kind == "gpu" and devices.chips > chip.chips_per_host:
        return min(chip.interconnect, BETWEEN_HOSTS)
    return chip.interconnect
