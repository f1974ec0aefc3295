"""From a recipe to everything that a run needs, before it begins.

    recipe -> data -> task -> model -> swap -> tune -> freeze -> tokens -> windows

The order is law: layers are swapped before anything is frozen, and frozen before anything reaches the optimizer.
Nothing is written but the token cache, so whatever is wrong with recipe, data or model is found before a run folder
exists. `check`, `layers` and `finetune` all begin here.
"""

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine import adapters, distributed, find, freeze, models, optim, override, scratch, seeds, swap, together, vocabulary
from engine.data import encode, read, rows, several, windows
from engine.errors import InputError, plain, quoted
from engine.fast import frozen_cache, kernels
from engine.fast.install import Pieces, install
from engine.recipe import Recipe


def tell(line: str) -> None:
    """A line for people, at once, from rank 0. What files hold (labels, names) is made harmless to a terminal."""
    if distributed.rank() == 0:
        print(plain(line), flush=True)


INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass
class Prepared:
    """Everything a run needs, before it begins."""

    recipe: Recipe
    task: Any
    splits: dict[str, rows.Split]
    facts: dict[str, Any]
    encoded: dict[str, encode.Encoded]
    loaded: models.Loaded
    method: Any  # the module engine/tune/NAME.py, or a class
    head: list[str]
    own: list[str]  # the parameters that the method added
    rates: dict[str, float]  # parameter name -> factor of the learning rate
    swapped: list[swap.Swapped]
    coverage: str
    windows: windows.Windows
    steps: int
    device: torch.device
    precision: str
    metrics: list[str]
    packed: str
    notes: list[str]
    pieces: Pieces

    def places(self, name: str) -> list[str]:
        """Where each example of a split stands: "file:line"."""
        return self.encoded[name].places(self.splits[name].table.places)

    def probe(self) -> dict[str, torch.Tensor]:
        """Three examples of train as model inputs: the two shortest, which packed share a row, and the longest."""
        return _probe(self.encoded["train"], self.device)


def prepare(
    recipe: Recipe,
    say: Callable[[str], None] = tell,
    interrupted: Callable[[], bool] = lambda: False,
    *,
    resumed: bool = False,
    begun: Path | None = None,
) -> Prepared:
    """Read, check, load, swap, freeze, encode. Raises InputError; writes nothing but the token cache.

    A resumed run takes its weights from its checkpoint, not from the adapter that `tune.start` names. A tokenizer that was
    trained for the run in the folder `begun` is that of the run.
    """
    recipe = adapters.started(recipe)
    folders = recipe.folders
    notes: list[str] = []
    if recipe.stand_in:
        notes.append(f"the recipe's offline block stands in for its own {override.shown(recipe.stand_in)}")
    cache = _cache(recipe)
    task = _task(recipe)
    splits = _every_split(recipe, task, folders, notes)
    facts = rows.facts(splits, task)
    names = _metrics(recipe, task)
    device = models.device_of(recipe.train.device, recipe.where("train.device"))
    loaded = base(recipe, task, folders, lambda: _texts(task, splits["train"]), cache, begun)
    head = models.head_of(loaded.model, loaded.fresh)
    swapped = swap.apply_rules(loaded.model, recipe.rules(), recipe.where, folders)
    method, own, coverage = _tune(recipe, loaded, head, swapped, None if resumed else recipe.tune.start, notes)
    loaded.model.to(device)
    with distributed.first_alone():
        encoded = {
            name: several.encoded(task, split, loaded.tokenizer, recipe.data.max_length, cache, interrupted)
            for name, split in splits.items()
        }
    models.check_ids(loaded, {name: tokens.ragged["input_ids"][0] for name, tokens in encoded.items()})
    notes += _look_at_all(recipe, facts, encoded)
    if swapped or ":" in recipe.tune.method:  # code that is not ours: does it fit where it stands?
        with models.eval_mode(loaded.model):
            key = "swap" if swapped else "tune.method"
            swap.probe(loaded.model, swapped, _probe(encoded["train"], device), f"{recipe.where(key)}: {key}")
    with kernels.fast_kernels(device, recipe.train.kernels):
        pieces = install(loaded.model, recipe, _probe(encoded["train"], device))
    made = _windows(recipe, task, encoded["train"], device, packed=pieces.packing is not None)
    made.places = encoded["train"].places(splits["train"].table.places)
    steps = min(made.per_epoch * recipe.train.epochs, recipe.train.max_steps or made.per_epoch * recipe.train.epochs)
    kind = optim.precision(recipe.train.precision, device)
    if recipe.tasks and recipe.train.cache_frozen != "off":
        raise recipe.error("train.cache_frozen", "the states of several data sets are not kept; take off")
    if kind == "float16" and recipe.train.weights == "bfloat16":
        raise recipe.error("train.weights", "bfloat16 does not go with train.precision=float16; take bfloat16 or float32 there")
    rates, timetable = _tempo(recipe, loaded.model, method, head, made.per_epoch)
    coverage += timetable
    ready = Prepared(
        recipe, task, splits, facts, encoded, loaded, method, head, own, rates, swapped, coverage, made, steps, device, kind, names,
        "; ".join(pieces.said), notes, pieces,
    )  # fmt: skip
    announce(ready, say)
    return ready


