"""A recipe: one YAML file and some overrides, checked whole before anything is loaded.

    recipe = load("bert_sentiment", ["train.epochs=1"])
    recipe.train.learning_rate, recipe.where("data.train")     # 5e-05, "recipes/bert_sentiment.yaml:12"

All errors come at once, each with file:line, key and the nearest right name.
"""

import copy
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError, create_model

from engine import find, override, trust, yaml12
from engine.errors import InputError, listing, nearest, quoted
from engine.keys import fields
from engine.schema import Checkpoint, Data, EarlyStopping, Evaluate, Model, Part, Schema, SwapRule, Train, Tune

NAME = re.compile(r"[^\W_][\w.+ -]*")
TASK_NAME = re.compile(r"[^\W\d_][\w-]{0,39}")  # a folder and a key of its own
TAKEN = ("mean", "loss")  # scores of all tasks together


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
    tasks: dict[str, Any]  # of multitask: name -> Part
    swap: list[SwapRule]
    tune: Any  # Tune with the options of its method
    train: Train
    evaluate: Evaluate
    early_stopping: EarlyStopping | None
    checkpoint: Checkpoint

    def __init__(
        self, values: Schema, raw: dict[str, Any], where: Callable[[str], str], home: Home, code: Callable[[str], str] = str,
        tasks: dict[str, Any] | None = None,
    ):  # fmt: skip
        self.__dict__.update({name: getattr(values, name) for name in Schema.model_fields} | {"tasks": tasks or {}})
        self.within = ""  # "tasks.NAME." of a recipe that is one of multitask's
        self.raw, self.where, self.home = raw, where, home
        self.code = code  # "file.py:Class" -> what is loaded for it (engine/trust.py)
        self.stand_in: dict[str, Any] = {}  # the `offline:` block, if it was used
        self.path, self.name, self.folders = home.path, home.name, home.folders

    def at(self, key: str) -> str:
        """Where a key stands and what it is called in full, as errors begin: "ner.yaml:12: data.train"."""
        ours = self.within and key.partition(".")[0] in ("task", "data")
        return f"{self.where(key)}: {self.within if ours else ''}{key}"

    def error(self, key: str, problem: str) -> InputError:
        return InputError(f"{self.at(key)}: {problem}")

    def part(self, name: str) -> "Recipe":
        """One of multitask's tasks as a recipe of its own: its task, data and metrics; all else is this recipe's."""
        one, part, whole, within = copy.copy(self), self.tasks[name], self.where, f"tasks.{name}."
        own = (self.raw["tasks"][name].get("data") or {}).keys()
        one.task, one.data, one.tasks, one.within = part.task, part.data, {}, within
        one.evaluate = self.evaluate.model_copy(update={"metrics": part.metrics})

        def where(key: str) -> str:
            group, _, rest = key.partition(".")
            first = rest.partition(".")[0]
            inherited = group == "data" and first not in own and first in (self.raw.get("data") or {})
            if key == "evaluate.metrics":
                return whole(within + "metrics")
            return whole(within + key) if group in ("task", "data") and not inherited else whole(key)

        one.where = where
        return one

    def resolved(self) -> dict[str, Any]:
        """Every key with its value, defaults written out; reads back as the same recipe."""
        names = [name for name in Schema.model_fields if name != "offline" and (name != "tasks" or self.tasks)]
        made = {name: _plain(getattr(self, name)) for name in names}
        for one in made.get("tasks", {}).values():
            del one["data"]["cache"]  # all tasks have the recipe's
        return made

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
    name: str, overrides: list[str] | None = None, *, offline: bool = False, allow_code: bool = False,
    code: Callable[[str], str] | None = None,
) -> Recipe:  # fmt: skip
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
        name = NAME.fullmatch(noted["recipe"])[0]  # type: ignore[index]  # no name: a TypeError
        folders = [Path(folder) for folder in noted.get("folders", ())]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
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
    schema = create_model(
        "Recipe", __base__=Schema, tune=(options, Field(default_factory=options)), data=(data, ...),
        tasks=(dict[str, Any], Field(default_factory=dict)),
    )  # fmt: skip
    tasks, wrong = _tasks(raw, place)
    try:
        values = schema.model_validate(raw)
    except ValidationError as error:
        problems += [p for e in error.errors() if (p := _problem(e, schema, raw, place)) not in problems]
        raise InputError(listing(problems + wrong)) from error
    problems += wrong or _cross_checks(values, tasks, place)
    if problems:
        raise InputError(listing(problems))
    return Recipe(values, raw, place, home, code, tasks)


