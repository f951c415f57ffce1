"""What one process of a test of DeepSpeed meshes does: every layout of one world size in one go.

Run as deepspeed_worker.py is; the findings have the same form.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
import transformers

from jaxllm.state.portable import write_state
from jaxllm.state.training_state import Progress
from jaxllm.torch_backend.combinations import AUTOTP_FAMILIES
from tests.distributed.deepspeed_cases import MeshCase, make_batch, make_hyper, make_run, mesh_cases, random_state, with_labels
from tests.distributed.deepspeed_worker import Worker, infinite_gradient
from tests.tiny import TINY


class MeshWorker(Worker):
    def laid_out(self, case: MeshCase) -> None:
        """Evaluation and four steps from the initialiser; then a state from elsewhere, as it comes back out and goes on."""
        with self.started(case.run) as backend:
            evaluated = backend.evaluate([make_batch(100, backend.shard)])
            self.record(f"evaluation/{case.key}", [evaluated.loss_sum, evaluated.target_tokens])
            self.record(f"steps/{case.key}", self.steps(backend, 0, 4))
            self.keep(f"final/{case.key}", backend.export(Progress(4, 4)))
            self.record(f"memory/{case.key}", backend.memory_bytes())
            state, folder = random_state(case.run), self.folder / f"random_state-{case.family}"
            if backend.is_main and not folder.exists():
                write_state(state, folder, case.run.model.huggingface_config)
            backend.barrier("written")
            backend.restore(folder)
            self.keep(f"restored/{case.key}", backend.export(state.progress))
            self.record(f"continued/{case.key}", self.steps(backend, 9, 11))

    def guarded_on_a_mesh(self, case: MeshCase) -> None:
        """A NaN loss, then a gradient that is infinite on the last process alone, between two good steps."""
        with self.started(case.run) as backend:
            self.steps(backend, 0, 1)
            self.keep(f"before_fault/{case.key}", backend.export(Progress(1, 1)))
            bad = make_batch(1, backend.shard)
            bad.weights[0, -1] = np.nan
            result = backend.step(bad, make_hyper(1))
            self.record(f"nan_loss/{case.key}", [float(result.loss), float(result.gradient_norm)])
            with infinite_gradient(backend._group.rank == case.world - 1):
                self.record(f"infinite_gradient/{case.key}", self.steps(backend, 1, 2)[0][:2])
            self.keep(f"after_fault/{case.key}", backend.export(Progress(3, 1)))

    def decoded_on_a_mesh(self, case: MeshCase) -> None:
        """The logits of a key/value cache, between two steps."""
        tokens = [5, 17, 3, 44, 8, 29, 60]
        with self.started(case.run) as backend:
            decoder = backend.decoder(len(tokens))
            logits = [decoder.prefill(tokens[:3])] + [decoder.decode(token) for token in tokens[3:]]
            self.arrays[f"logits/{case.key}"] = np.stack(logits)
            self.record(f"after_decoding/{case.key}", self.steps(backend, 0, 1))

    def of_a_family(self, family: str, parallel: str) -> None:
        """Two steps in float64, two processes along one axis; the balance of experts is that of all rows on each."""
        micro_batch = 4 if parallel == "data" else 8
        run = make_run(f"tiny-{family}", precision="fp64", parallel={parallel: 2}, micro_batch=micro_batch)
        with self.started(run) as backend:
            self.record(f"family/{family}/{parallel}", self.steps(backend, 0, 2))
            self.keep(f"family/{family}/{parallel}", backend.export(Progress(2, 2)))

    def of_a_classifier(self, parallel: str) -> None:
        """The same of a decoder whose head reads the last token of a row."""
        run = make_run(
            "tiny-llama",
            precision="fp64",
            model={"pad_token_id": 0},
            parallel={parallel: 2},
            micro_batch=4 if parallel == "data" else 8,
            objective={"kind": "sequence-classification", "num_labels": 3},
        )
        with self.started(run) as backend:
            results = [backend.step(with_labels(make_batch(step, backend.shard), 3), make_hyper(step)) for step in range(2)]
            self.record(f"classifier/{parallel}", [[float(each.loss), float(each.gradient_norm)] for each in results])
            self.keep(f"classifier/{parallel}", backend.export(Progress(2, 2)))

    def run(self) -> None:
        transformers.logging.set_verbosity_error()  # it has its own mind about tiny models
        world = self.backend.shard.count
        for family in TINY if world == 2 else ():
            for axis in ("data", "context", *(["tensor"] if family in AUTOTP_FAMILIES else [])):
                self.of_a_family(family, axis)
        for axis in ("data", "tensor") if world == 2 else ():
            self.of_a_classifier(axis)
        for case in mesh_cases(world):
            self.laid_out(case)
            if world == 4 or case.family != "llama-heads" or case.precision == "bf16":
                continue
            if case.zero_stage != 1:
                self.guarded_on_a_mesh(case)
            if case.zero_stage in (0, 3) and not case.options:
                self.decoded_on_a_mesh(case)
        self.finish(world)


if __name__ == "__main__":
    torch.set_num_threads(1)
    MeshWorker(Path(sys.argv[1])).run()
