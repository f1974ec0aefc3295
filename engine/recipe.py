"""A recipe: one YAML file and some overrides, checked whole before anything is loaded.

    recipe = load("bert_sentiment", ["train.epochs=1"])
    recipe.train.learning_rate, recipe.where("data.train")     # 5e-05, "recipes/bert_sentiment.yaml:12"

All errors come at once, each with file:line, key and the nearest right name.
"""

import json
import re
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError, create_model
from pydantic_core import PydanticUndefined

from engine import find, override, trust, yaml12
from engine.errors import InputError, listing, nearest, quoted
from engine.schema import Checkpoint, Data, EarlyStopping, Evaluate, Group, Model, Schema, SwapRule, Train, Tune

NAME = re.compile(r"[^\W_][\w.+ -]*")


@dataclass(frozen=True)
class Home:
    """What a recipe's name and relative paths go by. The recipe of a run folder keeps those of the recipe that the run was begun with."""

    path: Path  # the file that was read
    name: str
    folders: tuple[Path, ...]  # where relative paths are looked for, after the working folder and the project
    run: Path | None = None  # the run folder that the file belongs to

    @property
    def noted(self) -> dict[str, Any]:
        """What the environment.json of a run says of its recipe."""
        return {"recipe": self.name, "folders": [str(folder) for folder in dict.fromkeys((Path.cwd(), *self.folders))]}


class Recipe:
    """A checked recipe. Its groups are attributes; `where(key)` says which line of which file set a key."""

    task: str
    seed: int
    model: Model
    data: Any  # Data with the options of its task
    swap: list[SwapRule]
    tune: Any  # Tune with the options of its method
    train: Train
    evaluate: Evaluate
    early_stopping: EarlyStopping | None
    checkpoint: Checkpoint

    def __init__(self, values: Schema, raw: dict[str, Any], where: Callable[[str], str], home: Home, code: Callable[[str], str] = str):
        self.__dict__.update({name: getattr(values, name) for name in Schema.model_fields})
        self.raw, self.where, self.home = raw, where, home
        self.code = code  # "file.py:Class" -> what is loaded for it (engine/trust.py)
        self.stand_in: dict[str, Any] = {}  # the `offline:` block, if it was used
        self.path, self.name, self.folders = home.path, home.name, home.folders

    def error(self, key: str, problem: str) -> InputError:
        return InputError(f"{self.where(key)}: {key}: {problem}")

    def resolved(self) -> dict[str, Any]:
        """Every key with its value, defaults written out; reads back as the same recipe."""
        return {name: _plain(getattr(self, name)) for name in Schema.model_fields if name != "offline"}

    def record(self) -> dict[str, Any]:
        """`resolved`, and the `offline:` block if its keys are among the values."""
        return self.resolved() | ({"offline": self.stand_in} if self.stand_in else {})

    def rules(self) -> list[SwapRule]:
        """The `swap` entries, with the code to load for each."""
        return [rule.model_copy(update={"with_": self.code(rule.with_)}) for rule in self.swap]

    @property
    def way_out(self) -> str:
        """What to say where the hub cannot be reached: that the recipe has a stand-in."""
        block = self.raw.get("offline")
        if self.stand_in or not isinstance(block, dict) or not block:
            return ""
        return f"\nOr use the stand-in that this recipe has ({override.shown(block)}): OFFLINE=1, or --offline."

    def with_tune(self, options: dict[str, Any]) -> "Recipe":
        """The same recipe with more options in its `tune` group."""
        made = _check({**self.raw, "tune": {**(self.raw.get("tune") or {}), **options}}, [], self.where, self.home, self.code)
        made.stand_in = self.stand_in
        return made


def load(
    name: str,
    overrides: list[str] | None = None,
    *,
    offline: bool = False,
    allow_code: bool = False,
    code: Callable[[str], str] | None = None,
) -> Recipe:
    """Read the recipe `name` (in recipes/, or a path), apply overrides, check all of it. Raises InputError.

    A recipe whose `tune.method` is "file.py:Class" runs that file here; `code` may point it at another file, or refuse. In a
    run folder it points at the run's own copy, and refuses what engine/trust.py does not let run, without `allow_code`.
    """
    path = locate(name)
    code = code or trust.code_of(path.parent, allow=allow_code)
    where_from = shown(path)
    if not NAME.fullmatch(path.stem):  # the run folder bears this name, so `...yaml`, whose stem is `..`, would lead out of runs/
        raise InputError(f"{where_from}: a recipe's file name has letters, digits and . _ - and begins with a letter or digit")
    raw, lines = yaml12.parse(text_of(path), where_from)
    home = _home(path)
    if not isinstance(raw, dict):
        raise InputError(f"{where_from}: a recipe is a mapping of keys, beginning with `task:`")

    def where(key: str) -> str:
        """The line of `key`, or of the nearest group around it."""
        parts = tuple(key.split("."))
        while parts and parts not in lines:
            parts = parts[:-1]
        return f"{where_from}:{lines[parts]}" if parts else where_from

    if offline:
        block = raw.get("offline")
        if not isinstance(block, dict) or not block:
            raise InputError(f"{where_from}: --offline needs an `offline:` block in the recipe, and it has none")
        keys, merged = override.leaves(block), override.merged(raw, block)
        for key in keys:
            override.drop_rivals(merged, key, keys)

        def stood_in(key: str) -> str:
            """The line in the `offline:` block where the key came from, if it did."""
            named = any(key == k or key.startswith(k + ".") or k.startswith(key + ".") for k in keys)
            return where(f"offline.{key}" if named else key)

        made = _check(merged, overrides or [], stood_in, home, code)
        made.stand_in = block
        return made
    made = _check(raw, overrides or [], where, home, code)
    if home.run and isinstance(raw.get("offline"), dict):
        made.stand_in = raw["offline"]  # a run keeps the block only if it was used: its keys are among the values
    return made


