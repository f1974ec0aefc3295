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

import torch

from engine import adapters, checkpoint, disk, distributed, evaluate, faults, freeze, optim, resume, runs
from engine.claim import Claim, own
from engine.data import windows
from engine.errors import RunError
from engine.fast import ahead, kernels, working
from engine.interrupt import Interrupt
from engine.prepare import Prepared, cache_frozen, prepare, summed, tell
from engine.progress import Progress, Settings
from engine.recipe import Recipe
from engine.train import train
from engine.watch import Bar, Log, Quiet, read_log

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
    claim: Claim | None = None,
    say: Callable[[str], None] = tell,
    interrupted: Interrupt | None = None,
) -> Result:
    """Train, keep the best, score, report. Returns the run folder and its metrics.

    `claim` is the owned run folder, if the caller has claimed it already. A finished run is only told again. Raises
    InputError, or RunError: the folder is another process's, the disk refuses, the numbers are not finite.
    """
    with contextlib.nullcontext(claim) if claim else own(recipe, out, resume) as owned:
        try:
            return told_again(owned.folder, say) if owned.state == "finished" else _run(owned, say, interrupted or Interrupt())
        except (disk.DiskError, faults.FaultError, distributed.RankLostError) as error:
            good = checkpoint.last_good(owned.folder / "checkpoints") if owned.folder else "nothing was begun"
            raise RunError(f"{error}; {good}") from error


