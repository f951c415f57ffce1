"""Attention on a CPU, forward and backward: jaxllm's kernels and torch's scaled_dot_product_attention, alternating.

    python -m benchmarks.attention_cpu [--pairs 7] [--json OUT]

Shapes: batch x sequence, query heads / key and value heads x head_dim, causal, fp32, all processors; JAX compiles with
the options of a training step.  JAX and torch are in a process each, since threads of one that wait take time from the other.
Each round runs every contender once, one after the other, so other load meets all of them, each after a pause and calls
that are not timed; each round gives a ratio to torch's, and medians are printed.  The results are checked to be the same first.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks._report import write


class Shape(NamedTuple):
    """One case: B, S, query heads, key and value heads, D."""

    batch: int
    sequence: int
    heads: int
    kv_heads: int
    head_dim: int


SHAPES = (
    Shape(8, 256, 8, 4, 32),
    Shape(4, 512, 8, 8, 64),
    Shape(4, 512, 12, 4, 64),
    Shape(1, 2048, 8, 4, 32),
    Shape(1, 2048, 8, 8, 64),
)
Call = Callable[[], Any]
PAUSE = 0.3
"""Seconds in which the threads of the contender before go to sleep."""
BURST = 0.3
"""Seconds of calls that follow each other as in training: first so many that are not timed, then so many that are."""


def arrays(shape: Shape) -> list[np.ndarray]:
    """Query, key, value and the gradient of the output, (B, S, heads, D)."""
    random = np.random.default_rng(0)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    return [random.standard_normal((shape.batch, shape.sequence, n, shape.head_dim), np.float32) for n in heads]


def jax_calls(shape: Shape) -> dict[str, tuple[Call, Call]]:
    """By kernel: the forward pass, and forward with backward."""
    import jax
    import jax.numpy as jnp

    from jaxllm.families.spec import AttentionSpec
    from jaxllm.jax_backend.attention import sequence_visibility, xla_attention
    from jaxllm.jax_backend.attention.blocked import blocked_attention
    from jaxllm.jax_backend.compiler_options import compiler_options
    from jaxllm.jax_backend.mesh import single_device_mesh
    from jaxllm.jax_backend.model.runtime import Runtime
    from jaxllm.jax_backend.precision import policy_of
    from jaxllm.jax_backend.sharding import Layout

    runtime, options = Runtime(policy_of("fp32"), Layout(single_device_mesh())), compiler_options(single_device_mesh())
    spec = AttentionSpec(shape.heads, shape.kv_heads, shape.head_dim, shape.head_dim**-0.5, qkv_bias=False, output_bias=False)
    segments = jnp.ones((shape.batch, shape.sequence), jnp.int32)
    visibility = sequence_visibility(segments, np.arange(shape.sequence, dtype=np.int32))
    query, key, value, gradient = map(jnp.asarray, arrays(shape))
    calls: dict[str, tuple[Call, Call]] = {}
    for name, kernel in (("jax xla", xla_attention), ("jax blocked", blocked_attention)):

        def attend(q: Any, k: Any, v: Any, kernel: Any = kernel) -> Any:
            return kernel(q, k, v, visibility, spec, runtime, None)

        def both(q: Any, k: Any, v: Any, attend: Any = attend) -> Any:
            mixed, pull = jax.vjp(attend, q, k, v)
            return mixed, *pull(gradient)

        one, two = (jax.jit(f, compiler_options=options).lower(query, key, value).compile() for f in (attend, both))
        calls[name] = (
            lambda one=one: jax.block_until_ready(one(query, key, value)),
            lambda two=two: jax.block_until_ready(two(query, key, value)),
        )
    return calls


def torch_calls(shape: Shape) -> dict[str, tuple[Call, Call]]:
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    query, key, value, gradient = (torch.from_numpy(x).transpose(1, 2).contiguous() for x in arrays(shape))
    leaves = [x.clone().requires_grad_() for x in (query, key, value)]

    def forward() -> Any:
        with torch.no_grad():
            return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2)

    def both() -> Any:
        out = scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
        gradients = torch.autograd.grad(out, leaves, gradient)
        return tuple(x.detach().transpose(1, 2) for x in (out, *gradients))

    return {"torch sdpa": (forward, both)}


def work(make: Callable[[Shape], dict[str, tuple[Call, Call]]], shape: Shape, pipe: Connection) -> None:
    """One library's process: says its contenders and what they compute, then times the calls that it is asked for."""
    calls = make(shape)
    pipe.send({name: [np.asarray(x) for x in both()] for name, (_, both) in calls.items()})
    while (asked := pipe.recv()) is not None:
        name, index = asked
        _repeat(calls[name][index])
        pipe.send(statistics.median(_repeat(calls[name][index])))


def _repeat(call: Call) -> list[float]:
    """Seconds of each call, for `BURST` of them; a processor that was idle takes its time to be fast again."""
    times: list[float] = []
    while sum(times) < BURST:
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return times


def check(results: dict[str, list[np.ndarray]]) -> None:
    wanted = results["torch sdpa"]
    for name, found in results.items():
        for one, other in zip(found, wanted, strict=True):
            error = np.abs(one - other).max() / np.abs(other).max()
            if error > 1e-5:
                raise SystemExit(f"{name} is {error:.1e} away from torch: nothing is measured")


def measure(shape: Shape, pairs: int) -> dict[str, Any]:
    spawn = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    results: dict[str, list[np.ndarray]] = {}
    processes = []
    for make in (torch_calls, jax_calls):
        pipe, theirs = spawn.Pipe()
        processes.append(spawn.Process(target=work, args=(make, shape, theirs)))
        processes[-1].start()
        said = pipe.recv()
        results |= said
        pipes |= dict.fromkeys(said, pipe)
    check(results)
    found = {"shape": shape._asdict()} | {
        kind: _alternated(pipes, index, pairs) for index, kind in enumerate(("forward", "forward_backward"))
    }
    for pipe in set(pipes.values()):
        pipe.send(None)
    for process in processes:
        process.join()
    for kind in ("forward", "forward_backward"):
        row = "   ".join(f"{name} {r['milliseconds']:7.1f} ms ({r['ratio_to_torch']:.2f})" for name, r in found[kind].items())
        print(f"{'x'.join(map(str, shape)):18} {kind:17} {row}", flush=True)
    return found


def _alternated(pipes: dict[str, Connection], index: int, pairs: int) -> dict[str, dict[str, float]]:
    seconds: dict[str, list[float]] = {name: [] for name in pipes}
    for _ in range(pairs):
        for name, pipe in pipes.items():
            time.sleep(PAUSE)
            pipe.send((name, index))
            seconds[name].append(pipe.recv())
    return {
        name: {
            "milliseconds": 1e3 * statistics.median(times),
            "ratio_to_torch": statistics.median(
                ours / theirs for ours, theirs in zip(times, seconds["torch sdpa"], strict=True)
            ),
        }
        for name, times in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    write(arguments.json, {"cases": [measure(shape, arguments.pairs) for shape in SHAPES]})


if __name__ == "__main__":
    main()
