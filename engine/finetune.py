"""One run, from a recipe to a report: a straight line in the order of the data's way.

    recipe -> data -> task -> model -> swap -> tune -> freeze -> optimizer -> resume -> train -> best -> test -> report

The order is law: layers are swapped before anything is frozen, and frozen before anything reaches the optimizer.
`prepare` goes as far as that and writes nothing but the token cache, so whatever is wrong with recipe, data or model
is found before a run folder exists. `finetune` trains, and leaves the run folder.
"""

import contextlib
import functools
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine import checkpoint, evaluate, find, freeze, metrics, models, optim, runs, seeds, swap
from engine.data import encode, read, rows, windows
from engine.errors import InputError
from engine.interrupt import Interrupt
from engine.recipe import Recipe
from engine.train import Progress, Settings, train
from engine.watch import Bar, Log

EVALUATION_TOKENS = 4  # evaluation keeps no activations, so its batches may be this many times larger

tell = functools.partial(print, flush=True)


@dataclass
class Prepared:
    """Everything a run needs, before it begins."""

    recipe: Recipe
    task: Any
    splits: dict[str, rows.Split]
    facts: dict[str, Any]
    encoded: dict[str, encode.Encoded]
    loaded: models.Loaded
    head: list[str]
    swapped: list[swap.Swapped]
    coverage: str
    windows: windows.Windows
    steps: int
    device: torch.device
    precision: str
    metrics: list[str]
    notes: list[str]


@dataclass
class Result:
    """A finished or interrupted run."""

    folder: Path
    progress: Progress
    metrics: dict[str, Any]
    code: int = 0


def prepare(recipe: Recipe, say: Callable[[str], None] = tell, interrupted: Callable[[], bool] = lambda: False) -> Prepared:
    """Read, check, encode, load, swap, freeze. Raises InputError; writes nothing but the token cache."""
    folders = (recipe.path.parent,)
    notes: list[str] = []

    # data and task
    task_class = find.module("tasks", recipe.task, recipe.where("task")).Task
    try:
        task = task_class(recipe.data.columns, recipe.data.labels)
    except InputError as error:
        raise InputError(f"{recipe.where('data.columns')}: {error}") from error
    splits = _splits(recipe, task, folders, notes)
    facts = rows.facts(splits, task)
    for name, fact in facts.items():
        leaks = {key.removeprefix("also_in_"): n for key, n in fact.items() if key.startswith("also_in_") and n}
        notes += [f"{n} texts of {name} also stand in {other}: the score on {name} is too good by that" for other, n in leaks.items()]
    names = recipe.evaluate.metrics or task.default_metrics
    metrics.check(names, recipe.where("evaluate.metrics"), len(task.labels))
    if recipe.early_stopping and recipe.early_stopping.monitor not in (*names, "loss"):
        raise recipe.error("early_stopping.monitor", f"'{recipe.early_stopping.monitor}' is not among the metrics {', '.join(names)}, loss")

    # model, then the layers swapped in, then what trains
    device = models.device_of(recipe.train.device, recipe.where("train.device"))
    where = f"{recipe.where('model.name')}: model.name"
    source = models.find(recipe.model.name, recipe.model.revision, recipe.model.offline, where, folders)
    seeds.seed_all(recipe.seed)  # the head's fresh weights belong to the seed
    loaded = models.load(source, task.auto_class, task.model_options(), where, recipe.data.max_length)
    head = models.head_of(loaded.model, loaded.fresh)
    swapped = swap.apply_rules(loaded.model, recipe.swap, recipe.where, folders)
    try:
        line = find.module("tune", recipe.tune.method, recipe.where("tune.method")).apply(loaded.model, recipe.tune, head)
    except InputError as error:
        raise InputError(f"{recipe.where('tune')}: {error}") from error
    stuck = freeze.fresh_and_frozen(loaded.model, loaded.fresh, swapped)
    if stuck:
        raise recipe.error("tune", f"{len(stuck)} fresh parameters are frozen and would stay random, such as {stuck[0]}; let them train")
    trains, total = models.count(loaded.model)
    coverage = f"{line}; {trains:,} of {total:,} parameters train ({trains / total:.2%})"
    loaded.model.to(device)

    # tokens and windows
    cache = Path(recipe.data.cache)
    encoded = {
        name: encode.encode(task, split.table.rows, loaded.tokenizer, recipe.data.max_length, cache, interrupted)
        for name, split in splits.items()
    }
    for name, made in encoded.items():
        cut = int(made.scalars["truncated"].sum())
        facts[name]["tokens"] = {
            "mean": round(float(made.lengths.mean()), 1), "longest": int(made.lengths.max()), "truncated": cut,
        }  # fmt: skip
        if cut > 0.05 * len(made):
            notes.append(f"{cut} of {len(made)} texts of {name} were cut at data.max_length={recipe.data.max_length}")
    budget = recipe.train.micro_batch_tokens
    if budget == "auto":
        budget = 1024 if device.type == "cpu" else 16384  # a CPU's caches like small batches, a GPU large ones
    made = windows.Windows(encoded["train"], task.items, batch_size=recipe.train.batch_size, tokens=int(budget), seed=recipe.seed)
    steps = min(made.per_epoch * recipe.train.epochs, recipe.train.max_steps or math.inf)
    kind = optim.precision(recipe.train.precision, device)

    say(f"data    {'  '.join(f'{name} {len(split):,}' for name, split in splits.items())} examples; labels: {', '.join(task.labels)}")
    say(f"model   {recipe.model.name} ({source.origin}), {total / 1e6:.1f} M parameters; fresh: {', '.join(head)}")
    for one in _summed(swapped):
        say(f"swap    {one}")
    say(f"tune    {coverage}")
    say(f"train   {recipe.train.epochs} epochs x {made.per_epoch} windows of {recipe.train.batch_size} = {steps} steps, {kind} on {device}")
    for note in notes:
        say(f"note    {note}")
    return Prepared(recipe, task, splits, facts, encoded, loaded, head, swapped, coverage, made, int(steps), device, kind, names, notes)