def _run(owned: Claim, say: Callable[[str], None], interrupt: Interrupt) -> Result:
    """The straight line."""
    recipe, began, writes = owned.recipe, time.perf_counter(), distributed.rank() == 0
    going_on = owned.folder is not None and any((owned.folder / "checkpoints").glob("step-*"))
    ready = prepare(recipe, say, interrupt, resumed=going_on, begun=owned.folder if owned.state == "begun" else None)
    model, task = ready.loaded.model, ready.task

    # the working model, optimizer and progress
    t = recipe.train
    lean = working.Working(model, t, ready.encoded, ready.loaded.tokenizer, ready.windows.tokens)
    lean.prove(model, ready.probe(), f"{recipe.where('train.weights')}: train.weights={t.weights}")
    optimizer = optim.adamw(freeze.groups(model, t.learning_rate, t.weight_decay, ready.rates), t.learning_rate, t.betas, t.eps)
    lean.follow(optimizer)
    scaler = torch.amp.GradScaler(ready.device.type, enabled=ready.precision == "float16")
    m, source = recipe.model, ready.loaded.source
    about = {"name": m.label, "revision": m.revision, "origin": source.origin, "sha256": ready.loaded.sha256}
    sources = {name: digest for split in ready.splits.values() for name, digest in split.table.sources.items()}
    environment = runs.environment(recipe, str(ready.device), sources, about)
    folder, progress, log_bytes = owned.begin(), Progress(), 0
    if owned.state == "new" and writes:
        runs.write_start(folder, recipe, environment, ready.loaded.trained)
    elif owned.state != "new":
        resume.same_sources(folder, environment)
        progress, log_bytes = resume.go_on(folder, model, optimizer, scaler, say)
        different = resume.drift(folder, environment)
    if owned.state != "new" and writes:
        checkpoint.prune(folder / "checkpoints", recipe.checkpoint.keep)  # it may have been killed after a save, before this
        resume.note(folder, progress.step, different, say)
    try:
        frozen, cached = cache_frozen(ready, environment["layers"], interrupt)
    except KeyboardInterrupt:
        say(f"stopped before training began; go on with: --out {folder} --resume")
        return Result(folder, progress, {}, int(distributed.largest(interrupt.code)) or 130)
    log = Log(folder / "log.jsonl", keep=log_bytes) if writes else Quiet()
    if log_bytes == 0:
        log({"event": "data", "splits": ready.facts})
        log({"event": "model", **about, "coverage": ready.coverage, "head": ready.head, "swap": summed(ready.swapped)})
        plan = windows.describe_plan(ready.windows, recipe.train.epochs, recipe.train.max_steps)
        how_fast = {
            "metrics": ready.metrics,
            "precision": ready.precision,
            "packing": ready.packed,
            "frozen_cache": cached,
            "device": str(ready.device),
        } | lean.said
        log({"event": "plan", **how_fast, **plan})
        for note in ready.notes:
            log({"event": "note", "note": note})
    if cached:
        say(f"frozen  {cached.removeprefix('frozen cache: ')}")
    for piece in lean.said.values():
        say(f"fast    {piece}")
    say(f"run     {folder}")

    # train
    checkpoints, stop = folder / "checkpoints", recipe.early_stopping
    aim = stop.monitor if stop else ready.metrics[0]
    autocast = optim.autocast(ready.precision, ready.device)
    how: dict[str, Any] = {
        "tokens": ready.windows.tokens * EVALUATION_TOKENS, "device": ready.device, "autocast": autocast, "interrupted": interrupt,
    }  # fmt: skip

    def shrunk(tokens: int) -> None:
        how["tokens"] = tokens  # of evaluation alone; training's budget is its own
        write({"event": "memory", "step": progress.step, "during": "evaluation", "tokens": tokens})

    how["shrunk"] = shrunk

    def score(name: str) -> evaluate.Scored:
        split = ready.encoded[name], ready.splits[name].table.rows
        made = evaluate.outputs(model, task, split[0], places=ready.places(name), **how)
        return evaluate.score(task, made, *split, ready.metrics, aim if name == "validation" else None)

    def validate() -> dict[str, float] | None:
        try:
            return score("validation").scores
        except KeyboardInterrupt:  # evaluation saw the flag
            return None

    def agreed() -> bool:
        """Whether a signal has come, to whichever process."""
        return distributed.largest(int(interrupt())) > 0

    def save(kind: str) -> None:
        name = f"{kind}-{progress.step:08d}"
        if not faults.finite(p for p in model.parameters() if freeze.ever_trains(p)):  # buffers may hold -inf: masks
            raise faults.FaultError(f"step {progress.step}: weights are not finite after the update, and were not saved. Cure: a lower"
                               " train.learning_rate, or a larger train.eps.")  # fmt: skip
        if not writes:
            distributed.barrier()
            return
        if kind == "best":
            checkpoint.write(checkpoints, name, model, progress)
        else:
            checkpoint.write(checkpoints, name, model, progress, optimizer, scaler, log.sync())
            checkpoint.prune(checkpoints, recipe.checkpoint.keep)
        log(saved(name, progress))
        distributed.barrier()  # what another process reads next is whole

    bar = Bar(ready.steps, progress.step, recipe.train.epochs, ready.windows.per_epoch) if writes else Quiet()
    settings = Settings(
        steps=ready.steps, seed=recipe.seed, clip=recipe.train.clip, max_skipped=recipe.train.max_skipped,
        max_skipped_in_run=recipe.train.max_skipped_in_run,
        evaluate_every=recipe.evaluate.every if "validation" in ready.encoded else None, save_every=recipe.checkpoint.every,
        monitor=stop.monitor if stop else None, lower_is_better=bool(stop and task.lower_is_better(stop.monitor)),
        patience=stop.patience if stop else None, min_delta=stop.min_delta if stop else 0.0,
    )  # fmt: skip

    if resume.was_due(progress, settings):  # the line after the part of the log that was kept
        log(saved(f"step-{progress.step:08d}", progress))
    resume.reopen(progress, settings)

    def write(record: dict[str, Any]) -> None:
        log(record)
        bar(record)

    with kernels.fast_kernels(ready.device, t.kernels) as products:
        if products and log_bytes == 0:
            log({"event": "kernels", "found": products})
        with contextlib.closing(bar):
            train(
                model, task, ahead.Ahead(ready.windows, ready.device) if t.ahead else ready.windows, optimizer, scaler,
                optim.schedule(recipe.train.schedule, recipe.train.warmup, ready.steps), lambda step: freeze.thaw(model, step),
                settings, progress, device=ready.device, autocast=autocast, evaluate=validate, save=save, write=write,
                interrupted=agreed,
            )  # fmt: skip
        if progress.stopped == "interrupted":
            say(f"stopped at step {progress.step} of {ready.steps}; go on with: --out {folder} --resume")
            return Result(folder, progress, {}, int(distributed.largest(interrupt.code)) or 130)

        # best weights, final scores: by the same kernels, of the whole model
        lean.rest(optimizer)
        if frozen:
            frozen.remove()
        best_step = progress.step
        if stop and progress.best is not None:
            best_step = progress.best_step
            if best_step != progress.step:
                checkpoint.load_weights(checkpoints / f"best-{best_step:08d}", model)
        try:
            final = {name: score(name) for name in ("validation", "test") if name in ready.encoded}
        except KeyboardInterrupt:
            say(f"stopped after training, before the final scores; go on with: --out {folder} --resume")
            return Result(folder, progress, {}, int(distributed.largest(interrupt.code)) or 130)

    if not writes:
        return Result(folder, progress, {name: scored.scores for name, scored in final.items()})

    # what is left behind
    results: dict[str, Any] = {"train": {"loss": progress.loss_sum / max(1, progress.items)}}
    reports = {}
    for name, scored in final.items():
        reports[name] = evaluate.report(task, scored, ready.metrics, recipe.evaluate.bootstrap)
        results[name] = reports[name]["scores"]
        write_predictions(folder, name, evaluate.lines(task, scored, ready.encoded[name], ready.splits[name].table.rows))
    results["intervals"] = {name: r["intervals"] for name, r in reports.items()}
    results["detail"] = {name: r["detail"] for name, r in reports.items()}
    lean.restore()
    task.finish(model)
    if task.state():
        results["task"] = task.state()
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


