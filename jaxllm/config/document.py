"""A run file as plain data, with the line every key was written on.

YAML is read with the safe constructors only.  Numbers follow YAML 1.2, so that `1e-3` is a number and `12:30:00` and `no` are
text; every key is a string and is written once.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from jaxllm.errors import ConfigError

KeyPath: TypeAlias = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """YAML's safe loader with the scalars of the YAML 1.2 core schema."""


class _Dumper(yaml.SafeDumper):
    """Its inverse: quotes what the loader would not read as text, and keeps short lists on one line."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:  # noqa: ARG002 - PyYAML's
        super().increase_indent(flow, False)  # lists are indented below their key


_Loader.yaml_implicit_resolvers = {}
_Dumper.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+."),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", "<"),
):
    for _side in (_Loader, _Dumper):
        _side.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first))


def _flat_list(dumper: yaml.SafeDumper, values: list[Any]) -> yaml.Node:
    flow = all(isinstance(value, str | int | float) for value in values)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=flow)


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    # PyYAML writes these line separators raw outside double quotes, and then reads them as spaces.
    separators = any(separator in value for separator in "\x85\u2028\u2029\ufeff")
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style='"' if separators else None)


_Dumper.add_representer(list, _flat_list)
_Dumper.add_representer(str, _text)


@dataclass
class Document:
    """Data of a run file.  lines: the line (from 1) of every key, by its path; source: the file's name in messages."""

    source: str
    data: dict[str, Any]
    lines: dict[KeyPath, int] = field(default_factory=dict)

    def line(self, path: KeyPath) -> int | None:
        """Line of a key, or of the nearest section around it that the file has."""
        while path:
            if path in self.lines:
                return self.lines[path]
            path = path[:-1]
        return None


def read_document(file: Path) -> Document:
    """Read a run file.  ConfigError when it cannot be read, is not YAML, is empty, or repeats a key."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError("", "there is no such run file", location=str(file)) from None
    except UnicodeDecodeError as error:
        raise ConfigError("", f"is not a text file (byte {error.start} is not UTF-8)", location=str(file)) from None
    except OSError as error:
        raise ConfigError("", f"cannot be read: {error.strerror}", location=str(file)) from None
    return parse_document(text, str(file))


def parse_document(text: str, source: str) -> Document:
    """The same from text; `source` is the name that messages give it."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}:{mark.line + 1}" if mark else source
        raise ConfigError("", f"is not valid YAML: {_problem(error)}", location=where) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError("", f"is not valid YAML: {error.reason}", location=f"{source}:{line}") from None
    if node is None or node.tag == "tag:yaml.org,2002:null":
        raise ConfigError("", "is empty; a run file has at least name, model, data, optimizer and training", location=source)
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError("", "holds no `key: value` pairs at its top level", location=f"{source}:{_line(node)}")
    document = Document(source, {})
    document.data = _Reader(loader, document).mapping(node, ())
    return document


def parse_value(text: str) -> Any:
    """One value as YAML.  yaml.YAMLError when it is none, ConfigError when it repeats a key."""
    loader = _Loader(text)
    node = loader.get_single_node()
    return None if node is None else _Reader(loader, Document("", {})).value(node, ())


def write_yaml(data: Any) -> str:
    """Data as YAML that `parse_document` reads back as the same data."""
    return str(yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120))


def _problem(error: yaml.MarkedYAMLError) -> str:
    said = " ".join(part for part in (error.problem, error.context and f"({error.context})") if part)
    if "'\\t'" in said:
        said += "; indent with spaces, not tabs"
    return said


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


class _Reader:
    """Turns YAML nodes into data and notes their lines."""

    def __init__(self, loader: _Loader, document: Document) -> None:
        self.loader = loader
        self.document = document
        self.open: list[yaml.Node] = []

    def value(self, node: yaml.Node, path: KeyPath) -> Any:
        if node in self.open:
            raise self.error(node, path, "refers to itself through a YAML alias; write the value out")
        self.open.append(node)
        try:
            if isinstance(node, yaml.MappingNode):
                return self.mapping(node, path)
            if isinstance(node, yaml.SequenceNode):
                return self.sequence(node, path)
            assert isinstance(node, yaml.ScalarNode)  # noqa: S101 - YAML has no fourth kind
            return self.scalar(node, path)
        finally:
            self.open.pop()

    def mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        if node.tag != "tag:yaml.org,2002:map":
            raise self.error(node, path, f"has the YAML tag {node.tag}, which a run file cannot hold")
        self.refuse_duplicates(node, path)
        try:
            self.loader.flatten_mapping(node)  # `<<: *anchor`
        except yaml.MarkedYAMLError as error:
            raise self.error(node, path, _problem(error)) from None
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self.scalar(key_node, path)
            # Merged keys come first, so what is written in the mapping itself wins.
            self.document.lines[(*path, key)] = _line(key_node)
            result[key] = self.value(value_node, (*path, key))
        return result

    def refuse_duplicates(self, node: yaml.MappingNode, path: KeyPath) -> None:
        seen: dict[Hashable, int] = {}
        for key_node, _ in node.value:
            key = key_node.value
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag not in _KEY_TAGS:
                shown = repr(key) if isinstance(key_node, yaml.ScalarNode) else "a list or mapping"
                raise self.error(key_node, path, f"{shown} cannot be a key; keys are words")
            if key in seen:
                raise self.error(key_node, (*path, key), f"is written twice (first on line {seen[key]}); remove one")
            seen[key] = _line(key_node)

    def sequence(self, node: yaml.SequenceNode, path: KeyPath) -> list[Any]:
        if node.tag != "tag:yaml.org,2002:seq":
            raise self.error(node, path, f"has the YAML tag {node.tag}, which a run file cannot hold")
        values = []
        for index, item in enumerate(node.value):
            self.document.lines[(*path, index)] = _line(item)
            values.append(self.value(item, (*path, index)))
        return values

    def scalar(self, node: yaml.ScalarNode, path: KeyPath) -> Any:
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if kind not in ("str", "bool", "int", "float", "null"):
            raise self.error(node, path, f"{node.value!r} has the YAML tag {node.tag}, which a run file cannot hold")
        try:
            return int(node.value.replace("_", ""), 0) if kind == "int" else self.loader.construct_object(node)
        except (ValueError, KeyError):
            raise self.error(node, path, f"{node.value!r} is not a valid YAML {kind}") from None

    def error(self, node: yaml.Node, path: KeyPath, message: str) -> ConfigError:
        return ConfigError(dotted(path), message, location=f"{self.document.source}:{_line(node)}")


_KEY_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")


def dotted(path: KeyPath) -> str:
    """`("optimizer", "betas", 1)` -> `optimizer.betas[1]`."""
    said = ""
    for part in path:
        said += f"[{part}]" if isinstance(part, int) else f".{part}" if said else part
    return said


def undotted(key: str) -> KeyPath:
    """The inverse of `dotted`."""
    parts = re.findall(r"[^.\[\]]+|\[\d+\]", key)
    return tuple(int(part[1:-1]) if part.startswith("[") else part for part in parts)
