"""Write docs/config.md, the reference of the run file, from the schema itself.

python docs/generate_config_reference.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from jaxllm.config.schema import RunConfig
from jaxllm.config.schema_paths import choices, fields, is_model, kinds, union_members
from jaxllm.families import FAMILIES

PAGE = Path(__file__).with_name("config.md")

INTRODUCTION = """\
# Run file reference

<!-- Written by docs/generate_config_reference.py from the schema; do not edit. -->

A run file is YAML. Keys that are not listed here are refused, with the nearest one that is. Every key can be changed from the
command line of every verb, with `--set section.key=value`; the value is YAML.

```bash
jaxllm config check run.yaml                 # is it valid? every error with its line
jaxllm config show run.yaml --devices 8      # every default written out, and what the run comes to
```

**In an editor.** `jaxllm config schema > run.schema.json` writes the JSON Schema of run files. The YAML extension of VS Code,
and every other editor with `yaml-language-server`, completes and checks a file whose first line is

```yaml
# yaml-language-server: $schema=run.schema.json
```

**Numbers** follow YAML 1.2: `1e-3` is a number, `1_000_000` and `1e9` are counts, and `no` is text.

"""


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION, "## The file\n\n", _text(RunConfig), _table(RunConfig)]
    for name, field in fields(RunConfig).items():
        for section in _sections(field):
            parts += _chapter(section, name, level=2)
    parts.append(_model_keys())
    return "".join(parts).rstrip() + "\n"


def _chapter(section: type[BaseModel], path: str, level: int) -> Iterator[str]:
    kind = f" (kind: {kinds(section)[0]})" if path.endswith(("source", "objective")) else ""
    yield f"{'#' * level} `{path}`{kind}\n\n{_text(section)}{_table(section)}"
    for name, field in fields(section).items():
        inner = _sections(field)
        if inner and name != "validation_source":  # it takes what `source` takes
            for each in inner:
                yield from _chapter(each, f"{path}.{name}", level + 1)


def _text(section: type[BaseModel]) -> str:
    return f"{(section.__doc__ or '').strip()}\n\n"


def _table(section: type[BaseModel]) -> str:
    rows = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for name, field in fields(section).items():
        inner = _sections(field)
        meaning = field.description or (_first_sentence(inner[0]) if len(inner) == 1 else "one of the kinds below")
        rows.append(f"| `{name}` | {_value(field)} | {_default(field)} | {_cell(meaning)} |")
    return "\n".join(rows) + "\n\n"


def _model_keys() -> str:
    parts = ["## Keys of each family\n\nThe keys and defaults of `transformers`, under `model:` beside `family:`.\n\n"]
    for name, module in FAMILIES.items():
        parts.append(f"### `family: {name}`\n\n| key | value | default |\n|---|---|---|\n")
        for key, field in fields(module.Keys).items():
            if field.exclude:
                continue
            default = field.get_default(call_default_factory=True)
            shown = default.model_dump() if isinstance(default, BaseModel) else default
            parts.append(f"| `{key}` | {_value(field)} | `{json.dumps(shown)}` |\n")
        parts.append("\n")
    parts.append("`vocab_size`, `bos_token_id` and `eos_token_id` are the tokenizer's where the run file gives none.\n")
    return "".join(parts)


def _sections(field: FieldInfo) -> list[type[BaseModel]]:
    return [member for member in union_members(field.annotation) if is_model(member)]


def _value(field: FieldInfo) -> str:
    """What may stand there, in words."""
    if _sections(field):
        return "section"
    allowed = choices(field.annotation)
    lists = [member for member in union_members(field.annotation) if get_origin(member) in (tuple, list)]
    if allowed:
        free = [_words(member) for member in lists if not choices(member)]
        said = "list of " if lists and not free else ""
        said += " or ".join([", ".join(f"`{json.dumps(value).strip(chr(34))}`" for value in allowed), *free])
    else:
        said = " or ".join(dict.fromkeys(_words(member) for member in union_members(field.annotation)))
    limits = [limit for item in field.metadata for limit in _limits(item)]
    said += f" ({', '.join(limits)})" if limits else ""
    return said + (" or `null`" if type(None) in get_args(field.annotation) else "")


def _words(member: Any) -> str:
    if get_origin(member) in (tuple, list):
        return f"list of {_words(union_members(get_args(member)[0])[0])}s"
    return {int: "whole number", float: "number", str: "text", bool: "`true`, `false`", Path: "path"}.get(member, "")


def _limits(item: Any) -> Iterator[str]:
    for name, sign in (("gt", "> "), ("ge", ">= "), ("lt", "< "), ("le", "<= ")):
        if getattr(item, name, None) is not None:
            yield f"{sign}{getattr(item, name):g}"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    default = field.get_default(call_default_factory=True)
    if default is PydanticUndefined:
        return ""
    if isinstance(default, BaseModel):
        return f"`{{kind: {default.model_dump()['kind']}}}`" if kinds(type(default)) else "its defaults"
    return f"`{json.dumps(default, default=str).strip(chr(34))}`"


def _first_sentence(section: type[BaseModel]) -> str:
    return (section.__doc__ or "").strip().split("\n")[0]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"{PAGE}\n")