def _splits(recipe: Recipe, task: Any, folders: tuple[Path, ...], notes: list[str]) -> dict[str, rows.Split]:
    """train, validation, test: read, columns checked, bad rows named or dropped, train's labels learnt."""
    data = recipe.data
    options: dict[str, Any] = {"folders": folders, "format": data.format, "names": data.names, "quoting": data.quoting}
    where = f"{recipe.where('data.columns')}: data.columns"
    sources = {"train": data.train, "validation": data.validation, "test": data.test}
    tables = {
        name: read.read(files, f"{recipe.where(f'data.{name}')}: data.{name}", **options)
        for name, files in sources.items() if isinstance(files, list)
    }  # fmt: skip
    if data.train_limit:
        tables["train"] = tables["train"].take(list(range(min(data.train_limit, len(tables["train"])))))
    splits = {}
    for name, table in tables.items():
        rows.require_columns(table, task.columns, where)
        if name == "train":
            task.fit(table.rows, table.places[0].rpartition(":")[0])
        elif note := task.adapt(table.rows):
            notes.append(f"{name}: {note}")
        splits[name] = rows.clean(table, task, data.bad_rows)
    if isinstance(data.validation, float):
        strata = [task.stratum(row) for row in splits["train"].table.rows]
        splits["train"], splits["validation"] = rows.split_off(splits["train"], data.validation, strata, recipe.seed)
    for name, split in splits.items():
        if split.dropped:
            reasons = ", ".join(f"{n} {reason}" for reason, n in split.dropped.items())
            notes.append(f"{name}: {split.read:,} rows read = {len(split):,} used + {sum(split.dropped.values()):,} dropped ({reasons})")
    return {name: splits[name] for name in ("train", "validation", "test") if name in splits}