def _home(path: Path) -> Home:
    """The home of the recipe in `path`; a run's recipe.yaml has environment.json beside it, which knows where the run came from."""
    try:
        noted = json.loads((path.parent / "environment.json").read_text("utf-8")) if path.name == "recipe.yaml" else {}
        name, folders = noted["recipe"], [Path(folder) for folder in noted.get("folders", ())]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return Home(path, path.stem, (path.parent,))
    if not (isinstance(name, str) and NAME.fullmatch(name)):
        return Home(path, path.stem, (path.parent,))
    return Home(path, name, (*folders, path.parent), path.parent)


def text_of(path: Path) -> str:
    """A recipe's text: a plain file (a pipe or a device would never end), of UTF-8, no larger than a recipe can be."""
    place = shown(path)
    if not path.is_file():
        raise InputError(f"{place}: this is no file")
    try:
        with path.open("rb") as file:
            raw = file.read(4 * yaml12.LARGEST + 1)  # 4 bytes are the longest character
    except OSError as error:
        raise InputError(f"{place}: cannot be read: {error.strerror}") from error
    if len(raw) > 4 * yaml12.LARGEST:
        raise InputError(f"{place}: more than {4 * yaml12.LARGEST:,} bytes are no recipe")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(f"{place}:{line}: not UTF-8 (byte 0x{raw[error.start]:02x}); save the recipe as UTF-8") from error


def locate(name: str) -> Path:
    """The file of a recipe: a path, or a name in recipes/."""
    if name.endswith((".yaml", ".yml")) or "/" in name:
        found = find.locate(name)
        if found is None or not found.is_file():
            raise InputError(f"no recipe file {quoted(name)}")
        return found
    known = available()
    if name not in known:
        raise InputError(f"no recipe {quoted(name)} in recipes/{nearest(name, known)}")
    return known[name]


def available() -> dict[str, Path]:
    """Name -> file of every recipe in recipes/ (here first, then the project's own)."""
    folders = (find.PROJECT / "recipes", Path.cwd() / "recipes")
    return {p.stem: p for folder in folders for p in sorted(folder.glob("*.yaml"))}


def _check(
    raw: dict[str, Any], overrides: list[str], where: Callable[[str], str], home: Home, code: Callable[[str], str] = str
) -> Recipe:
    raw, from_command = override.override(raw, overrides)

    def place(key: str) -> str:
        return "command line" if any(key == k or key.startswith(k + ".") for k in from_command) else where(key)

    tune = raw.get("tune")
    method = tune.get("method", "full") if isinstance(tune, dict) else "full"
    problems: list[str] = []
    options: type[BaseModel] = Tune
    data: type[BaseModel] = Data
    for kind, name, key in (("tune", method, "tune.method"), ("tasks", raw.get("task"), "task")):
        if isinstance(name, str):
            try:
                if kind == "tune" and ":" in name:
                    options = find.method(code(name), f"{place(key)}: {key}", home.folders).Options
                    if not (isinstance(options, type) and issubclass(options, Tune)):
                        raise InputError(f"{place(key)}: {key}: {name}: its Options must derive from engine.schema.Tune")
                elif name not in find.names(kind):
                    what = "method" if kind == "tune" else "task"
                    raise InputError(f"{place(key)}: {key}: no {what} '{name}'{nearest(name, find.names(kind))}")
                elif kind == "tune" and name != "full":  # the one method without options needs no import
                    options = find.module(kind, name, place(key)).Options
                elif kind == "tasks" and find.offers(kind, name, "Options"):
                    data = find.module(kind, name, place(key)).Options
            except InputError as error:
                problems.append(str(error))
    schema = create_model("Recipe", __base__=Schema, tune=(options, Field(default_factory=options)), data=(data, ...))
    try:
        values = schema.model_validate(raw)
    except ValidationError as error:
        problems += [p for e in error.errors() if (p := _problem(e, schema, raw, place)) not in problems]
        raise InputError(listing(problems)) from error
    problems += _cross_checks(values, place)
    if problems:
        raise InputError(listing(problems))
    return Recipe(values, raw, place, home, code)