def announce(ready: Prepared, say: Callable[[str], None]) -> None:
    """What is about to happen, a line for each stage of the data's way."""
    t, total = ready.recipe.train, models.count(ready.loaded.model)[1]
    sizes = "  ".join(f"{name} {len(split):,}" for name, split in ready.splits.items())
    say(f"data    {sizes} examples; {ready.task.asked()}")
    origin = ready.loaded.source.origin
    say(f"model   {ready.recipe.model.label} ({origin}), {total / 1e6:.1f} M parameters; head: {', '.join(ready.head)}")
    if ready.loaded.trained:
        say(f"tokens  {len(ready.loaded.tokenizer):,} pieces, learnt from the texts of data.train")
    for one in summed(ready.swapped):
        say(f"swap    {one}")
    say(f"tune    {ready.coverage}")
    plan = f"{t.epochs} epochs x {ready.windows.per_epoch} windows of {t.batch_size}"
    ranks = f" in {distributed.world()} processes" if distributed.world() > 1 else ""
    say(f"train   {plan}: {ready.steps} steps, {ready.precision} on {ready.device}{ranks}; {ready.packed}")
    if mixed := ready.windows.said():
        say(f"tasks   {mixed}")
    for note in ready.notes:
        say(f"note    {note}")


def cache_frozen(
    ready: Prepared, code: dict[str, str], interrupted: Callable[[], bool] = lambda: False
) -> tuple[frozen_cache.FrozenCache | None, str]:
    """The frozen-prefix cache of train and validation, if the recipe asks for it; `code`: sha256 of custom layers. (cache, what to say).

    It comes after a resumed run's weights are in. The test split is scored once, so nothing is gained by keeping its states.
    """
    recipe, kind = ready.recipe, ready.recipe.train.cache_frozen
    if kind == "off":
        return None, ""
    splits = [ready.encoded[name] for name in ("train", "validation") if name in ready.encoded]
    last = ready.pieces.last_layer
    if last and not any(map(freeze.ever_trains, last.block.parameters())):
        last.remove()  # where even the last block is frozen, its states are kept whole, not computed in part
    with kernels.fast_kernels(ready.device, recipe.train.kernels):
        return frozen_cache.install(
            ready.loaded.model, ready.task, splits, ready.head, kind=kind, folder=_cache(recipe), limit=recipe.train.cache_limit,
            device=ready.device, autocast=optim.autocast(ready.precision, ready.device),
            packing=ready.pieces.packing, about=[ready.precision, code, recipe.resolved().get("swap")], interrupted=interrupted,
        )  # fmt: skip


def _task(recipe: Recipe) -> Any:
    task_class = find.module("tasks", recipe.task, recipe.where("task")).Task
    try:
        task = task_class(recipe.data.columns, recipe.data.labels, recipe.data)
    except InputError as error:
        raise InputError(f"{recipe.where('data.columns')}: {_in_full(recipe, error, 'data.')}") from error
    if recipe.tasks:
        task.hold({name: _task(recipe.part(name)) for name in recipe.tasks}, recipe.tasks)
    return task


