"""The Hugging Face model in a hand-written torch loop: eager, or with torch.compile.  Options: compile, checkpoint."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

from benchmarks.throughput.workers.adamw import adamw
from benchmarks.throughput.workers.protocol import CLIP_NORM, Clock, read_request, write_answer


def main() -> None:
    request = read_request()
    clock = Clock(request)
    torch.set_float32_matmul_precision("highest")
    model = AutoModelForCausalLM.from_pretrained(request.folder, dtype=torch.float32, attn_implementation="sdpa")
    model.config.use_cache = False
    model.to(request.device).train()
    if request.options.get("checkpoint"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = adamw(model, request.device)
    run = torch.compile(model) if request.options.get("compile") else model
    bf16 = request.precision == "bf16"
    for tokens in clock.batches():
        rows = torch.from_numpy(tokens).to(request.device)
        with torch.autocast(request.device, dtype=torch.bfloat16, enabled=bf16):
            logits = run(input_ids=rows[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.done(loss.detach())
    write_answer(clock.answer(torch.cuda.max_memory_allocated() if request.device == "cuda" else None))


if __name__ == "__main__":
    main()
