"""litgpt's GPT under Lightning Fabric, as its own pretraining does it: compiled, with its chunked cross-entropy."""

from __future__ import annotations

from pathlib import Path

import lightning
import torch
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
from litgpt.utils import chunked_cross_entropy
from safetensors.torch import load_file

from benchmarks.throughput.workers.adamw import adamw
from benchmarks.throughput.workers.protocol import CLIP_NORM, Clock, Request, read_request, write_answer


def make_config(request: Request) -> Config:
    """The request's Llama in litgpt's words."""
    keys = request.config
    return Config(
        name="throughput",
        block_size=keys["max_position_embeddings"],
        vocab_size=keys["vocab_size"],
        padded_vocab_size=keys["vocab_size"],
        n_layer=keys["num_hidden_layers"],
        n_head=keys["num_attention_heads"],
        n_query_groups=keys["num_key_value_heads"],
        n_embd=keys["hidden_size"],
        intermediate_size=keys["intermediate_size"],
        norm_class_name="RMSNorm",
        norm_eps=keys["rms_norm_eps"],
        mlp_class_name="LLaMAMLP",
        rotary_percentage=1.0,
        rope_base=int((keys.get("rope_parameters") or {}).get("rope_theta", 10_000)),
        parallel_residual=False,
        bias=False,
        lm_head_bias=False,
    )


def main() -> None:
    request = read_request()
    clock = Clock(request)
    precision = "bf16-mixed" if request.precision == "bf16" else "32-true"
    fabric = lightning.Fabric(accelerator=request.device, devices=1, precision=precision)
    config = make_config(request)
    with fabric.init_module():
        model = GPT(config)
    files = Path(request.folder).glob("*.safetensors")
    weights = {name: tensor for file in files for name, tensor in load_file(file).items()}
    converted: dict[str, torch.Tensor] = {}
    copy_weights_hf_llama(config, {}, converted, weights)
    if request.config.get("tie_word_embeddings"):
        model.transformer.wte.weight = model.lm_head.weight
        converted["lm_head.weight"] = converted["transformer.wte.weight"]
    model.load_state_dict(converted)
    model.max_seq_length = request.tokens().shape[2] - 1
    optimizer = adamw(model, request.device)
    model = fabric.setup(torch.compile(model))
    optimizer = fabric.setup_optimizers(optimizer)
    for tokens in clock.batches():
        rows = torch.from_numpy(tokens).to(fabric.device)
        loss = chunked_cross_entropy(model(rows[:, :-1].contiguous()), rows[:, 1:].contiguous())
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        clock.done(loss.detach())
    write_answer(clock.answer(torch.cuda.max_memory_allocated() if request.device == "cuda" else None))


if __name__ == "__main__":
    main()