def _in_full(recipe: Recipe, error: InputError, key: str) -> str:
    """A message of a task, which calls its keys as they are called where it is the only one."""
    return str(error).replace(key, recipe.within + key) if recipe.within else str(error)


def _cache(recipe: Recipe) -> Path:
    """The folder of tokenised data. A recipe may come from anyone, so only the command line points out of the working folder."""
    named, here = recipe.data.cache, Path.cwd()
    path = Path(os.path.normpath(here / named))
    if not named.strip() or "\0" in named or path == here:
        raise recipe.error("data.cache", f"{quoted(named)} names no folder of its own")
    if not path.is_relative_to(here) and recipe.where("data.cache") != "command line":
        problem = (
            f"{quoted(named)} lies outside the working folder; if you mean it, give it on the command line: data.cache=FOLDER"
        )
        raise recipe.error("data.cache", problem)
    return Path(named)


def _metrics(recipe: Recipe, task: Any) -> list[str]:
    """The headline metrics, checked, and that early stopping watches one of them."""
    for name, part in task.parts.items():
        one = recipe.part(name)
        try:
            first = _metrics(one, part)[0]
        except InputError as error:
            raise InputError(str(error).replace("evaluate.metrics", f"{one.within}metrics")) from error
        if part.lower_is_better(first):
            raise InputError(f"{one.where('evaluate.metrics')}: {one.within}metrics: '{first}' comes first and goes into the mean of the "
                             "tasks, where more must be better; put another one first")  # fmt: skip
    names: list[str] = recipe.evaluate.metrics or task.default_metrics
    task.check(names, recipe.where("evaluate.metrics"))
    stop = None if recipe.within else recipe.early_stopping
    if stop and stop.monitor not in (*names, "loss"):
        raise recipe.error("early_stopping.monitor", f"'{stop.monitor}' is not among the metrics {', '.join(names)}, loss")
    return names


def base(
    recipe: Recipe, task: Any, folders: tuple[Path, ...], texts: Callable[[], list[str]], cache: Path | None, begun: Path | None
) -> models.Loaded:
    """The model as training finds it: pretrained, or from scratch. A tokenizer to train reads `texts`. Several tasks share its body."""
    if task.parts:
        return together.together({
            name: base(recipe.part(name), part, folders, texts, cache, begun) for name, part in task.parts.items()
        })  # fmt: skip
    m, where = recipe.model, f"{recipe.where('model.name')}: model.name"
    if m.name is None:
        kept = begun / vocabulary.KEPT if begun else None
        return scratch.load(recipe, task, texts, cache=cache, folders=folders, kept=kept)
    source = models.find(m.name, m.revision, m.offline, where, folders, recipe.way_out)
    own = f"{recipe.where('model.tokenizer')}: model.tokenizer"
    tokenizer = vocabulary.load(m.tokenizer, own, folders) if isinstance(m.tokenizer, str) else None
    seeds.seed_all(recipe.seed)  # the head's fresh weights belong to the seed
    return models.load(source, task.auto_class, task.model_options(), where, recipe.data.max_length, tokenizer)


def _texts(task: Any, split: Any) -> list[str]:
    """All texts that a split's rows hold."""
    if task.parts:
        return [text for name, part in task.parts.items() for text in _texts(part, split.parts[name])]
    return [text for row in split.table.rows for text in task.text_of(row).split("\x1f")]


