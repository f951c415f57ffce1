"""Finding one's way in a tree of pydantic models: which section a finding is about, and what could stand there."""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from jaxllm.config.document import KeyPath


@dataclass(frozen=True)
class Place:
    """A place in the schema.  path: as in the run file; section: the model that holds the last key; field: its declaration."""

    path: KeyPath
    section: type[BaseModel]
    field: FieldInfo | None


def find(root: type[BaseModel], location: Sequence[str | int]) -> Place:
    """The place of a pydantic error location, whose elements besides keys are the branches taken in unions."""
    path: list[str | int] = []
    section, field = root, None
    current: Any = root
    for element in location:
        members = union_members(current)
        models = [member for member in members if is_model(member)]
        if len(models) > 1:  # a union told apart by `kind`: the element names the branch
            current = next((model for model in models if element in kinds(model)), None)
        elif models and isinstance(element, str):
            section = models[0]
            field = fields(section).get(element)
            path.append(element)
            current = field.annotation if field else None
        elif isinstance(element, int):
            path.append(element)
            current = _item(members, element)
        # Any other element names the branch of a union of plain types.
    return Place(tuple(path), section, field)


def fields(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Fields of a section by the name they have in a run file."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def kinds(model: type[BaseModel]) -> tuple[Any, ...]:
    """What `kind:` may be for this section to be meant."""
    kind = model.model_fields.get("kind")
    return get_args(kind.annotation) if kind else ()


def is_model(annotation: object) -> bool:
    """Whether an annotation is a section."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def union_members(annotation: Any) -> list[Any]:
    """The types a value may have, None and wrappers of constraints taken off."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return union_members(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [member for part in get_args(annotation) for member in union_members(part) if member is not type(None)]
    return [annotation]


def choices(annotation: Any) -> list[Any]:
    """The values a Literal allows, also inside a list or a union; empty when there is no Literal."""
    found: list[Any] = []
    for member in union_members(annotation):
        if get_origin(member) is Literal:
            found.extend(get_args(member))
        elif get_origin(member) in (tuple, list):
            found.extend(choice for part in get_args(member) if part is not Ellipsis for choice in choices(part))
    return found


def all_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key below a section."""
    for name, field in fields(model).items():
        yield prefix + name
        for member in union_members(field.annotation):
            if is_model(member):
                yield from all_keys(member, f"{prefix}{name}.")


def _item(members: list[Any], index: int) -> Any:
    for member in members:
        parts = [part for part in get_args(member) if part is not Ellipsis]
        if get_origin(member) in (tuple, list) and parts:
            return parts[min(index, len(parts) - 1)]
    return None
