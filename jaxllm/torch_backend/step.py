"""One optimiser step and one evaluation, over micro-batches, whatever the engine."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from jaxllm.backend import EvaluationResult, Hyper, StepResult
from jaxllm.config.batch import BatchPlan
from jaxllm.config.loss_chunk import LossChunk, chunk_tokens
from jaxllm.data.batch import Batch
from jaxllm.families import ModelSpec
from jaxllm.torch_backend.chunked_loss import Tokens
from jaxllm.torch_backend.documents import Documents, goes_by_documents
from jaxllm.torch_backend.engine import Engine, chunked_loss, forward
from jaxllm.torch_backend.loss import weighted_loss
from jaxllm.torch_backend.mesh import Mesh
from jaxllm.torch_backend.model import AttentionKernel, mode, model_inputs
from jaxllm.torch_backend.routing import Routing


@dataclass(frozen=True)
class Loop:
    """Drives an engine over batches.  spec: of its model.  seed: of the run, for dropout.  loss_chunk: of the run file.

    compiled: whether the model is compiled by torch.compile.
    """

    engine: Engine
    mesh: Mesh
    plan: BatchPlan
    attention: AttentionKernel
    seed: int
    spec: ModelSpec
    loss_chunk: LossChunk = "none"
    compiled: bool = False

    def _loss_sum(
        self,
        batch: Batch,
        *,
        training: bool,
        share: torch.Tensor | None = None,
        found: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """This process's part of the losses of a micro-batch, and in training of what routers add to them (collective).

        share: what every target token's weight is multiplied by.  found: takes the outputs.
        """
        columns = self.mesh.tokens(batch.sequence_length)
        inputs = model_inputs(
            batch, self.spec, self.attention, self.engine.dtype, self._device, columns, documents=self._documents(batch)
        )
        weights = inputs.weights if share is None else inputs.weights * share
        chunk = None if found is not None else self.chunk_of(inputs.targets.numel())
        with self.engine.numerics():
            if chunk is not None:
                loss = chunked_loss(self.engine, inputs, Tokens(inputs.targets, weights, chunk))
            else:
                outputs = forward(self.engine, inputs)
                if found is not None:
                    found.append(outputs.to(torch.promote_types(outputs.dtype, torch.float32)))
                loss = weighted_loss(self.spec.head.loss, outputs, inputs.targets, weights)
            if training and self._routing is not None:
                self._routing.observe(inputs.real)
                loss = loss + self._routing.loss_sum(inputs.real, weights.sum(), self.mesh)
            return loss

    def _documents(self, batch: Batch) -> Documents | None:
        """Where documents lie, if attention goes by them.

        A compiled model goes by whole rows only: it would be compiled anew for every other place where documents can end.
        """
        found = Documents.of(batch.segments)
        if not goes_by_documents(self.spec, self.attention, max(found.lengths)):
            return None
        return found if found.whole or not self.compiled else None

    def chunk_of(self, tokens: int) -> int | None:
        """How many of a pass's tokens have logits at once; None: all."""
        if self.engine.model.loss_head is None:
            return None
        return chunk_tokens(self.loss_chunk, tokens, self.spec.vocab_size)

    @property
    def _routing(self) -> Routing | None:
        routing: Routing | None = self.engine.model.routing
        return routing

    @property
    def _device(self) -> torch.device:
        return self.mesh.group.device

    def _float64(self, value: float) -> torch.Tensor:
        return torch.tensor(value, dtype=torch.float64, device=self._device)

    def _target_tokens(self, batch: Batch) -> float:
        """Sum of the loss weights of the tokens that this process computes."""
        return float(batch.weights[:, self.mesh.tokens(batch.sequence_length)].sum(dtype=np.float64))

    def step(self, batch: Batch, hyper: Hyper, step: int) -> StepResult:
        """Forward and backward over the micro-batches, then one update."""
        with mode(self.engine.model, training=True):
            loss, tokens = self.accumulate(batch, step)
            norm = self.engine.update(hyper.learning_rate)
            statistics = {} if self._routing is None else self._routing.statistics(self.mesh)
        return StepResult(loss=loss, gradient_norm=norm, target_tokens=tokens, statistics=statistics)

    def accumulate(self, batch: Batch, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Forward and backward over the micro-batches (collective): the loss and the target tokens of the GLOBAL batch.

        The loss is divided by the number of target tokens of the GLOBAL batch, which is therefore summed over processes
        before the first backward pass; the factor `replicas` undoes the mean that every engine takes over them.
        """
        tokens = self.mesh.sum(self._float64(self._target_tokens(batch)))
        # Weighed by their share from the start: a loss in chunks has its gradients before it could be multiplied.
        share = self.mesh.replicas / tokens
        total = self._float64(0.0)
        micro_batches = list(split(batch, self.plan.micro_batch))
        for number, micro_batch in enumerate(micro_batches):
            self._seed_dropout(step, number)
            loss = self._loss_sum(micro_batch, training=True, share=share)
            total += loss.detach()
            if number == len(micro_batches) - 1:
                # A loss that is NaN or infinite on any process makes every gradient NaN, and thereby every engine, at every
                # stage, leaves the update out by its own check of the norm.
                finite = torch.isfinite(self.mesh.sum(total))
                loss = loss * torch.where(finite, self._float64(1.0), self._float64(torch.nan)).to(loss.dtype)
            self.engine.backward(loss)
        return total / self.mesh.replicas, tokens

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch], *, outputs: bool = False) -> EvaluationResult:
        """Sums, and if wanted the outputs, over all rows of all processes, without dropout."""
        gathered: list[torch.Tensor] = []
        sums = torch.zeros(2, dtype=torch.float64, device=self._device)
        with mode(self.engine.model, training=False):
            for batch in batches:
                found: list[torch.Tensor] | None = [] if outputs else None
                for micro_batch in split(batch, self.plan.micro_batch):
                    sums[0] += self._loss_sum(micro_batch, training=False, found=found)
                if found:
                    gathered.append(self._gather_rows(torch.cat(found)))
                sums[1] += self._target_tokens(batch)
        loss_sum, tokens = self.mesh.sum(sums).tolist()
        return EvaluationResult(loss_sum, tokens, torch.cat(gathered).cpu().numpy() if gathered else None)

    def _gather_rows(self, rows_RTL: torch.Tensor) -> torch.Tensor:
        """The rows of all processes, in their order (collective)."""
        if self.mesh.data == 1:
            return rows_RTL
        every = rows_RTL.new_zeros(self.mesh.data, *rows_RTL.shape)
        every[self.mesh.shard.index] = rows_RTL
        return self.mesh.sum(every).flatten(0, 1)

    def _seed_dropout(self, step: int, micro_batch: int) -> None:
        """Dropout of a micro-batch depends on nothing before it, so that a resumed run continues bit for bit.

        It is the same on the processes of a tensor group, which all compute the same residual stream.
        """
        part = f"{self.seed}/{step}/{micro_batch}/{self.mesh.replica_index}"
        words = hashlib.blake2b(part.encode(), digest_size=8).digest()
        torch.manual_seed(int.from_bytes(words, "little") >> 1)


def split(batch: Batch, rows: int) -> Iterator[Batch]:
    """Micro-batches of `rows` sequences; the last may have fewer."""
    for start in range(0, batch.rows, rows):
        yield batch.select(start, min(start + rows, batch.rows))