def _tune(
    recipe: Recipe, loaded: models.Loaded, head: list[str], swapped: list[swap.Swapped], start: str | None, notes: list[str]
) -> tuple[Any, list[str], str]:
    """The method, applied: (method, the parameters that it added, coverage line)."""
    method = find.method(recipe.code(recipe.tune.method), recipe.where("tune.method"), recipe.folders)
    taken, longest = method.takes(recipe.tune) if hasattr(method, "takes") else 0, models.positions(loaded.model)[0]
    if longest and recipe.data.max_length + taken > longest:
        problem = f"{recipe.data.max_length} tokens and the {taken} of the prompt are more than this model's {longest} positions"
        raise recipe.error("data.max_length", f"{problem}; at most {longest - taken} are left for the text")
    try:
        line, own = adapters.put_in(loaded.model, method, recipe.tune, head)
        if start:
            where = "tune.start"
            adapter = adapters.read(adapters.locate(start, where, recipe.folders), where)
            notes.append("begun from " + adapters.load(loaded.model, method, recipe.tune, adapter, head, where))
        freeze.by_pattern(loaded.model, recipe.tune.freeze or [], recipe.tune.train or [])
    except InputError as error:
        raise InputError(f"{recipe.where('tune')}: {error}") from error
    stuck = freeze.fresh_and_frozen(loaded.model, loaded.fresh, swapped)
    if stuck:
        problem = f"{len(stuck)} fresh parameters are frozen and would stay random, such as {stuck[0]}; let them train"
        raise recipe.error("tune", problem)
    trains, total = models.count(loaded.model)
    if not trains:
        raise recipe.error("tune", "nothing is left to train")
    if recipe.model.from_scratch and trains < total:
        notes.append(f"the weights of {recipe.model.label} are random, and those that {recipe.tune.method} freezes stay so")
    return method, own, f"{line}; {trains:,} of {total:,} parameters train ({trains / total:.2%})"


def _tempo(recipe: Recipe, model: Any, method: Any, head: list[str], per_epoch: int) -> tuple[dict[str, float], str]:
    """How fast each parameter learns, and from when on: (name -> factor of the learning rate, a line on the timetable)."""
    try:
        timetable = ""
        if recipe.tune.unfreeze is not None:
            timetable = "; " + freeze.set_timetable(model, head, recipe.tune.unfreeze, per_epoch)
        rates = freeze.layer_rates(model, head, recipe.tune.layer_decay)
        own = method.rates(model, recipe.tune) if hasattr(method, "rates") else {}
        for name, factor in (*freeze.rates_by_pattern(model, recipe.tune.rates).items(), *own.items()):
            rates[name] *= factor
    except InputError as error:
        raise InputError(f"{recipe.where('tune')}: {error}") from error
    return rates, timetable


def _look_at_all(recipe: Recipe, facts: dict[str, Any], encoded: dict[str, Any]) -> list[str]:
    """`_look_at`; of several data sets each by itself, and the lengths of all together."""
    if not recipe.tasks:
        return _look_at(facts, encoded, recipe.data.max_length)
    notes = []
    for name, one in recipe.tasks.items():
        own = {split: fact["tasks"][name] for split, fact in facts.items()}
        found = _look_at(own, {split: tokens.parts[name] for split, tokens in encoded.items()}, one.data.max_length)
        notes += [f"{name}: {note}" for note in found]
    _look_at(facts, encoded, recipe.data.max_length)
    return notes


def _look_at(facts: dict[str, Any], encoded: dict[str, encode.Encoded], max_length: int) -> list[str]:
    """Add the lengths to the facts; returns what a user should know about leaks and cut texts."""
    notes = []
    for name, tokens in encoded.items():
        fact, cut = facts[name], int(tokens.scalars["truncated"].sum())
        mean, longest = round(float(tokens.lengths.mean()), 1), int(tokens.lengths.max())
        fact["tokens"] = {"mean": mean, "longest": longest, "truncated": cut}
        if cut > 0.05 * len(tokens):
            notes.append(f"{cut} of {len(tokens)} texts of {name} were cut at data.max_length={max_length}")
        for key, n in fact.items():
            if key.startswith("also_in_") and n:
                other = key.removeprefix("also_in_")
                notes.append(f"{n} texts of {name} also stand in {other}: the score on {name} is too good by that")
    return notes


