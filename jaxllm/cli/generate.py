"""`jaxllm generate RUN`: continue a prompt, streaming to the terminal."""

from __future__ import annotations

import os
from pathlib import Path

import click

from jaxllm.cli.options import handle_errors, set_option


@click.command()
@click.argument("run", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--prompt", default="", help="Text to continue; empty: begin a new document.")
@click.option("--backend", type=click.Choice(["jax", "deepspeed"]), help="Default: the one the run names.")
@click.option("--step", type=click.IntRange(min=0), help="Checkpoint to use; default: the newest.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True)
@click.option("--temperature", type=click.FloatRange(min=0), default=0.8, show_default=True, help="0: the most likely token.")
@click.option("--top-k", type=click.IntRange(min=0), default=40, show_default=True, help="Only the k most likely; 0: all.")
@click.option(
    "--top-p",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=1.0,
    show_default=True,
    help="Only the most likely that together reach this probability.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--beams", type=click.IntRange(min=1), default=4, show_default=True, help="Encoder-decoders: 1 is greedy.")
@set_option("training.precision=bf16")
@handle_errors
def generate(  # noqa: PLR0913, PLR0917 - one for each option
    run: Path,
    prompt: str,
    backend: str | None,
    step: int | None,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    beams: int,
    overrides: tuple[str, ...],
) -> None:
    """Continue a prompt with the model in RUN: a run folder, or a folder that `jaxllm export` wrote.

    An encoder-decoder writes the target of the prompt instead, by beam search.

    \b
    jaxllm generate runs/quickstart --prompt "def main("
    jaxllm generate runs/t5-multi30k --prompt "A man is riding a bicycle." --beams 4
    """
    from jaxllm.backend import create_backend
    from jaxllm.checkpointing import drop_portable, open_state, portable_state
    from jaxllm.config.schema import BackendName
    from jaxllm.data.tokenizer import StreamDecoder
    from jaxllm.errors import JaxllmError
    from jaxllm.evaluation.written import source_tokens, write_one
    from jaxllm.generation import Sampling, prompt_tokens
    from jaxllm.generation import generate as continue_text
    from jaxllm.generation.load import load_trained
    from jaxllm.generation.search import Search

    trained = load_trained(run, step, lambda text: click.echo(text, err=True), overrides)
    translates = trained.run.model.spec.encoder is not None
    _check_given(("temperature", "top_k", "top_p", "seed") if translates else ("beams",), translates)
    head = trained.run.model.spec.head.kind
    if head not in ("causal-lm", "seq2seq"):
        raise JaxllmError(f"{run} holds a model for {head}, which writes no text; measure it with jaxllm eval")
    tokens = source_tokens(trained, prompt) if translates else prompt_tokens(trained.tokenizer, prompt)
    limit = trained.run.model.spec.max_positions
    if len(tokens) >= limit:
        raise JaxllmError(f"--prompt has {len(tokens)} tokens but the model sees {limit}; shorten it")
    new_tokens = min(max_new_tokens, limit - len(tokens))

    name: BackendName = "jax" if (backend or trained.run.config.backend) == "jax" else "deepspeed"
    if name == "deepspeed":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    engine = create_backend(name)
    state = None
    if trained.checkpoint is not None and name == "jax":
        state = open_state(trained.checkpoint.folder, trained.run.model)
    elif trained.checkpoint is not None:
        state = portable_state(trained.checkpoint)
    engine.start(trained.run, state, training=False)
    try:
        if trained.checkpoint is not None:
            drop_portable(trained.checkpoint)
        if translates:
            click.echo(write_one(engine, trained.tokenizer, tokens, Search(beams, max_new_tokens)))
            return
        decoder = engine.decoder(len(tokens) + new_tokens)
        text = StreamDecoder(trained.tokenizer)
        click.echo(prompt, nl=False)
        sampling = Sampling(temperature, top_k, top_p, seed)
        for token in continue_text(decoder, tokens, sampling, new_tokens, stop=trained.tokenizer.eos_id):
            click.echo(text.push(token), nl=False)
        click.echo(text.flush())
    finally:
        engine.close()


def _check_given(names: tuple[str, ...], translates: bool) -> None:
    """UsageError when an option was given that means nothing for the model."""
    context = click.get_current_context()
    for name in names:
        if context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE:
            option = f"--{name.replace('_', '-')}"
            says = "an encoder-decoder writes by beam search; use --beams" if translates else "this model is no encoder-decoder"
            raise click.UsageError(f"{option} has no meaning here: {says}")
