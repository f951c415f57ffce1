"""`--set a.b=value`: changing keys of a run file from the command line.  The value is read as YAML."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from jaxllm.config.document import Document, KeyPath, dotted, parse_value
from jaxllm.errors import ConfigError


def apply_overrides(document: Document, overrides: Sequence[str]) -> dict[KeyPath, str]:
    """Change the document's data in place; later overrides win.

    Returns which override (`--set a.b=value`) gave each path.  ConfigError for one that is not of the form `key=value`, whose
    value is not YAML, or whose key goes through something that holds no keys.
    """
    given: dict[KeyPath, str] = {}
    for override in overrides:
        location = f"--set {override}"
        key, separator, text = override.partition("=")
        path = tuple(part.strip() for part in key.split("."))
        if not separator or not all(path):
            raise ConfigError("", "must look like `--set section.key=value`", location=location)
        try:
            value = parse_value(text)
        except yaml.YAMLError:
            raise ConfigError(key, f"{text!r} is not valid YAML; quote it if it is meant as text", location=location) from None
        except ConfigError as error:
            raise ConfigError(dotted((*path, error.key)), error.message, location=location) from None
        _put(document.data, path, value, location)
        # What the file or an earlier override said of this key, or of keys inside it, is gone.
        for origin in (given, document.lines):
            for known in [known for known in origin if known[: len(path)] == path]:
                del origin[known]
        given[path] = location
    return given


def _put(data: dict[str, Any], path: tuple[str, ...], value: Any, location: str) -> None:
    *sections, last = path
    inside = data
    for depth, section in enumerate(sections, start=1):
        if inside.get(section) is None:
            inside[section] = {}
        if not isinstance(inside[section], dict):
            at = dotted(path[:depth])
            held = "a list; set the whole list" if isinstance(inside[section], list) else repr(inside[section])
            raise ConfigError(dotted(path), f"{at} has no keys inside it, it is {held}", location=location)
        inside = inside[section]
    inside[last] = value
