"""jaxllm: a backend driven as `jaxllm.training` drives it.  Options: backend, zero_stage, set (overrides by dotted key)."""

from __future__ import annotations

import numpy as np

from benchmarks.throughput.workers.protocol import (
    BETAS,
    CLIP_NORM,
    EPS,
    LEARNING_RATE,
    WEIGHT_DECAY,
    Clock,
    Request,
    read_request,
    write_answer,
)
from jaxllm.backend import Hyper, create_backend
from jaxllm.config import RunConfig
from jaxllm.data.batch import Batch
from jaxllm.families import resolve_model
from jaxllm.run import Run


def make_run(request: Request) -> Run:
    """The request as a run of jaxllm."""
    keys = {name: value for name, value in request.config.items() if name not in ("architectures", "model_type", "dtype")}
    rows, length = request.tokens().shape[1:]
    options = dict(request.options)
    config = RunConfig.model_validate(
        {
            "name": "throughput",
            "model": {"family": request.config["model_type"], **keys},
            "data": {"tokenizer": {"train": "bpe", "vocab_size": keys["vocab_size"]}, "sequence_length": length - 1},
            "optimizer": {
                "learning_rate": LEARNING_RATE, "betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY,
                "clip_norm": CLIP_NORM,
            },
            "schedule": {"kind": "constant"},
            "training": {
                "steps": request.steps, "global_batch": rows, "precision": request.precision, **options.get("training", {}),
            },
            "deepspeed": options.get("deepspeed", {}),
            "jax": options.get("jax", {}),
        }
    )  # fmt: skip
    return Run(config, resolve_model(config.model), request.steps)


def make_batch(tokens: np.ndarray) -> Batch:
    """(B, S + 1) tokens of whole documents."""
    rows, length = tokens.shape[0], tokens.shape[1] - 1
    ones = np.ones((rows, length), np.int32)
    positions = np.ascontiguousarray(np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)))
    inputs, targets = (np.ascontiguousarray(part, np.int32) for part in (tokens[:, :-1], tokens[:, 1:]))
    return Batch(inputs, targets, ones.astype(np.float32), positions, ones)


def hyper_of(step: int) -> Hyper:
    """Of a constant learning rate."""
    return Hyper(LEARNING_RATE, 1.0 - BETAS[0] ** (step + 1), 1.0 - BETAS[1] ** (step + 1))


def main() -> None:
    request = read_request()
    run = make_run(request)
    backend = create_backend(request.options["backend"])
    clock = Clock(request)
    backend.start(run, None)  # the initial weights of seed 0, which the folder holds
    clock.compiled(backend.compile_seconds)
    for step, tokens in enumerate(clock.batches()):
        clock.done(backend.step(make_batch(tokens), hyper_of(step)).loss)
    write_answer(clock.answer(backend.memory_bytes() if request.device == "cuda" else None))
    backend.close()


if __name__ == "__main__":
    main()
