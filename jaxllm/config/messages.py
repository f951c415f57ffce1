"""Turning pydantic's findings into one sentence each: the key, the value, what is allowed, the nearest valid key."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from jaxllm.config.document import dotted
from jaxllm.config.schema_paths import Place, all_keys, choices, fields, find, is_model, kinds, union_members
from jaxllm.errors import ConfigError

_TYPES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
_TYPE_ERRORS = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_parsing_size": "must be a smaller whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be text",
    "path_type": "must be a path",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "multiple_of": "must be a multiple of {multiple_of}",
    "too_short": "must hold at least {min_length}",
    "too_long": "must hold at most {max_length}",
    "string_too_short": "must have at least {min_length} character(s)",
    "string_too_long": "must have at most {max_length} character(s)",
}


def nearest(name: str, allowed: Iterable[str]) -> str:
    """`did you mean X?` when one is close, and always what is allowed."""
    choices = sorted(allowed)
    close = closest(name, choices)
    listed = f"allowed: {', '.join(choices)}"
    return f"did you mean {close!r}? ({listed})" if close else listed


def closest(name: str, allowed: Iterable[str]) -> str | None:
    """The allowed name that was probably meant, if one is close; case and the kind of dash do not count."""
    normal = {_normal(choice): choice for choice in allowed}
    close = difflib.get_close_matches(_normal(name), normal, n=1, cutoff=0.6)
    return normal[close[0]] if close else None


def one_sentence(error: ValidationError, prefix: str, allowed: type[BaseModel]) -> ConfigError:
    """A pydantic error as a ConfigError: its first finding, the others in `others`.

    prefix: dotted path of the section that was validated; allowed: the model it was validated against.
    """
    return explain(error, allowed, prefix)


def explain(error: ValidationError, model: type[BaseModel], prefix: str = "") -> ConfigError:
    """A pydantic error about `model` as a ConfigError: its first finding, the others in `others`."""
    found: dict[str, ConfigError] = {}
    for finding in error.errors(include_url=False):
        place = find(model, finding["loc"])
        key = ".".join(part for part in (prefix, dotted(place.path), _inner_key(finding)) if part)
        # A union of plain types reports one finding per branch; what is allowed is said once.
        found.setdefault(key, ConfigError(key, _sentence(finding, place, model, prefix)))
    first, *others = found.values()
    return ConfigError(first.key, first.message, others=tuple(others))


def _sentence(finding: ErrorDetails, place: Place, model: type[BaseModel], prefix: str) -> str:
    value = finding["input"]
    match finding["type"]:
        case "extra_forbidden":
            return _unknown_key(place, model, prefix)
        case "missing":
            return _missing(place)
        case "value_error":
            return str(finding["ctx"]["error"])
        case _:
            sections = [member for member in union_members(_annotation(place)) if is_model(member)]
            if len(sections) > 1:
                return _unknown_kind(sections, value)
            return _not_a_section(sections[0], value) if sections else _wrong_value(finding, place)


def _wrong_value(finding: ErrorDetails, place: Place) -> str:
    """About a value that is not a section."""
    kind, value = finding["type"], finding["input"]
    if kind == "none_required":
        return f"{shown(value)} is not supported; leave the key out"
    if value is None:
        return f"is empty (null); {_allowed(place)}"
    if kind == "literal_error":
        return f"{shown(value)} is not allowed; {_near(value, place)}"
    if kind == "string_pattern_mismatch":
        return f"{shown(value)} must be letters, digits, `.`, `_` or `-`, and begin with a letter or digit"
    if kind not in _TYPE_ERRORS or len(union_members(_annotation(place))) > 1:
        return f"{_allowed(place)}, not {shown(value)}"
    limits = {name: f"{limit:g}" if isinstance(limit, float) else limit for name, limit in finding.get("ctx", {}).items()}
    null = " or null" if _nullable(place) and kind.endswith(("_type", "_parsing", "from_float")) else ""
    return f"{_TYPE_ERRORS[kind].format(**limits)}{null}, not {shown(value)}"


def _unknown_key(place: Place, model: type[BaseModel], prefix: str) -> str:
    name = str(place.path[-1])
    siblings = list(fields(place.section))
    close = closest(name, siblings)
    if close is None:
        elsewhere = [key for key in all_keys(model) if key.rpartition(".")[2] == name]
        if elsewhere and dotted(place.path) not in elsewhere:  # else it is a key of another `kind` of this section
            where = " or ".join(".".join(part for part in (prefix, key) if part) for key in sorted(set(elsewhere)))
            return f"unknown key; did you mean {where}? (allowed here: {', '.join(siblings)})"
    return f"unknown key; {nearest(name, siblings)}"


def _missing(place: Place) -> str:
    if place.path and isinstance(place.path[-1], int):
        return "is missing: the list is too short"
    said = "required key is missing"
    description = place.field.description if place.field else None
    return f"{said}: {description[0].lower()}{description[1:].rstrip('.')}" if description else said


def _inner_key(finding: ErrorDetails) -> str:
    """`kind`, when the finding is about the `kind:` inside the section it is reported for."""
    return "kind" if finding["type"] == "union_tag_invalid" else ""


def _unknown_kind(sections: list[type[BaseModel]], value: Any) -> str:
    allowed = [str(kind) for section in sections for kind in kinds(section)]
    if isinstance(value, dict) and "kind" in value:
        return f"unknown kind {shown(value['kind'])}; {nearest(str(value['kind']), allowed)}"
    if isinstance(value, dict):
        near = closest("kind", map(str, value))
        hint = f"did you mean `kind:` instead of `{near}:`? " if near else ""
        return f"needs `kind:`; {hint}allowed: {', '.join(allowed)}"
    if value in allowed:
        return f"must be a section with `kind:`, not {shown(value)}; write `{{kind: {value}}}`"
    return f"must be a section with `kind:`, not {shown(value)}; allowed kinds: {', '.join(allowed)}"


def _not_a_section(section: type[BaseModel], value: Any) -> str:
    keys = ", ".join(fields(section))
    if value is None:
        return f"is empty; put at least one of its keys below it ({keys})"
    return f"must be a section, not {shown(value)}; its keys: {keys}"


def _allowed(place: Place) -> str:
    """What may stand at a place, from its type: `must be a whole number or text`."""
    annotation = _annotation(place)
    literal = choices(annotation)
    if literal:
        return f"allowed: {', '.join(map(shown, literal))}"
    said = list(dict.fromkeys(_type_name(member) for member in union_members(annotation)))
    if _nullable(place):
        said.append("null")
    return f"must be {' or '.join(said)}"


def _nullable(place: Place) -> bool:
    at_item = bool(place.path) and isinstance(place.path[-1], int)
    return place.field is not None and not at_item and type(None) in get_args(place.field.annotation)


def _near(value: Any, place: Place) -> str:
    allowed = choices(_annotation(place))
    close = closest(value, map(str, allowed)) if isinstance(value, str) else None
    listed = f"allowed: {', '.join(map(shown, allowed))}"
    return f"did you mean {shown(close)}? ({listed})" if close else listed


def _annotation(place: Place) -> Any:
    """Type of the value at a place; of the items when the place is inside a list."""
    annotation: Any = place.field.annotation if place.field else None
    if place.path and isinstance(place.path[-1], int):
        index = place.path[-1]
        for member in union_members(annotation):
            parts = [part for part in get_args(member) if part is not Ellipsis]
            if get_origin(member) in (tuple, list) and parts:
                return parts[min(index, len(parts) - 1)]
    return annotation


def _type_name(member: Any) -> str:
    if get_origin(member) in (tuple, list):
        parts = [part for part in get_args(member) if part is not Ellipsis]
        return f"a list of {_type_name(union_members(parts[0])[0]).removeprefix('a ')}s" if parts else "a list"
    return _TYPES.get(member, "a path" if getattr(member, "__name__", "") == "Path" else "a section")


def shown(value: Any) -> str:
    """A value as YAML would write it on one line, cut when it is long."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _normal(name: str) -> str:
    return name.lower().replace("-", "_")


__all__ = ["closest", "explain", "nearest", "one_sentence", "shown"]
