"""The run file: its schema, loading it, and resolving what it leaves open."""

from jaxllm.config.batch import BatchPlan, data_parallel, resolve_batch, tokens_per_step, total_steps
from jaxllm.config.changes import changed_keys
from jaxllm.config.document import write_yaml
from jaxllm.config.loading import LoadedRun, load_run
from jaxllm.config.schema import RunConfig

__all__ = [
    "BatchPlan",
    "LoadedRun",
    "RunConfig",
    "changed_keys",
    "data_parallel",
    "load_run",
    "resolve_batch",
    "tokens_per_step",
    "total_steps",
    "write_yaml",
]
