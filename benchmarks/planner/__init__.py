"""What `jaxllm plan` predicts against what is measured: memory under JAX and DeepSpeed, and FLOPs.

    python -m benchmarks.planner [--only cpu|tpu|deepspeed|flops] [--case NAME] [--again] [--json OUT]

* JAX on CPU meshes and on TPU topologies (with libtpu installed): the real step, compiled for shapes alone, against XLA's
  `memory_analysis`: on TPU its peak, on CPU arguments + temporaries, since XLA:CPU reports no peak.
* Steps at full size that `tpu_full_size`, `tpu_maxtext` and `tpu_published` have compiled are taken from their results.
* DeepSpeed: a real run of four steps in one or two processes over gloo: the tensors that are alive between two steps, and the
  highest rise of allocations within the next one, by torch's profiler.
* FLOPs of a forward and a backward pass of one layer and the rest of the model, against XLA's `cost_analysis`.

Each case runs in a process of its own.  With `--json` a case whose row is in the file already is not measured again (unless
`--again` is given): only what is predicted is computed anew, so that a run that was ended goes on where it stopped, and the
file always compares with the formulas of today.  Runs of several kinds may share a file.
"""
