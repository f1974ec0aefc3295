"""YAML as a recipe needs it: version 1.2 scalars, positions kept, nothing executable.

PyYAML follows YAML 1.1, where `3e-5` is a string and `no` is False. Here `3e-5` is a number and `no` a string, as
YAML 1.2's core schema has it. Tags, aliases and duplicate keys are refused: a recipe needs none of them, and they are
how a text file becomes code, a bomb or a silent typo. Size, depth and digits are bounded before anything is built.
"""

import re
from typing import Any, ClassVar

import yaml

from engine.errors import InputError, quoted

LARGEST = 200_000  # characters; a recipe is a page of text, and PyYAML reads 50,000 a second
DEEPEST = 20
DIGITS = 100  # of a number; Python itself refuses more than 4,300

Lines = dict[tuple[str, ...], int]  # key path -> line in the file, from 1


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}  # type: ignore[misc]


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+0123456789."),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)

_NUMBER = {"int": lambda s: int(s, 0) if s[:2] in ("0o", "0x") else int(s), "float": lambda s: _float(s)}


def _float(text: str) -> float:
    text = text.lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


def parse(text: str, name: str) -> tuple[Any, Lines]:
    """The value of a YAML text and the line of every key. Raises InputError naming `name`:line."""
    if len(text) > LARGEST:
        raise InputError(f"{name}: {len(text):,} characters is no recipe (at most {LARGEST:,})")
    lines: Lines = {}
    try:
        loader = _Loader(text)
        try:
            depth = 0
            for event in yaml.parse(text, Loader=_Loader):  # before composing: a bomb is refused, not built
                depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
                if isinstance(event, yaml.AliasEvent):
                    raise InputError(f"{name}:{_line(event)}: aliases (*name) are not allowed here")
                if (tag := getattr(event, "tag", None)) is not None:
                    raise InputError(f"{name}:{_line(event)}: the tag {quoted(tag)} is not allowed in a recipe")
                if depth > DEEPEST:
                    raise InputError(f"{name}:{_line(event)}: nested too deep to be a recipe")
            node = loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = _mark(error)
        place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        if isinstance(error, yaml.reader.ReaderError):  # a character that YAML forbids, such as NUL
            place = f"{name}:{text.count(chr(10), 0, error.position) + 1}"
        problem = getattr(error, "problem", None) or str(error).split("\n")[0]
        hint = "; a pattern that begins with * needs quotes" if "alias" in str(error) else ""
        raise InputError(f"{place}: this is not YAML: {problem}{hint}") from error
    return (None if node is None else _build(node, (), lines, name)), lines


def _mark(error: Any) -> Any:
    """Where PyYAML saw the error, or None."""
    return getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)


def _line(event: Any) -> int:
    return int(event.start_mark.line) + 1


def scalar(text: str) -> Any:
    """The value of one override, such as "3e-5", "[accuracy, f1_macro]" or "no"."""
    if text.startswith("*"):  # a path pattern; an alias would be refused anyway
        return text
    return parse(text, "command line")[0]


def _build(node: yaml.Node, path: tuple[str, ...], lines: Lines, name: str) -> Any:
    line = node.start_mark.line + 1
    lines.setdefault(path, line)
    kind = node.tag.removeprefix("tag:yaml.org,2002:")
    if isinstance(node, yaml.MappingNode):
        built: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "?"
            place = f"{name}:{key_node.start_mark.line + 1}"
            if not isinstance(key_node, yaml.ScalarNode):
                raise InputError(f"{place}: a key must be a plain word")
            if key in built:
                raise InputError(f"{place}: the key {quoted(key)} stands here twice (first in line {lines[(*path, key)]})")
            lines[(*path, key)] = key_node.start_mark.line + 1
            built[key] = _build(value_node, (*path, key), lines, name)
        return built
    if isinstance(node, yaml.SequenceNode):
        return [_build(child, (*path, str(i)), lines, name) for i, child in enumerate(node.value)]
    text = node.value
    if kind in _NUMBER and len(text) > DIGITS:
        raise InputError(f"{name}:{line}: a number of {len(text):,} digits")
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    value = _NUMBER[kind](text) if kind in _NUMBER else text
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise InputError(f"{name}:{line}: {value} has more than 64 bits")
    return value


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers  # so that what needs quotes here gets them


def dump(value: Any) -> str:
    """YAML text that `parse` reads back as `value`."""
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120))


__all__ = ["Lines", "dump", "parse", "scalar"]
