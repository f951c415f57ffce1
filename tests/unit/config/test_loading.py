"""Run files that load, and every way in which one can fail to: file, line, key, value, what is allowed, what was meant."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jaxllm.config import load_run
from jaxllm.errors import ConfigError
from tests.unit.config.example import EXAMPLE, changed, complaints, load


def test_example_loads_with_defaults(tmp_path: Path) -> None:
    config = load(tmp_path).config
    assert config.optimizer.learning_rate == 1e-3
    assert config.optimizer.betas == (0.9, 0.95)
    assert config.data.source.model_dump()["files"] == ("a.jsonl", "b.jsonl")
    assert config.model.huggingface == {"hidden_size": 64}
    assert config.folder == Path("runs/example")
    assert config.schedule.kind == "cosine"


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-3", 1e-3),
        ("1E-3", 1e-3),
        ("1.e-3", 1e-3),
        (".001", 1e-3),
        ("+1.0e-3", 1e-3),
        ("0", 0.0),
        ("2", 2.0),
        ("1_0.5", 10.5),
    ],
)
def test_spellings_of_a_number(tmp_path: Path, written: str, value: float) -> None:
    assert load(tmp_path, changed("learning_rate: 1e-3", f"learning_rate: {written}")).config.optimizer.learning_rate == value


@pytest.mark.parametrize(("written", "value"), [("1000000", 10**6), ("1_000_000", 10**6), ("1e6", 10**6), ("0xff", 255)])
def test_spellings_of_a_count(tmp_path: Path, written: str, value: int) -> None:
    tokens = load(tmp_path, changed("steps: 10", f"tokens: {written}")).config.training.tokens
    assert tokens == value
    assert type(tokens) is int


def test_text_that_yaml_1_1_reads_as_something_else(tmp_path: Path) -> None:
    config = load(tmp_path, EXAMPLE + "sample: {prompt: no}\noutput_dir: 2026-01-01\n").config
    assert config.sample.prompt == "no"
    assert config.output_dir == Path("2026-01-01")


def test_one_file_or_many(tmp_path: Path) -> None:
    config = load(tmp_path, changed("[a.jsonl, b.jsonl]", "c.jsonl")).config
    assert config.data.source.model_dump()["files"] == ("c.jsonl",)


def test_anchors_and_merges(tmp_path: Path) -> None:
    text = EXAMPLE + "evaluation: &often\n  every: 5\ncheckpoint:\n  <<: *often\n  keep: 7\nlogging: {<<: *often, every: 6}\n"
    loaded = load(tmp_path, text)
    assert (loaded.config.checkpoint.every, loaded.config.checkpoint.keep) == (5, 7)
    assert (loaded.config.evaluation.every, loaded.config.logging.every) == (5, 6)
    assert loaded.locate("checkpoint.every").endswith("run.yaml:19")


def test_locate(tmp_path: Path) -> None:
    loaded = load(tmp_path, EXAMPLE, "schedule.kind=linear", "data.tokenizer={train: bpe, vocab_size: 400}")
    file = str(tmp_path / "run.yaml")
    assert loaded.locate("name") == f"{file}:1"
    assert loaded.locate("data.source.files") == f"{file}:9"
    assert loaded.locate("data.source.files[1]") == f"{file}:9"
    assert loaded.locate("optimizer.betas[1]") == f"{file}:14"
    assert loaded.locate("optimizer.eps") == f"{file}:12"  # a default: the section
    assert loaded.locate("parallel.data") == file  # a section of defaults: the file
    assert loaded.locate("schedule.kind") == loaded.locate("schedule") == "--set schedule.kind=linear"
    assert loaded.locate("data.tokenizer.vocab_size") == "--set data.tokenizer={train: bpe, vocab_size: 400}"


# -------------------------------------------------------------------------------------------------------------- the file


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run(tmp_path / "nope.yaml")
    assert str(caught.value) == f"{tmp_path}/nope.yaml: there is no such run file"


def test_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run(tmp_path)
    assert str(caught.value) == f"{tmp_path}: cannot be read: Is a directory"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").touch(mode=0o000)
    assert complaints(tmp_path) == ["run.yaml: cannot be read: Permission denied"]


def test_not_text(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(ConfigError) as caught:
        load_run(tmp_path / "run.yaml")
    assert str(caught.value).endswith("run.yaml: is not a text file (byte 6 is not UTF-8)")


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing\n", "---\n", "null\n", "~"])
def test_empty(tmp_path: Path, text: str) -> None:
    assert complaints(tmp_path, text) == [
        "run.yaml: is empty; a run file has at least name, model, data, optimizer and training"
    ]


@pytest.mark.parametrize(("text", "line"), [("just text", 1), ("\n- a\n- b", 2), ("3", 1)])
def test_no_mapping(tmp_path: Path, text: str, line: int) -> None:
    assert complaints(tmp_path, text) == [f"run.yaml:{line}: holds no `key: value` pairs at its top level"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("name: a\nmodel: {family: llama\ndata: 3\n", "run.yaml:3: is not valid YAML: expected ',' or '}', but got ':'"),
        ("name: 'a\n", "run.yaml:2: is not valid YAML: found unexpected end of stream"),
        ("name: a\n\tseed: 1\n", "run.yaml:2: is not valid YAML: found character '\\t' that cannot start any token"),
        ("name: a: b\n", "run.yaml:1: is not valid YAML: mapping values are not allowed here"),
        ("name: a\n---\nname: b\n", "run.yaml:2: is not valid YAML: but found another document"),
        ("name: *a\n", "run.yaml:1: is not valid YAML: found undefined alias 'a'"),
        ("name: a\x07\n", "run.yaml:1: is not valid YAML: special characters are not allowed"),
    ],
)
def test_bad_yaml(tmp_path: Path, text: str, sentence: str) -> None:
    (said,) = complaints(tmp_path, text)
    assert said.startswith(sentence)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (EXAMPLE + "seed: 2\n", "run.yaml:18: seed: is written twice (first on line 2); remove one"),
        (
            changed("  steps: 10", "  steps: 10\n  steps: 11"),
            "run.yaml:17: training.steps: is written twice (first on line 16); remove one",
        ),
        (EXAMPLE + "1: 2\n", "run.yaml:18: '1' cannot be a key; keys are words"),
        (EXAMPLE + "[a, b]: 2\n", "run.yaml:18: a list or mapping cannot be a key; keys are words"),
        (
            EXAMPLE + "jax: !!python/object:os.system {}\n",
            "run.yaml:18: jax: has the YAML tag tag:yaml.org,2002:python/object:os.system, which a run file cannot hold",
        ),
        (
            EXAMPLE + "sample: {prompt: !!binary aGk=}\n",
            "run.yaml:18: sample.prompt: 'aGk=' has the YAML tag tag:yaml.org,2002:binary, which a run file cannot hold",
        ),
        (EXAMPLE + "jax: &a {b: *a}\n", "run.yaml:18: jax.b: refers to itself through a YAML alias; write the value out"),
        (
            EXAMPLE + "jax: {<<: 3}\n",
            "run.yaml:18: jax: expected a mapping or list of mappings for merging, ",
        ),
        (EXAMPLE + "seeds: !!int x\n", "run.yaml:18: seeds: 'x' is not a valid YAML int"),
    ],
)
def test_yaml_that_is_no_run_file(tmp_path: Path, text: str, sentence: str) -> None:
    (said,) = complaints(tmp_path, text)
    assert said.startswith(sentence)


# --------------------------------------------------------------------------------------------------------------- the keys


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        # unknown and misspelt keys, at every depth
        (EXAMPLE + "optimiser: {}\n", "run.yaml:18: optimiser: unknown key; did you mean 'optimizer'? (allowed: backend, "),
        (EXAMPLE + "learning_rate: 3\n", "run.yaml:18: learning_rate: unknown key; did you mean optimizer.learning_rate?"),
        (EXAMPLE + "kind: adamw\n", "run.yaml:18: kind: unknown key; did you mean data.source.kind or "),
        (
            changed("steps: 10", "steps: 10\n  global-batch: 4"),
            "run.yaml:17: training.global-batch: unknown key; did you mean 'global_batch'? (allowed: global_batch, ",
        ),
        (
            changed("kind: jsonl", "kind: jsonl\n    text_feild: body"),
            "run.yaml:9: data.source.text_feild: unknown key; did you mean 'text_field'? (allowed: files, ",
        ),
        (
            changed("kind: jsonl", "kind: jsonl\n    delimiter: x"),
            "run.yaml:9: data.source.delimiter: unknown key; allowed: files, kind, label_field, max_documents, second_field, ",
        ),
        (EXAMPLE + "zzz: 1\n", "run.yaml:18: zzz: unknown key; allowed: backend, checkpoint, data, "),
        # unions
        (
            changed("kind: jsonl", "kind: josnl"),
            "run.yaml:8: data.source.kind: unknown kind \"josnl\"; did you mean 'jsonl'? (allowed: csv, huggingface, jsonl, ",
        ),
        (
            changed("kind: jsonl", "knd: jsonl"),
            "run.yaml:7: data.source: needs `kind:`; did you mean `kind:` instead of `knd:`?",
        ),
        (changed("kind: jsonl", "text_field: x"), "run.yaml:7: data.source: needs `kind:`; allowed: python-source, text, "),
        (
            EXAMPLE.replace("  source:\n    kind: jsonl\n    files: [a.jsonl, b.jsonl]\n", "  source: python-source\n"),
            'run.yaml:7: data.source: must be a section with `kind:`, not "python-source"; write `{kind: python-source}`',
        ),
        # missing keys
        (changed("name: example\n", ""), "run.yaml: name: required key is missing: name of the run folder"),
        (
            changed("  learning_rate: 1e-3\n", ""),
            "run.yaml:12: optimizer.learning_rate: required key is missing: the highest rate, reached after the warm-up",
        ),
        (
            changed("    files: [a.jsonl, b.jsonl]\n", ""),
            "run.yaml:7: data.source.files: required key is missing: paths and globs",
        ),
        # wrong types
        (changed("seed: 1", "seed: one"), 'run.yaml:2: seed: must be a whole number, not "one"'),
        (changed("seed: 1", "seed: '1'"), 'run.yaml:2: seed: must be a whole number, not "1"'),
        (changed("seed: 1", "seed: 1.5"), "run.yaml:2: seed: must be a whole number, not 1.5"),
        (changed("seed: 1", "seed: true"), "run.yaml:2: seed: must be a whole number, not true"),
        (changed("seed: 1", "seed: [1]"), "run.yaml:2: seed: must be a whole number, not [1]"),
        (changed("seed: 1", "seed: {a: 1}"), 'run.yaml:2: seed: must be a whole number, not {"a": 1}'),
        (changed("seed: 1", "seed:"), "run.yaml:2: seed: is empty (null); must be a whole number"),
        (changed("seed: 1", "seed: -1"), "run.yaml:2: seed: must be at least 0, not -1"),
        (changed("name: example", "name: 3"), "run.yaml:1: name: must be text, not 3"),
        (changed("name: example", "name: a/b"), 'run.yaml:1: name: "a/b" must be letters, digits, `.`, `_` or `-`'),
        (
            changed("learning_rate: 1e-3", "learning_rate: fast"),
            'run.yaml:13: optimizer.learning_rate: must be a number, not "fast"',
        ),
        (
            changed("learning_rate: 1e-3", "learning_rate: .inf"),
            "run.yaml:13: optimizer.learning_rate: must be a finite number, not Infinity",
        ),
        (changed("[0.9, 0.95]", "[0.9]"), "run.yaml:14: optimizer.betas[1]: is missing: the list is too short"),
        (changed("[0.9, 0.95]", "[0.9, 0.95, 1]"), "run.yaml:14: optimizer.betas: must hold at most 2"),
        (changed("[0.9, 0.95]", "0.9"), "run.yaml:14: optimizer.betas: must be a list, not 0.9"),
        (changed("[0.9, 0.95]", "[0.9, x]"), 'run.yaml:14: optimizer.betas[1]: must be a number, not "x"'),
        (changed("[0.9, 0.95]", "[0.9, 1]"), "run.yaml:14: optimizer.betas[1]: must be less than 1, not 1"),
        (changed("[a.jsonl, b.jsonl]", "[]"), "run.yaml:9: data.source.files: must hold at least 1"),
        (changed("[a.jsonl, b.jsonl]", "[a, 3]"), "run.yaml:9: data.source.files[1]: must be text, not 3"),
        (changed("[a.jsonl, b.jsonl]", "3"), "run.yaml:9: data.source.files: must be a list, not 3"),
        (
            EXAMPLE + "evaluation: {every: often}\n",
            'run.yaml:18: evaluation.every: must be a whole number or null, not "often"',
        ),
        (
            EXAMPLE + "deepspeed: {torch_compile: maybe}\n",
            'run.yaml:18: deepspeed.torch_compile: must be true or false, not "maybe"',
        ),
        # sections
        (
            EXAMPLE + "schedule: cosine\n",
            'run.yaml:18: schedule: must be a section, not "cosine"; its keys: kind, warmup_steps, ',
        ),
        (
            EXAMPLE + "schedule:\n",
            "run.yaml:18: schedule: is empty; put at least one of its keys below it (kind, warmup_steps, ",
        ),
        (EXAMPLE + "schedule: [1]\n", "run.yaml:18: schedule: must be a section, not [1]; its keys: kind, "),
        # choices
        (
            EXAMPLE + "backend: jaxx\n",
            'run.yaml:18: backend: "jaxx" is not allowed; did you mean "jax"? (allowed: "jax", "deepspeed")',
        ),
        (
            EXAMPLE + "schedule: {kind: exponential}\n",
            'run.yaml:18: schedule.kind: "exponential" is not allowed; allowed: "constant", "linear", "cosine"',
        ),
        (EXAMPLE + "deepspeed: {zero_stage: 4}\n", "run.yaml:18: deepspeed.zero_stage: 4 is not allowed; allowed: 0, 1, 2, 3"),
        (
            EXAMPLE + "logging:\n  sinks:\n    - console\n    - tensorbord\n",
            'run.yaml:21: logging.sinks[1]: "tensorbord" is not allowed; did you mean "tensorboard"? (allowed: ',
        ),
        # rules over several keys
        (changed("steps: 10", "steps: 10\n  tokens: 10"), "run.yaml:15: training: give exactly one of `steps` and `tokens`"),
        (changed("  steps: 10\n", ""), "run.yaml:15: training: give exactly one of `steps` and `tokens`"),
        (
            changed("{train: bpe, vocab_size: 300}", "{train: bpe}"),
            "run.yaml:10: data.tokenizer: `train: bpe` needs `vocab_size:`",
        ),
        (
            changed("{train: bpe, vocab_size: 300}", "{vocab_size: 3}"),
            "run.yaml:10: data.tokenizer: give either `train: bpe` with ",
        ),
        (
            changed("{train: bpe, vocab_size: 300}", "{from: x, vocab_size: 3}"),
            "run.yaml:10: data.tokenizer: `vocab_size:` belongs",
        ),
        (
            changed("family: llama", "famly: llama"),
            "run.yaml:3: model: give either `family:` (a new model) or `from:` (an existing one); did you mean `family:` ",
        ),
        (
            changed("family: llama", "family: llama\n  from: x"),
            "run.yaml:3: model: give either `family:` (a new model) or `from:`",
        ),
        (
            changed("family: llama", "from: x"),
            "run.yaml:3: model: `from:` takes the architecture from the folder; remove hidden_size",
        ),
        (
            EXAMPLE + "parallel: {data: 0}\n",
            "run.yaml:18: parallel.data: must be -1 (all remaining devices) or at least 1, not 0",
        ),
    ],
)
def test_wrong_key_or_value(tmp_path: Path, text: str, sentence: str) -> None:
    (said,) = complaints(tmp_path, text)
    assert said.startswith(sentence)


def test_every_error_of_a_file_is_reported(tmp_path: Path) -> None:
    text = changed("seed: 1", "seed: x").replace("steps: 10", "stepz: 10").replace("learning_rate", "learning_rat")
    said = complaints(tmp_path, text, "schedule.kind=x", "jax.remat=y")
    assert [line.partition(": ")[0] for line in said] == [
        "run.yaml:2", "run.yaml:12", "run.yaml:13", "--set schedule.kind=x", "run.yaml:16", "--set jax.remat=y",
    ]  # fmt: skip


def test_nothing_of_pydantic_shows(tmp_path: Path) -> None:
    said = "\n".join(complaints(tmp_path, "name: [1]\nmodel: 3\ndata: {source: {kind: csv}, tokenizer: 1}\ntraining: {}\n"))
    for word in ("pydantic", "Input should", "validation error", "type=", "Extra inputs", "Field required"):
        assert word not in said


def test_long_values_are_cut(tmp_path: Path) -> None:
    (said,) = complaints(tmp_path, changed("seed: 1", f"seed: {'x' * 500}"))
    assert len(said) < 120


# ------------------------------------------------------------------------------------------------------------------ --set


def test_overrides(tmp_path: Path) -> None:
    config = load(
        tmp_path, EXAMPLE, "training.steps=20", "optimizer.betas=[0.8, 0.9]", "jax.remat=full", "model.rms_norm_eps=1e-5",
        "sample.prompt=a=b", "data.source={kind: python-source}", "training.steps=30", "checkpoint.every=null", "name=other",
    ).config  # fmt: skip
    assert config.training.steps == 30
    assert config.optimizer.betas == (0.8, 0.9)
    assert config.jax.remat == "full"
    assert config.model.huggingface == {"hidden_size": 64, "rms_norm_eps": 1e-5}
    assert config.sample.prompt == "a=b"
    assert config.data.source.kind == "python-source"
    assert config.checkpoint.every is None
    assert config.name == "other"


def test_override_can_change_the_kind_of_a_section(tmp_path: Path) -> None:
    assert load(tmp_path, EXAMPLE, "data.source.kind=text").config.data.source.kind == "text"


def test_override_can_remove_the_other_of_two_keys(tmp_path: Path) -> None:
    assert load(tmp_path, EXAMPLE, "training.steps=null", "training.tokens=1e3").config.training.tokens == 1000


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("training.stepz=3", "--set training.stepz=3: training.stepz: unknown key; did you mean 'steps'?"),
        ("training.steps=many", '--set training.steps=many: training.steps: must be a whole number or null, not "many"'),
        ("training.steps=0", "--set training.steps=0: training.steps: must be at least 1, not 0"),
        ("training.steps", "--set training.steps: must look like `--set section.key=value`"),
        ("=3", "--set =3: must look like `--set section.key=value`"),
        ("a..b=3", "--set a..b=3: must look like `--set section.key=value`"),
        ("jax.remat={a", "--set jax.remat={a: jax.remat: '{a' is not valid YAML; quote it if it is meant as text"),
        ("jax={a: 1, a: 2}", "--set jax={a: 1, a: 2}: jax.a: is written twice (first on line 1); remove one"),
        ("seed.x=3", "--set seed.x=3: seed.x: seed has no keys inside it, it is 1"),
        (
            "optimizer.betas.0=3",
            "--set optimizer.betas.0=3: optimizer.betas.0: optimizer.betas has no keys inside it, it is a list; set ",
        ),
        ("training=", "--set training=: training: is empty; put at least one of its keys below it (steps, tokens, "),
    ],
)
def test_wrong_overrides(tmp_path: Path, override: str, sentence: str) -> None:
    (said,) = complaints(tmp_path, EXAMPLE, override)
    assert said.startswith(sentence)


def test_the_last_override_of_a_key_is_the_one_blamed(tmp_path: Path) -> None:
    assert complaints(tmp_path, EXAMPLE, "training.steps=3", "training={steps: x, global_batch: 4}") == [
        '--set training={steps: x, global_batch: 4}: training.steps: must be a whole number or null, not "x"'
    ]
