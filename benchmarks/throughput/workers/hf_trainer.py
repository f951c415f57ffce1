"""transformers' Trainer with DeepSpeed, as its documentation sets it up.  Options: zero_stage, checkpoint."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from benchmarks.throughput.workers.protocol import (
    BETAS,
    CLIP_NORM,
    EPS,
    LEARNING_RATE,
    WEIGHT_DECAY,
    Clock,
    read_request,
    write_answer,
)


class Rows(torch.utils.data.Dataset):
    """All rows of all batches, in order."""

    def __init__(self, tokens: Any) -> None:
        self._rows = torch.from_numpy(tokens).flatten(0, 1)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._rows[index, :-1], "targets": self._rows[index, 1:]}


class InOrder(Trainer):
    """A Trainer that takes rows as they come, and whose loss is seen."""

    last: torch.Tensor | None = None

    def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
        targets = inputs.pop("targets")
        logits = model(**inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        self.last = loss.detach()
        return loss


class OnClock(TrainerCallback):
    """Tells the clock of every step."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.trainer: InOrder | None = None

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        next(self.clock.batches())  # starts the clock of the first step

    def on_step_end(self, *_: Any, **__: Any) -> None:
        assert self.trainer is not None
        self.clock.done(self.trainer.last)


def main() -> None:
    request = read_request()
    clock = Clock(request)
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="29577")
    bf16, cpu = request.precision == "bf16", request.device == "cpu"
    deepspeed = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": CLIP_NORM,
        "zero_optimization": {"stage": request.options["zero_stage"]},
        "bf16": {"enabled": bf16},
        # Its own AdamW for CPUs and GPUs is compiled when it is first used, which takes minutes and a compiler.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    tokens = request.tokens()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, deepspeed=deepspeed, per_device_train_batch_size=tokens.shape[1], max_steps=request.steps,
            learning_rate=LEARNING_RATE, lr_scheduler_type="constant", adam_beta1=BETAS[0], adam_beta2=BETAS[1],
            adam_epsilon=EPS, weight_decay=WEIGHT_DECAY, max_grad_norm=CLIP_NORM, bf16=bf16, use_cpu=cpu,
            optim="adamw_torch_fused", save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True,
            remove_unused_columns=False, dataloader_pin_memory=not cpu,
            gradient_checkpointing=bool(request.options.get("checkpoint")),
        )  # fmt: skip
        dtype = torch.bfloat16 if bf16 else torch.float32
        model = AutoModelForCausalLM.from_pretrained(request.folder, dtype=dtype, attn_implementation="sdpa")
        callback = OnClock(clock)
        trainer = InOrder(model, arguments, train_dataset=Rows(tokens), callbacks=[callback])
        callback.trainer = trainer
        trainer.train()
    write_answer(clock.answer(torch.cuda.max_memory_allocated() if not cpu else None))


if __name__ == "__main__":
    main()