def _tasks(raw: dict[str, Any], where: Callable[[str], str]) -> tuple[dict[str, Part], list[str]]:
    """multitask's tasks, each with the recipe's `data` as defaults, and what is wrong with them."""
    given, shared = raw.get("tasks"), raw.get("data")
    if raw.get("task") != "multitask":
        return {}, [f"{where('tasks')}: tasks: only `task: multitask` has tasks"] if given else []
    if not isinstance(given, dict) or not given:
        return {}, [
            f"{where('tasks')}: tasks: multitask needs some: {{NAME: {{task: classification, data: {{train: FILE}}}}, ...}}"
        ]
    shared = {k: v for k, v in shared.items() if k in Data.model_fields and k != "cache"} if isinstance(shared, dict) else {}
    made, problems = {}, []
    for name, one in given.items():
        key = f"tasks.{name}"
        if not TASK_NAME.fullmatch(str(name)) or name in TAKEN:
            problems.append(f"{where('tasks')}: tasks: {quoted(name)} is no name of a task: a letter, then letters, digits, _ and -; "
                            f"not {' and not '.join(TAKEN)}")  # fmt: skip
            continue
        own = one.get("data", {}) if isinstance(one, dict) else None
        if not isinstance(own, dict):
            problems.append(f"{where(key)}: {key}: a group of keys is needed, with its data as one, not {quoted(one)}")
            continue
        if "cache" in own:
            problems.append(f"{where(key)}: {key}.data.cache: one folder serves all tasks; set data.cache")
        kind, known = one.get("task"), [n for n in find.names("tasks") if n != "multitask"]
        if isinstance(kind, str) and kind not in known:
            problems.append(
                f"{where(key + '.task')}: {key}.task: no task '{kind}' that can be one of several{nearest(kind, known)}"
            )
            continue
        data: type[BaseModel] = Data
        if isinstance(kind, str) and find.offers("tasks", kind, "Options"):
            data = find.module("tasks", kind, where(key)).Options
        schema, whole = create_model("Part", __base__=Part, data=(data, ...)), {**one, "data": {**shared, **own}}
        try:
            made[name] = schema.model_validate(whole)
        except ValidationError as error:
            for e in error.errors():
                _, at, *_ = [*map(str, e["loc"]), "", ""]
                if e["type"] == "missing" or at in own or at not in shared:  # else it is told at the recipe's own data
                    problems.append(_problem(e, schema, whole, lambda k, key=key: where(f"{key}.{k}"), f"{key}."))  # type: ignore[misc]
    return made, problems


def _problem(error: Any, schema: type[BaseModel], raw: Any, where: Callable[[str], str], before: str = "") -> str:
    """One pydantic error as a line for people; `before` the key stands what it lies in."""
    given = raw
    parts: list[str] = []  # the location without the names that pydantic adds for members of a union
    for part in error["loc"]:
        inside = (isinstance(given, dict) and part in given) or (isinstance(given, list) and isinstance(part, int))
        if part == "[key]":  # of a mapping, it is the key that is wrong
            given = parts.pop()
        elif inside:
            given = given[part] if not isinstance(given, list) or part < len(given) else None
            parts.append(str(part))
        elif error["type"] == "missing":
            parts.append(str(part))
    key = ".".join(parts)
    shown_key = before + quoted(key, 100)[1:-1]
    kind, message = error["type"], error["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        known = [k for k, _ in fields(schema, parts[:-1])]
        return f"{where(key)}: {shown_key}: unknown key{nearest(parts[-1], known)}"
    if kind == "missing":
        return f"{where(key)}: {before}{key}: this key is required and missing"
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
        "too_short": "a list that names something is needed" if given == [] else message,
        "string_too_short": "a name is needed, or no such key",
    }.get(kind, message[0].lower() + message[1:])
    return f"{where(key)}: {shown_key}: {message}, not {quoted(given)}"


def _cross_checks(values: Schema, tasks: dict[str, Part], where: Callable[[str], str]) -> list[str]:
    """What no single key can know."""
    problems = []
    stop = values.early_stopping
    data: dict[str, Any] = {name: one.data for name, one in tasks.items()}
    for split in ("validation", "test"):
        without = [name for name, one in data.items() if getattr(one, split) is None]
        if 0 < len(without) < len(data):
            problems.append(f"{where(f'tasks.{without[0]}.data')}: tasks.{without[0]}.data.{split}: missing, and other tasks have one; "
                            "give each task one, or none")  # fmt: skip
    for name, one in data.items():
        if one.labels and len(set(one.labels)) < len(one.labels):
            problems.append(f"{where(f'tasks.{name}.data.labels')}: tasks.{name}.data.labels: a label stands there twice")
    if stop and [one for one in (data or {"": values.data}).values() if one.validation is None]:
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


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(by_alias=True)
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list) else value


def shown(path: Path) -> str:
    """A path as short as it can be read."""
    try:
        whole = path.resolve()
    except (OSError, RuntimeError):  # a loop of links
        return str(path)
    return next((str(whole.relative_to(base)) for base in (Path.cwd(), find.PROJECT) if whole.is_relative_to(base)), str(path))