def _summed(swapped: list[swap.Swapped]) -> list[str]:
    """Equal swaps as one line: 6 x Linear[384, 384] -> Mine[384, 384], kept weight, fresh gate."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for s in swapped:
        key = (s.old, s.new, ", ".join(s.kept) or "nothing", ", ".join(s.fresh) or "nothing", ", ".join(s.dropped) or "nothing")
        groups.setdefault(key, []).append(s.path)
    return [f"{len(p)} x {k[0]} -> {k[1]} ({p[0]}{' ...' if len(p) > 1 else ''}); kept {k[2]}; fresh {k[3]}; dropped {k[4]}"
            for k, p in groups.items()]  # fmt: skip


def finetune(recipe: Recipe, out: str | None = None, *, resume: bool = False, say: Callable[[str], None] = tell,
             interrupted: Interrupt | None = None) -> Result:
    """Train, keep the best, score, report. Returns the run folder and its metrics."""
    interrupt = interrupted or Interrupt()
    began = time.perf_counter()
    folder = _resumed_folder(recipe, out) if resume else None
    if out and not resume:
        runs.check_free(out)
    ready = prepare(recipe, say, interrupt)
    model, task = ready.loaded.model, ready.task

    # optimizer and progress
    optimizer = optim.adamw(freeze.groups(model, recipe.train.learning_rate, recipe.train.weight_decay), recipe.train.betas, recipe.train.eps)
    scaler = torch.amp.GradScaler(ready.device.type, enabled=ready.precision == "float16")
    progress = Progress()
    if folder is None:
        folder = runs.create(recipe, out)
        about = {"name": recipe.model.name, "revision": recipe.model.revision, "origin": ready.loaded.source.origin, "sha256": ready.loaded.sha256}
        sources = {name: digest for split in ready.splits.values() for name, digest in split.table.sources.items()}
        runs.write_start(folder, recipe, runs.environment(str(ready.device), sources, about, recipe.seed))
        log = Log(folder / "log.jsonl")
        log({"event": "data", "splits": ready.facts})
        log({"event": "model", **about, "coverage": ready.coverage, "head": ready.head, "swap": _summed(ready.swapped)})
        log({"event": "plan", "precision": ready.precision, "device": str(ready.device),
             **windows.describe_plan(ready.windows, recipe.train.epochs, recipe.train.max_steps)})
        for note in ready.notes:
            log({"event": "note", "note": note})
    else:
        progress = _go_on(folder, model, optimizer, scaler, say)
        log = Log(folder / "log.jsonl", keep_until=progress.step)
        log({"event": "resumed", "step": progress.step})
    say(f"run     {folder}")

    # train
    checkpoints = folder / "checkpoints"
    autocast = optim.autocast(ready.precision, ready.device)
    how = {"tokens": ready.windows.tokens * EVALUATION_TOKENS, "device": ready.device, "autocast": autocast}

    def score(name: str) -> evaluate.Scored:
        made = evaluate.outputs(model, task, ready.encoded[name], **how)
        return evaluate.score(task, made, ready.encoded[name].scalars["labels"], ready.metrics)

    def save(kind: str) -> None:
        name = f"{kind}-{progress.step:08d}"
        if kind == "best":
            checkpoint.write(checkpoints, name, model, progress)
        else:
            checkpoint.write(checkpoints, name, model, progress, optimizer, scaler)
            checkpoint.prune(checkpoints, recipe.checkpoint.keep)
        log({"event": "saved", "step": progress.step, "checkpoint": name})

    bar = Bar(ready.steps, progress.step, recipe.train.epochs, ready.windows.per_epoch)
    stop = recipe.early_stopping
    settings = Settings(
        steps=ready.steps, seed=recipe.seed, clip=recipe.train.clip, max_skipped=recipe.train.max_skipped,
        evaluate_every=recipe.evaluate.every if "validation" in ready.encoded else None, save_every=recipe.checkpoint.every,
        monitor=stop.monitor if stop else None, lower_is_better=bool(stop and stop.monitor in metrics.LOWER_IS_BETTER),
        patience=stop.patience if stop else None, min_delta=stop.min_delta if stop else 0.0,
    )  # fmt: skip

    def write(record: dict[str, Any]) -> None:
        log(record)
        bar(record)

    with contextlib.closing(bar):
        train(
            model, task, ready.windows, optimizer, scaler,
            optim.schedule(recipe.train.schedule, recipe.train.warmup, ready.steps), settings, progress,
            device=ready.device, autocast=autocast, evaluate=lambda: score("validation").scores, save=save, write=write,
            interrupted=interrupt,
        )  # fmt: skip
    if progress.stopped == "interrupted":
        say(f"stopped at step {progress.step} of {ready.steps}; go on with: --out {folder} --resume")
        return Result(folder, progress, {}, interrupt.code)

    # best weights, final scores, what is left behind
    best_step = progress.step
    if stop and progress.best is not None:
        best_step = progress.best_step
        checkpoint.load_weights(checkpoints / f"best-{best_step:08d}", model)
    results: dict[str, Any] = {"train": {"loss": progress.loss_sum / max(1, progress.items)}}
    reports, misses = {}, {}
    for name in ("validation", "test"):
        if name in ready.encoded:
            scored = score(name)
            labels = ready.encoded[name].scalars["labels"]
            reports[name] = evaluate.report(task, scored, labels, ready.metrics, recipe.evaluate.bootstrap)
            results[name] = reports[name]["scores"]
            misses[name] = write_predictions(folder, name, ready.splits[name], task, scored, labels)
    results["intervals"] = {name: r["intervals"] for name, r in reports.items()}
    results["detail"] = {name: r["detail"] for name, r in reports.items()}
    results |= {"best_step": best_step, "steps": progress.step, "stopped": progress.stopped, "skipped": progress.skipped}
    runs.write_json(folder / "metrics.json", results)
    _save_model(folder, ready, results)
    log({"event": "finished", "step": progress.step, "best_step": best_step, "stopped": progress.stopped,
         "seconds": round(time.perf_counter() - began, 1)})  # fmt: skip

    from engine import report

    report.write(folder)
    for line in summary(results, ready.metrics):
        say(line)
    say(f"report  {folder / 'report.html'}")
    return Result(folder, progress, results)


def summary(results: dict[str, Any], names: list[str]) -> list[str]:
    """The headline scores with their intervals, a line a split."""
    lines = []
    for split in ("validation", "test"):
        if split in results:
            parts = []
            for name in names:
                low, high = results["intervals"].get(split, {}).get(name, (math.nan, math.nan))
                span = "" if math.isnan(low) else f" [{low:.3f}, {high:.3f}]"
                parts.append(f"{name} {results[split][name]:.4f}{span}")
            lines.append(f"{split:<7} {'   '.join(parts)}   loss {results[split]['loss']:.4f}")
    return lines


def write_predictions(folder: Path, name: str, split: rows.Split, task: Any, scored: evaluate.Scored, labels: np.ndarray) -> int:
    """predictions/SPLIT.jsonl: one object per row in the file's order; returns how many are wrong."""
    path = folder / "predictions" / f"{name}.jsonl"
    path.parent.mkdir(exist_ok=True)
    wrong = 0
    with path.open("w", encoding="utf-8") as file:
        for i, (row, made) in enumerate(zip(split.table.rows, task.predictions(scored.outputs), strict=True)):
            gold = task.labels[int(labels[i])]
            wrong += gold != made["prediction"]
            line = {**row, "label": gold, **made, "loss": float(scored.losses[i])}
            file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
    return wrong


