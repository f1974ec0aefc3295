"""Going on: what must be as it was, what may differ and is said, and where the run stood.

Refused: other data, another base model, other layer code; the run would no longer be the one that was begun. Said:
other versions, threads or another machine; it is still this run, but its bits may differ from those of a run that was
never stopped. Everything else of a run is in its newest checkpoint, or is a pure function of the step.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine import checkpoint, disk, distributed, runs
from engine.errors import InputError
from engine.progress import Progress, Settings, due
from engine.watch import read_log

SAID = ("python", "platform", "cpu", "device", "threads")


def same_sources(folder: Path, now: dict[str, Any]) -> None:
    """Data, base model and layer code must have the sha256 noted at the start; InputError lists what differs."""
    then = _environment(folder)
    pairs = {
        **{f"data {name}": (then["data_sha256"].get(name), sha) for name, sha in now["data_sha256"].items()},
        **{f"data {name}": (sha, None) for name, sha in then["data_sha256"].items() if name not in now["data_sha256"]},
        "the base model": (then["model"]["sha256"], now["model"]["sha256"]),
        **{f"layer code {name}": (then["layers"].get(name), sha) for name, sha in now["layers"].items()},
    }
    changed = [f"{what}: sha256 {_short(a)} -> {_short(b)}" for what, (a, b) in pairs.items() if a != b]
    if changed:
        raise InputError(
            f"{folder}: --resume needs the files that this run was begun with; changed are\n  " + "\n  ".join(changed)
            + "\nPut them back, or start a new run in another folder."
        )  # fmt: skip


def drift(folder: Path, now: dict[str, Any]) -> list[str]:
    """What makes equal bits unlikely: versions, threads, machine, each as "name: then -> now"."""
    then = _environment(folder)
    pairs = {name: (then["versions"].get(name), version) for name, version in now["versions"].items()}
    pairs |= {name: (then[name], now[name]) for name in SAID} | {"processes": (then.get("ranks", 1), now["ranks"])}
    return [f"{name}: {a} -> {b}" for name, (a, b) in pairs.items() if a != b]


def go_on(folder: Path, model: Any, optimizer: Any, scaler: Any, say: Callable[[str], None]) -> tuple[Progress, int]:
    """Put the newest whole checkpoint back; returns the progress and the length of the log that belongs to it.

    A run that was killed before its first save begins at step 0. InputError if it had saved and nothing whole is left.
    """
    path = distributed.from_first(_newest(folder) if distributed.rank() == 0 else None)
    if path is None:
        saved = (record.get("checkpoint", "") for record in read_log(folder / "log.jsonl"))
        if any(name.startswith("step-") for name in saved) or (folder / "quarantine").exists():
            raise InputError(f"{folder}: there is no whole checkpoint to resume from; start anew in another folder")
        say("resume  nothing was saved yet: from step 0")
        return Progress(), 0
    checkpoint.load_weights(path, model)
    checkpoint.load_optimizer(path, optimizer, scaler)
    state = checkpoint.read_state(path)
    say(f"resume  {path} (step {state['progress']['step']})")
    return Progress(**state["progress"]), state["log_bytes"]


def _newest(folder: Path) -> Path | None:
    """The newest whole checkpoint; what a crash left half-made is removed, damaged ones are moved to quarantine/."""
    with disk.refusing(folder, 0):
        for place in (folder, folder / "checkpoints"):
            disk.tidy(place)
    return checkpoint.newest(folder / "checkpoints", quarantine=True)


def was_due(progress: Progress, settings: Settings) -> bool:
    """Whether a run that was never stopped would have saved where this one goes on."""
    if progress.step == 0 or progress.unjudged:
        return False  # nothing was saved, or it is saved anew once it is judged
    end_of_epoch, last = progress.window == 0, progress.stopped == "finished"
    return progress.stopped == "early" or due(settings.save_every, progress.step, end_of_epoch, last)


def reopen(progress: Progress, settings: Settings) -> None:
    """Take back the stop if it no longer holds: a signal's, that of fewer epochs, that of less patience."""
    patient = settings.patience is None or progress.stale < settings.patience
    more = progress.step < settings.steps and (progress.stopped != "early" or patient)
    if progress.stopped == "interrupted" or more:
        progress.stopped = ""


def note(folder: Path, step: int, different: list[str], say: Callable[[str], None]) -> None:
    """Keep in environment.json that the run went on, where, and what was different."""
    if different:
        say(f"note    equal bits are not promised, for these differ: {'; '.join(different)}")
    environment = _environment(folder)
    went_on = {"step": step, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "different": different}
    environment["resumed"] = [*environment.get("resumed", []), went_on]
    runs.write_json(folder / "environment.json", environment)


def _environment(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "environment.json").read_text("utf-8")))


def _short(sha: str | None) -> str:
    return f"{sha[:16]}..." if sha else "none"
