"""The run file: its schema, loading it, and resolving what it leaves open."""

from jaxllm.config.schema import RunConfig

__all__ = ["RunConfig"]