def _resumed_folder(recipe: Recipe, out: str | None) -> Path:
    """The folder to go on in; another recipe than the one it was begun with is an error that lists what differs."""
    from engine.recipe import load

    folder = runs.locate(out or str(Path("runs") / recipe.name))
    then, now = load(str(folder / "recipe.yaml")).resolved(), recipe.resolved()
    free = {("train", "epochs"), ("train", "max_steps"), ("early_stopping", "patience"), ("checkpoint", "keep"), ("data", "cache")}
    changes = []
    for group, values in now.items():
        if isinstance(values, dict) and isinstance(then[group], dict):
            changes += [f"{group}.{k}: {then[group].get(k)} -> {v}" for k, v in values.items() if then[group].get(k) != v and (group, k) not in free]
        elif values != then[group]:
            changes.append(f"{group}: {then[group]} -> {values}")
    if changes:
        raise InputError(f"{folder}: --resume needs the recipe that this run was begun with; it differs in\n  " + "\n  ".join(changes))
    return folder


def _go_on(folder: Path, model: Any, optimizer: Any, scaler: Any, say: Callable[[str], None]) -> Progress:
    path = checkpoint.newest(folder / "checkpoints", quarantine=True)
    if path is None:
        raise InputError(f"{folder}: there is no whole checkpoint to resume from; start anew in another folder")
    checkpoint.load_weights(path, model)
    checkpoint.load_optimizer(path, optimizer, scaler)
    progress = Progress(**checkpoint.read_state(path)["progress"])
    if progress.stopped == "interrupted":
        progress.stopped = ""
    say(f"resume  {path} (step {progress.step})")
    return progress


def _save_model(folder: Path, ready: Prepared, results: dict[str, Any]) -> None:
    """adapter/ where the method has one, then model/: plain weights that AutoModel*.from_pretrained loads."""
    from engine import card

    model, recipe = ready.loaded.model, ready.recipe
    method = find.module("tune", recipe.tune.method, "tune.method")
    if hasattr(method, "save"):
        base = {"name": recipe.model.name, "revision": recipe.model.revision, "task_type": ready.task.peft_type}
        method.save(model, folder / "adapter", recipe.tune, ready.head, base)
    if hasattr(method, "merge"):
        method.merge(model)
    model.config.name_or_path = recipe.model.name
    model.save_pretrained(folder / "model")
    ready.loaded.tokenizer.save_pretrained(folder / "model")
    (folder / "model" / "README.md").write_text(card.render(recipe, results, ready.facts, ready.metrics), "utf-8")
