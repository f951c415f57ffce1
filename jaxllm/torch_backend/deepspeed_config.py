"""The DeepSpeed config of a run, written out in full: nothing is `auto` and no default that matters is left unsaid."""

from __future__ import annotations

from typing import Any

from jaxllm.config.batch import BatchPlan
from jaxllm.config.schema import DeepSpeedConfig, RunConfig
from jaxllm.run import Run
from jaxllm.torch_backend.bucket import LARGEST_BUCKET, bucket_elements
from jaxllm.torch_backend.mesh import Mesh

_NEVER = 10**12


def deepspeed_config(run: Run, plan: BatchPlan, mesh: Mesh) -> dict[str, Any]:
    """What `deepspeed.initialize` gets.

    The optimiser is not part of it: jaxllm hands DeepSpeed a torch AdamW with its decay groups, on the CPU too.  Sequence
    parallelism is not part of it either: to ZeRO the processes that share a sequence are replicas like any other.  The batch it
    is told of counts every row once for each process that computes it, which is how DeepSpeed checks it.
    """
    config = run.config
    stage = config.deepspeed.zero_stage
    clip = config.optimizer.clip_norm or 0.0
    return {
        "train_batch_size": plan.micro_batch * plan.accumulation * mesh.group.world,
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "managed_gradient_accumulation": True,
        # At stage 0 DeepSpeed clips but neither reports the norm nor stops at NaN, so the optimiser does all three.
        "gradient_clipping": clip if stage else 0.0,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "fp16": {"enabled": False},
        "bf16": _bf16(config),
        "zero_optimization": _zero(config.deepspeed, mesh, bucket_elements(run.model, mesh.tensor, mesh.group.device.type)),
        "zero_allow_untested_optimizer": False,
        "zero_force_ds_cpu_optimizer": False,
        "tensor_parallel": {"autotp_size": mesh.tensor, "vocab_parallel_lm_head": False, "tp_overlap_comm": False},
        "steps_per_print": _NEVER,
        "wall_clock_breakdown": False,
        "memory_breakdown": False,
        "dump_state": False,
    }


def _bf16(config: RunConfig) -> dict[str, bool]:
    # DeepSpeed has no stage 0 with bf16 compute and fp32 gradient accumulation: there it sees only the fp32 masters, and
    # `jaxllm.torch_backend.masters` holds the bf16 copy that computes.
    return {
        "enabled": config.training.precision == "bf16" and config.deepspeed.zero_stage > 0,
        "immediate_grad_update": False,
        "check_grad_overflow": True,
        "bf16_master_weights_and_grads": False,
        "bf16_optimizer_states": False,
    }


def _zero(config: DeepSpeedConfig, mesh: Mesh, bucket: int) -> dict[str, Any]:
    stage = config.zero_stage
    common: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        "overlap_comm": stage == 3,
        "reduce_scatter": True,
        "reduce_bucket_size": bucket,
        "allgather_partitions": True,
        "allgather_bucket_size": LARGEST_BUCKET[mesh.group.device.type],  # a bound, not a buffer
        "round_robin_gradients": False,
        "elastic_checkpoint": False,
        "ignore_unused_parameters": False,
    }
    # Page-locked memory is what a GPU copies from and to without waiting.
    on_cpu = {"device": "cpu", "pin_memory": mesh.group.device.type == "cuda"}
    if config.offload_optimizer != "none":
        common["offload_optimizer"] = {**on_cpu, "ratio": 1.0}
    if stage < 3:
        return common
    if config.offload_param != "none":
        common["offload_param"] = on_cpu
    return {
        **common,
        "sub_group_size": 1_000_000_000,
        "stage3_prefetch_bucket_size": 50_000_000,
        "stage3_param_persistence_threshold": 100_000,
        "stage3_max_live_parameters": 1_000_000_000,
        "stage3_max_reuse_distance": 1_000_000_000,
        "zero_hpz_partition_size": 1,
        "zero_quantized_weights": False,
        "zero_quantized_gradients": False,
    }
