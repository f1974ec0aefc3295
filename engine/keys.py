"""The reference of all recipe keys, out of their declarations (engine/schema.py, and the options of each task and method)."""

import types
import typing
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from engine import find
from engine.schema import Data, Group, Schema, Tune


def fields(schema: type[BaseModel], path: list[str]) -> list[tuple[str, Any]]:
    """The keys of the group at `path`."""
    for part in path:
        if part.isdigit():
            continue
        field = next((f for n, f in schema.model_fields.items() if part in (n, f.alias)), None)
        schema = group_of(field.annotation) if field else Group
    return [(field.alias or name, field) for name, field in schema.model_fields.items()]


def group_of(annotation: Any) -> type[BaseModel]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = [group_of(a) for a in typing.get_args(annotation)]
    return next((g for g in inner if g is not Group), Group)


def describe() -> list[tuple[str, str, str, str]]:
    """(key, type, default, meaning) of every key, in the recipe's order, options of all methods included."""
    rows: list[tuple[str, str, str, str]] = []
    for key, field in fields(Schema, []):
        group = group_of(field.annotation)
        if group is Group:
            rows.append((key, _type(field), _default(field), field.description or ""))
            continue
        prefix = {"swap": "swap[]", "tasks": "tasks.NAME"}.get(key, key)
        rows += _described(group, prefix)
        for kind, group in (("tune", Tune), ("tasks", Data)):
            for name in find.names(kind) if key == {"tune": "tune", "tasks": "data"}[kind] else []:
                options = getattr(find.module(kind, name, "describe"), "Options", group)
                rows += [
                    (f"{key}.{k}", _type(f), _default(f), f"({name}) {f.description or ''}")
                    for k, f in fields(options, [])
                    if k not in group.model_fields
                ]
    return rows


def _described(group: type[BaseModel], prefix: str) -> list[tuple[str, str, str, str]]:
    """The keys of a group, and of the groups in it that stand below one key of their own."""
    rows = []
    for k, f in fields(group, []):
        inner = group_of(f.annotation)
        if inner is not Group and typing.get_origin(_plain_type(f.annotation)) is not list:
            if f.description:
                rows.append((f"{prefix}.{k}", _type(f), _default(f), f.description))
            rows += _described(inner, f"{prefix}.{k}")
        else:
            rows.append((f"{prefix}.{k}", _type(f), _default(f), f.description or ""))
    return rows


def _plain_type(annotation: Any) -> Any:
    """`list[X] | None` -> list[X]; others as they are."""
    lists = [a for a in typing.get_args(annotation) if typing.get_origin(a) is list]
    return lists[0] if lists else annotation


def _type(field: Any) -> str:
    said = [m for m in field.metadata if isinstance(m, str)]
    return said[0] if said else _type_name(field.annotation)


def _type_name(annotation: Any) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "a group of keys"
    if origin is typing.Annotated:
        return next((m for m in args[1:] if isinstance(m, str)), _type_name(args[0]))
    if origin is typing.Literal:
        return " | ".join(map(str, args))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_type_name(a) for a in args if a is not types.NoneType)
    if origin is list:
        return f"list of {_type_name(args[0])}"
    plain = {str: "text", int: "whole number", float: "number", bool: "true | false", dict: "mapping"}
    return plain.get(origin or annotation, getattr(annotation, "__name__", str(annotation)))


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined or value is None:
        return "none"
    return {True: "true", False: "false"}.get(value, str(value)) if isinstance(value, bool) else str(value)
