"""The schema, the run files that come with jaxllm, and what is generated from it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from pydantic import BaseModel, ValidationError

from jaxllm.config import load_run
from jaxllm.config.document import parse_document
from jaxllm.config.schema import RunConfig
from jaxllm.config.schema_paths import fields, is_model, union_members
from jaxllm.errors import ConfigError
from jaxllm.families import FAMILIES, Vocabulary, resolve_model, task_of
from jaxllm.families.run_schema import run_file_schema
from tests.unit.config.example import EXAMPLE, changed

ROOT = Path(__file__).parents[3]
RUN_FILES = sorted((ROOT / "configs").glob("*.yaml"))


def sections(model: type[BaseModel]) -> list[type[BaseModel]]:
    inner = [member for field in fields(model).values() for member in union_members(field.annotation) if is_model(member)]
    return [model, *(section for each in inner for section in sections(each))]


@pytest.mark.parametrize("section", sections(RunConfig))
def test_every_section_is_frozen_strict_and_described(section: type[BaseModel]) -> None:
    assert section.model_config.get("frozen")
    assert section.__doc__
    assert section.model_config.get("extra") == ("allow" if section.__name__ == "ModelConfig" else "forbid")
    for name, field in fields(section).items():
        assert field.description or any(is_model(member) for member in union_members(field.annotation)), name


def test_config_cannot_be_changed() -> None:
    config = load_run(RUN_FILES[0]).config
    with pytest.raises(ValidationError, match="frozen"):
        config.training.steps = 3  # type: ignore[misc]


# ------------------------------------------------------------------------------------------------------------ run files


def test_there_are_run_files() -> None:
    assert {"quickstart.yaml", "gpt2-124m.yaml", "llama3-8b.yaml"} <= {file.name for file in RUN_FILES}


@pytest.mark.parametrize("file", RUN_FILES, ids=lambda file: file.stem)
def test_run_file_of_the_repository_is_valid(file: Path) -> None:
    config = load_run(file).config
    if config.model.from_ is None:  # otherwise the hub describes it
        resolve_model(config.model, Vocabulary(config.data.tokenizer.vocab_size), task=task_of(config.objective))
    assert config.name == file.stem
    jsonschema.validate(parse_document(file.read_text(), str(file)).data, run_file_schema())


def test_published_sizes() -> None:
    """Parameters of the models that the run files name, as their authors count them."""
    models = {file.stem: load_run(file).config for file in RUN_FILES}
    counts = {
        name: resolve_model(config.model, task=task_of(config.objective)).parameters
        for name, config in models.items()
        if config.model.from_ is None
    }
    assert counts["llama3-8b"] == 8_030_261_248
    assert counts["gpt2-124m"] == 124_439_808 + (50304 - 50257) * 768


# ---------------------------------------------------------------------------------------------------------- JSON Schema


def test_json_schema_is_one() -> None:
    schema = run_file_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    json.dumps(schema)
    assert [branch["title"] for branch in schema["$defs"]["ModelConfig"]["oneOf"]] == ["from", *FAMILIES]


@pytest.mark.parametrize(
    "text",
    [
        EXAMPLE,
        changed("hidden_size: 64", "rope_theta: 5e5\n  rope_scaling: null"),
        changed("  family: llama\n  hidden_size: 64", "  from: some/model"),
        changed("family: llama\n  hidden_size: 64", "family: gpt2\n  n_embd: 48"),
        changed("[a.jsonl, b.jsonl]", "a.jsonl"),
        changed("steps: 10", "tokens: 1e9"),
        changed("{train: bpe, vocab_size: 300}", "{from: x}"),
        EXAMPLE + "parallel: {data: -1, fsdp: 2}\nevaluation: {every: null}\n",
    ],
)
def test_json_schema_accepts_what_loads(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    load_run(tmp_path / "run.yaml")
    jsonschema.validate(parse_document(text, "x").data, run_file_schema())


@pytest.mark.parametrize(
    "text",
    [
        EXAMPLE + "optimiser: {}\n",
        changed("hidden_size: 64", "hiden_size: 64"),
        changed("hidden_size: 64", "n_embd: 64"),
        changed("family: llama", "family: lama"),
        changed("family: llama", "family: llama\n  from: x"),
        changed("kind: jsonl", "kind: josnl"),
        changed("seed: 1", "seed: one"),
        changed("steps: 10", "steps: 10\n  tokens: 10"),
        changed("  steps: 10\n", ""),
        changed("{train: bpe, vocab_size: 300}", "{train: bpe}"),
        changed("[0.9, 0.95]", "[0.9, 0.95, 0.1]"),
        changed("name: example\n", ""),
        EXAMPLE + "deepspeed: {zero_stage: 4}\n",
    ],
)
def test_json_schema_refuses_what_does_not_load(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError):
        resolve_model(load_run(tmp_path / "run.yaml").config.model)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(parse_document(text, "x").data, run_file_schema())


# -------------------------------------------------------------------------------------------------------- documentation


@pytest.mark.parametrize("name", ["generate_config_reference", "generate_chips", "generate_tpu_tables"])
def test_generated_page_is_up_to_date(name: str) -> None:
    script = ROOT / "docs" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, script)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.page() == module.PAGE.read_text(), f"run: python {script.relative_to(ROOT)}"