def _windows(recipe: Recipe, task: Any, train: encode.Encoded, device: torch.device, *, packed: bool) -> windows.Windows:
    """The windows of train."""
    budget = recipe.train.micro_batch_tokens
    if budget == "auto":
        budget = 1024 if device.type == "cpu" else 16384  # a CPU's caches like small batches, a GPU large ones
    how: dict[str, Any] = {
        "batch_size": recipe.train.batch_size, "tokens": int(budget), "seed": recipe.seed, "packed": packed,
        "rank": distributed.rank(), "world": distributed.world(),
    }  # fmt: skip
    if isinstance(train, several.Joined):
        return several.Mixed(train, task.items, mixing=recipe.data.mixing, temperature=recipe.data.temperature, **how)
    return windows.Windows(train, task.items, **how)


def _probe(train: encode.Encoded, device: torch.device) -> dict[str, torch.Tensor]:
    return {k: v.to(device) for k, v in train.unlike().items() if k in INPUTS}


def _every_split(recipe: Recipe, task: Any, folders: tuple[Path, ...], notes: list[str]) -> dict[str, Any]:
    """`_splits`; of several tasks those of each, joined."""
    if not task.parts:
        return _splits(recipe, task, folders, notes)
    made = {}
    for name, part in task.parts.items():
        told: list[str] = []
        made[name] = _splits(recipe.part(name), part, folders, told)
        notes += [f"{name}: {note}" for note in told]
    first = next(iter(made.values()))
    return {split: several.join({name: own[split] for name, own in made.items()}) for split in first}


def _splits(recipe: Recipe, task: Any, folders: tuple[Path, ...], notes: list[str]) -> dict[str, rows.Split]:
    """train, validation, test: read, columns checked, bad rows named or dropped, train's labels learnt."""
    data = recipe.data
    options: dict[str, Any] = {"folders": folders, "format": data.format, "names": data.names, "quoting": data.quoting,
                               "bad_rows": data.bad_rows, "way_out": recipe.way_out}  # fmt: skip
    where = recipe.at("data.columns")
    sources = {"train": data.train, "validation": data.validation, "test": data.test}
    tables = {
        name: read.read(files, recipe.at(f"data.{name}"), **options)
        for name, files in sources.items() if isinstance(files, list)
    }  # fmt: skip
    if data.train_limit:
        beyond = max(0, len(tables["train"]) - data.train_limit)
        tables["train"] = tables["train"].take(list(range(len(tables["train"]) - beyond)))
        tables["train"].dropped += Counter({"beyond data.train_limit": beyond})  # += keeps no zeros
    splits = {}
    for name, table in tables.items():
        rows.require_columns(table, task.columns, where)
        if name == "train":
            usable = [row for row in table.rows if task.problem(row, target=False) is None]
            task.fit(usable or table.rows, table.places[0].rpartition(":")[0])
        elif note := task.adapt(table.rows):
            notes.append(f"{name}: {note}")
        splits[name] = rows.clean(table, task, data.bad_rows)
    if isinstance(data.validation, float):
        strata, groups = ([one(row) for row in splits["train"].table.rows] for one in (task.stratum, task.group))
        splits["train"], splits["validation"] = rows.split_off(splits["train"], data.validation, strata, recipe.seed, groups)
    for name, split in splits.items():
        if split.dropped:
            total = f"{split.read:,} rows read = {len(split):,} used + {sum(split.dropped.values()):,} dropped"
            notes.append(f"{name}: {total} ({rows.reasons(split)})")
    return {name: splits[name] for name in ("train", "validation", "test") if name in splits}


def summed(swapped: list[swap.Swapped]) -> list[str]:
    """Equal swaps as one line: 6 x Linear[384, 384] -> Mine[384, 384], kept weight, fresh gate."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for s in swapped:
        key = (s.old, s.new, ", ".join(s.kept) or "nothing", ", ".join(s.fresh) or "nothing", ", ".join(s.dropped) or "nothing")
        groups.setdefault(key, []).append(s.path)
    return [f"{len(p)} x {k[0]} -> {k[1]} ({p[0]}{' ...' if len(p) > 1 else ''}); kept {k[2]}; fresh {k[3]}; dropped {k[4]}"
            for k, p in groups.items()]  # fmt: skip