def _problem(error: Any, schema: type[BaseModel], raw: Any, where: Callable[[str], str]) -> str:
    """One pydantic error as a line for people."""
    given = raw
    parts: list[str] = []  # the location without the names that pydantic adds for members of a union
    for part in error["loc"]:
        inside = (isinstance(given, dict) and part in given) or (isinstance(given, list) and isinstance(part, int))
        if inside:
            given = given[part] if not isinstance(given, list) or part < len(given) else None
            parts.append(str(part))
        elif error["type"] == "missing":
            parts.append(str(part))
    key = ".".join(parts)
    shown_key = quoted(key, 100)[1:-1]
    kind, message = error["type"], error["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        known = [k for k, _ in _fields(schema, parts[:-1])]
        return f"{where(key)}: {shown_key}: unknown key{nearest(parts[-1], known)}"
    if kind == "missing":
        return f"{where(key)}: {key}: this key is required and missing"
    message = {
        "int_type": "a whole number is needed",
        "float_type": "a number is needed",
        "string_type": "a text is needed",
        "bool_type": "true or false is needed",
        "list_type": "a list is needed",
        "dict_type": "a mapping is needed",
        "model_type": "a group of keys is needed",
        "int_from_float": "a whole number is needed",
        "finite_number": "a finite number is needed",
    }.get(kind, message[0].lower() + message[1:])
    return f"{where(key)}: {shown_key}: {message}, not {quoted(given)}"


def _cross_checks(values: Schema, where: Callable[[str], str]) -> list[str]:
    """What no single key can know."""
    problems = []
    stop = values.early_stopping
    if stop and values.data.validation is None:
        problems.append(f"{where('early_stopping')}: early_stopping: needs data.validation: a file, or a fraction such as 0.1")
    if stop and stop.monitor != "loss" and values.evaluate.metrics and stop.monitor not in values.evaluate.metrics:
        hint = nearest(stop.monitor, [*values.evaluate.metrics, "loss"])
        problems.append(f"{where('early_stopping.monitor')}: early_stopping.monitor: not among evaluate.metrics{hint}")
    m = values.model
    if (m.name is None) == (m.from_scratch is None):
        both = "name and from_scratch stand there both" if m.name else "neither name nor from_scratch stands there"
        ways = "name: a folder or a hub id; or from_scratch: {architecture: bert, layers: 4, hidden: 256, heads: 4}"
        problems.append(f"{where('model')}: model: {both}; write one of the two ({ways})")
    elif m.from_scratch and m.tokenizer is None:
        ways = "a folder such as gpt2, or {train: {kind: wordpiece, vocabulary: 8000}}"
        problems.append(f"{where('model')}: model.tokenizer: a model from scratch needs one: {ways}")
    elif m.name and not isinstance(m.tokenizer, str | None):
        problems.append(
            f"{where('model.tokenizer')}: model.tokenizer.train: the vectors of {quoted(m.name)} belong to its own tokens;"
            " train a tokenizer with model.from_scratch only"
        )
    if values.data.labels and len(set(values.data.labels)) < len(values.data.labels):
        problems.append(f"{where('data.labels')}: data.labels: a label stands there twice")
    return problems


def _fields(schema: type[BaseModel], path: list[str]) -> list[tuple[str, Any]]:
    """The keys of the group at `path`."""
    for part in path:
        if part.isdigit():
            continue
        field = next((f for n, f in schema.model_fields.items() if part in (n, f.alias)), None)
        schema = _group_of(field.annotation) if field else Group
    return [(field.alias or name, field) for name, field in schema.model_fields.items()]


def _group_of(annotation: Any) -> type[BaseModel]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = [_group_of(a) for a in typing.get_args(annotation)]
    return next((g for g in inner if g is not Group), Group)


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(by_alias=True)
    return [_plain(v) for v in value] if isinstance(value, list) else value


def shown(path: Path) -> str:
    """A path as short as it can be read."""
    try:
        whole = path.resolve()
    except (OSError, RuntimeError):  # a loop of links
        return str(path)
    return next((str(whole.relative_to(base)) for base in (Path.cwd(), find.PROJECT) if whole.is_relative_to(base)), str(path))


# -- describe ---------------------------------------------------------------------------------------------------------


def describe() -> list[tuple[str, str, str, str]]:
    """(key, type, default, meaning) of every key, in the recipe's order, options of all methods included."""
    rows: list[tuple[str, str, str, str]] = []
    for key, field in _fields(Schema, []):
        group = _group_of(field.annotation)
        if group is Group:
            rows.append((key, _type(field), _default(field), field.description or ""))
            continue
        prefix = f"{key}[]" if key == "swap" else key
        rows += _described(group, prefix)
        for kind, group in (("tune", Tune), ("tasks", Data)):
            for name in find.names(kind) if key == {"tune": "tune", "tasks": "data"}[kind] else []:
                options = getattr(find.module(kind, name, "describe"), "Options", group)
                rows += [
                    (f"{key}.{k}", _type(f), _default(f), f"({name}) {f.description or ''}")
                    for k, f in _fields(options, [])
                    if k not in group.model_fields
                ]
    return rows


def _described(group: type[BaseModel], prefix: str) -> list[tuple[str, str, str, str]]:
    """The keys of a group, and of the groups in it that stand below one key of their own."""
    rows = []
    for k, f in _fields(group, []):
        inner = _group_of(f.annotation)
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
