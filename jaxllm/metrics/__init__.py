"""What a run reports: throughput, model FLOPs, records, the sinks they go to, the plot, and the environment."""

from jaxllm.metrics.chips import peak_flops
from jaxllm.metrics.flops import flops_per_token
from jaxllm.metrics.meter import Meter, Throughput
from jaxllm.metrics.records import TrainRecord, ValidationRecord

__all__ = ["Meter", "Throughput", "TrainRecord", "ValidationRecord", "flops_per_token", "peak_flops"]