def write_predictions(folder: Path, name: str, lines: list[dict[str, Any]]) -> None:
    """predictions/SPLIT.jsonl: one object per row in the file's order."""
    text = "".join(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines)
    with disk.refusing(folder, 0):
        disk.make(folder / "predictions")
    disk.replace(folder / "predictions" / f"{name}.jsonl", text.encode())


def saved(name: str, progress: Progress) -> dict[str, Any]:
    """The log's line about a checkpoint that is safe on the disk."""
    return {"event": "saved", "step": progress.step, "checkpoint": name}


def told_again(folder: Path | None, say: Callable[[str], None]) -> Result:
    """The result of a run that is finished."""
    from engine import report

    assert folder is not None, "a run without a folder cannot be finished"
    results = json.loads((folder / "metrics.json").read_text("utf-8"))
    page = folder / "report.html"
    outdated = not page.exists() or page.stat().st_mtime_ns < (folder / "metrics.json").stat().st_mtime_ns
    if outdated and distributed.rank() == 0:
        report.write(folder)  # the run was killed before its last line
    plan = next(record for record in read_log(folder / "log.jsonl") if record["event"] == "plan")
    say(f"run     {folder}: finished already, {results['steps']} steps; name another folder for a new run")
    for line in summary(results, plan["metrics"]):
        say(line)
    say(f"report  {page}")
    return Result(folder, Progress(step=results["steps"], best_step=results["best_step"], stopped=results["stopped"]), results)


def _save_model(folder: Path, ready: Prepared, results: dict[str, Any], log: Callable[[dict[str, Any]], None]) -> None:
    """adapter/ where the method has one, then model/: plain weights that AutoModel*.from_pretrained loads."""
    from engine import card

    model, recipe, method = ready.loaded.model, ready.recipe, ready.method
    needed = sum(tensor.nbytes for tensor in model.state_dict().values())
    heads = ready.task.heads(model)
    for _, task, one in heads:
        if task.state():
            one.config.task_state = task.state()
        one.config.name_or_path = recipe.model.name or ""
    if ready.own:
        base = {
            "name": recipe.model.name or f"{recipe.model.label} from scratch",
            "revision": recipe.model.revision,
            "task_type": ready.task.peft_type,
        }
        with disk.refusing(folder / "adapter", needed), disk.whole(folder / "adapter") as hidden:
            adapters.save(model, hidden, method, recipe.tune, ready.head, ready.own, base)
            disk.sync_tree(hidden)
    if hasattr(method, "merge"):
        apart = adapters.merge(model, method, ready.probe())
        log({"event": "merged", "apart": apart})
    keeps = bool(recipe.swap) or getattr(method, "STAYS", False)
    needed *= len(heads)  # each has a copy of the body
    with disk.refusing(folder / "model", needed), disk.whole(folder / "model") as hidden:
        disk.require(folder, needed)
        model.save_pretrained(hidden)
        for name, task, _ in heads:
            ready.loaded.tokenizer.save_pretrained(hidden / name)
            (hidden / name / "README.md").write_text(card.render(recipe, results, ready.facts, ready.metrics, keeps, task, name), "utf-8")
        disk.sync_tree(hidden)
