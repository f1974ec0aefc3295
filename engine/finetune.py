"""One run: prepare, train, take the best weights, score them, leave the run folder.

    prepare (recipe ... windows) -> optimizer -> resume -> train -> best -> test -> model -> report

A straight line; whatever differs between tasks and methods has become a value by the time it arrives here.
"""

import contextlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine import adapters, checkpoint, evaluate, freeze, metrics, optim, runs
from engine.data import rows, windows
from engine.errors import InputError
from engine.fast import kernels
from engine.interrupt import Interrupt
from engine.prepare import Prepared, prepare, summed, tell
from engine.recipe import Recipe
from engine.train import Progress, Settings, train
from engine.watch import Bar, Log

EVALUATION_TOKENS = 4  # evaluation keeps no activations, so its batches may be this many times larger


@dataclass
class Result:
    """A finished or interrupted run."""

    folder: Path
    progress: Progress
    metrics: dict[str, Any]
    code: int = 0


def finetune(
    recipe: Recipe,
    out: str | None = None,
    *,
    resume: bool = False,
    say: Callable[[str], None] = tell,
    interrupted: Interrupt | None = None,
) -> Result:
    """Train, keep the best, score, report. Returns the run folder and its metrics."""
    interrupt = interrupted or Interrupt()
    began = time.perf_counter()
    recipe = adapters.started(recipe)
    folder = _resumed_folder(recipe, out) if resume else None
    if out and not resume:
        runs.check_free(out)
    ready = prepare(recipe, say, interrupt, resumed=resume)
    model, task = ready.loaded.model, ready.task

    # optimizer and progress
    t = recipe.train
    optimizer = optim.adamw(freeze.groups(model, t.learning_rate, t.weight_decay, ready.rates), t.learning_rate, t.betas, t.eps)
    scaler = torch.amp.GradScaler(ready.device.type, enabled=ready.precision == "float16")
    progress = Progress()
    if folder is None:
        folder = runs.create(recipe, out)
        m, source = recipe.model, ready.loaded.source
        about = {"name": m.name, "revision": m.revision, "origin": source.origin, "sha256": ready.loaded.sha256}
        sources = {name: digest for split in ready.splits.values() for name, digest in split.table.sources.items()}
        runs.write_start(folder, recipe, runs.environment(recipe.name, str(ready.device), sources, about, recipe.seed))
        log = Log(folder / "log.jsonl")
        log({"event": "data", "splits": ready.facts})
        log({"event": "model", **about, "coverage": ready.coverage, "head": ready.head, "swap": summed(ready.swapped)})
        plan = windows.describe_plan(ready.windows, recipe.train.epochs, recipe.train.max_steps)
        how_fast = {"metrics": ready.metrics, "precision": ready.precision, "packing": ready.packed, "device": str(ready.device)}
        log({"event": "plan", **how_fast, **plan})
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
    how: dict[str, Any] = {"tokens": ready.windows.tokens * EVALUATION_TOKENS, "device": ready.device, "autocast": autocast}

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

    with kernels.fast_float32(ready.device) as products:
        if products:
            log({"event": "kernels", "found": products})
        with contextlib.closing(bar):
            train(
                model, task, ready.windows, optimizer, scaler,
                optim.schedule(recipe.train.schedule, recipe.train.warmup, ready.steps), lambda step: freeze.thaw(model, step),
                settings, progress,
                device=ready.device, autocast=autocast, evaluate=lambda: score("validation").scores, save=save, write=write,
                interrupted=interrupt,
            )  # fmt: skip
        if progress.stopped == "interrupted":
            say(f"stopped at step {progress.step} of {ready.steps}; go on with: --out {folder} --resume")
            return Result(folder, progress, {}, interrupt.code)

        # best weights, final scores, by the same kernels
        best_step = progress.step
        if stop and progress.best is not None:
            best_step = progress.best_step
            checkpoint.load_weights(checkpoints / f"best-{best_step:08d}", model)
        final = {name: score(name) for name in ("validation", "test") if name in ready.encoded}

    # what is left behind
    results: dict[str, Any] = {"train": {"loss": progress.loss_sum / max(1, progress.items)}}
    reports = {}
    for name, scored in final.items():
        labels = ready.encoded[name].scalars["labels"]
        reports[name] = evaluate.report(task, scored, labels, ready.metrics, recipe.evaluate.bootstrap)
        results[name] = reports[name]["scores"]
        write_predictions(folder, name, ready.splits[name], task, scored, labels)
    results["intervals"] = {name: r["intervals"] for name, r in reports.items()}
    results["detail"] = {name: r["detail"] for name, r in reports.items()}
    results |= {"best_step": best_step, "steps": progress.step, "stopped": progress.stopped, "skipped": progress.skipped}
    runs.write_json(folder / "metrics.json", results)
    _save_model(folder, ready, results, log)
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


def write_predictions(folder: Path, name: str, split: rows.Split, task: Any, scored: evaluate.Scored, labels: np.ndarray) -> None:
    """predictions/SPLIT.jsonl: one object per row in the file's order."""
    path = folder / "predictions" / f"{name}.jsonl"
    path.parent.mkdir(exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for i, (row, made) in enumerate(zip(split.table.rows, task.predictions(scored.outputs), strict=True)):
            gold = task.labels[int(labels[i])]
            line = {**row, "label": gold, **made, "loss": float(scored.losses[i])}
            file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")


def _resumed_folder(recipe: Recipe, out: str | None) -> Path:
    """The folder to go on in; another recipe than the one it was begun with is an error that lists what differs."""
    from engine.recipe import load

    folder = runs.locate(out or str(Path("runs") / recipe.name))
    then, now = load(str(folder / "recipe.yaml")).resolved(), recipe.resolved()
    free = {
        ("train", "epochs"),
        ("train", "max_steps"),
        ("early_stopping", "patience"),
        ("checkpoint", "keep"),
        ("data", "cache"),
    }
    changes = []
    for group, values in now.items():
        if isinstance(values, dict) and isinstance(then[group], dict):
            changes += [
                f"{group}.{k}: {then[group].get(k)} -> {v}"
                for k, v in values.items()
                if then[group].get(k) != v and (group, k) not in free
            ]
        elif values != then[group]:
            changes.append(f"{group}: {then[group]} -> {values}")
    if changes:
        raise InputError(
            f"{folder}: --resume needs the recipe that this run was begun with; it differs in\n  " + "\n  ".join(changes)
        )
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


def _save_model(folder: Path, ready: Prepared, results: dict[str, Any], log: Log) -> None:
    """adapter/ where the method has one, then model/: plain weights that AutoModel*.from_pretrained loads."""
    from engine import card

    model, recipe, method = ready.loaded.model, ready.recipe, ready.method
    if ready.own:
        base = {"name": recipe.model.name, "revision": recipe.model.revision, "task_type": ready.task.peft_type}
        adapters.save(model, folder / "adapter", method, recipe.tune, ready.head, ready.own, base)
    if hasattr(method, "merge"):
        apart = adapters.merge(model, method, ready.probe())
        log({"event": "merged", "apart": apart})
    keeps = bool(recipe.swap) or getattr(method, "STAYS", False)
    model.config.name_or_path = recipe.model.name
    model.save_pretrained(folder / "model")
    ready.loaded.tokenizer.save_pretrained(folder / "model")
    (folder / "model" / "README.md").write_text(card.render(recipe, results, ready.facts, ready.metrics, keeps), "utf-8")
