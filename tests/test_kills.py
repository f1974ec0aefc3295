"""Killed, out of disk, signalled: whatever stops a run, going on ends with the same bits as never having been stopped.

Real processes, real signals. One server imports torch once and forks each run, so that a run takes a third of a second.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import BASE, make_bert, make_rows, write_jsonl

from engine import checkpoint, find

pytestmark = pytest.mark.xdist_group("kills")  # what the file starts once, it starts in one worker

SHORT = ["train.max_steps=5", "checkpoint.every=2", "evaluate.every=2", "checkpoint.keep=1"]


class Runs:
    """The fork server, a folder for its runs, and what they are compared with."""

    def __init__(self, folder: Path):
        make_bert(folder / "bert", layers=1)
        for name, count, seed in (("train", 32, 1), ("validation", 16, 2), ("test", 16, 3)):
            write_jsonl(folder / f"{name}.jsonl", make_rows(count, seed))
        settings = "  micro_batch_tokens: 60\ncheckpoint: {every: 2, keep: 2}\nearly_stopping: {monitor: loss}\n"
        text = BASE.format(model=folder / "bert").replace("batch_size: 16", "batch_size: 8")
        text = text.replace("evaluate: {bootstrap: 50}\n", settings + "evaluate: {bootstrap: 0, every: 3, metrics: [accuracy]}\n")
        (folder / "tiny.yaml").write_text(text)
        environment = {
            **os.environ,
            "PYTHONPATH": f"{find.PROJECT}:{Path(__file__).parent}",
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
        }
        self.folder = folder
        self.server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("forkserver.py")), str(folder), str(folder / "tiny.yaml")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        assert self.server.stdout
        assert self.server.stdout.readline() == "ready\n", (folder / "warm.txt").read_text()

    def close(self) -> None:
        assert self.server.stdin
        self.server.stdin.close()
        self.server.wait(10)

    def run(self, out: str, plan: Any = None, options: list[str] = [], resume: bool | None = None) -> dict[str, Any]:  # noqa: B006
        """One process; goes on with what is there unless told otherwise."""
        folder = self.folder / out
        resume = (folder / "recipe.yaml").exists() if resume is None else resume
        arguments = [
            "finetune",
            str(self.folder / "tiny.yaml"),
            *options,
            "--out",
            str(folder),
            *(["--resume"] if resume else []),
        ]
        assert self.server.stdin
        assert self.server.stdout
        self.server.stdin.write(json.dumps({"arguments": arguments, "out": str(folder), "plan": plan}) + "\n")
        self.server.stdin.flush()
        return dict(json.loads(self.server.stdout.readline()))

    def finished(self, out: str, options: list[str] = []) -> dict[str, Any]:  # noqa: B006
        """To the end; the run must get there by itself."""
        done = self.run(out, None, options)
        assert done["code"] == 0, done["said"]
        return done

    def result(self, out: str) -> dict[str, Any]:
        """All that must be equal, by name: every file of the run but those that tell times and processes."""
        folder, found = self.folder / out, {}
        for path in sorted(folder.rglob("*")):
            name = str(path.relative_to(folder))
            if path.is_dir() or name in (".lock", "environment.json") or path.name == "manifest.json":
                continue
            if path.name == "log.jsonl":
                found[name] = [without(json.loads(line), "time", "seconds") for line in path.read_text().split("\n")[:-1]]
            elif path.name == "state.json":
                found[name] = without(json.loads(path.read_text()), "log_bytes")
            else:
                found[name] = path.read_bytes()
        for path in (folder / "checkpoints").iterdir():
            assert checkpoint.verify(path) is None
        return found

    def equal(self, out: str, whole: str) -> None:
        mine, other = self.result(out), self.result(whole)
        assert [n for n in mine if mine[n] != other.get(n)] == [n for n in other if n not in mine] == []


def without(record: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {k: v for k, v in record.items() if k not in keys}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    memory = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else tmp_path_factory.mktemp("runs")
    folder = memory / f"engine-kills-{os.getpid()}"
    folder.mkdir()
    made = None
    try:
        made = Runs(folder)
        yield made
    finally:
        if made:
            made.close()
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def whole(runs: Runs) -> dict[str, Any]:
    """A run that nothing stopped."""
    return runs.finished("whole")


@pytest.fixture(scope="module")
def short(runs: Runs) -> dict[str, Any]:
    return runs.finished("short", SHORT)


def plan_of(draw: random.Random, kind: str, whole: dict[str, Any]) -> dict[str, Any]:
    """When to die: by the clock, before a storage operation, in the middle of a file, in evaluation, in pruning."""
    operations = whole["operations"]
    writes = sum(line.startswith("write ") for line in operations)
    prunes = sum(".trash." in line for line in operations)
    return {
        "time": lambda: {"after": draw.uniform(0, whole["seconds"])},
        "operation": lambda: {"at": ["operation", draw.randrange(len(operations))], "do": "SIGKILL"},
        "file": lambda: {"at": ["write", draw.randrange(writes)], "do": "half"},
        "evaluation": lambda: {"at": ["evaluate", draw.randrange(whole["evaluations"])], "do": "SIGKILL"},
        "pruning": lambda: {"at": ["prune", draw.randrange(prunes)], "do": "SIGKILL"},
    }[kind]()  # fmt: skip


KINDS = ("time", "operation", "file", "evaluation", "pruning")


@pytest.mark.parametrize("count", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_anywhere_ends_as_never_killed(runs: Runs, whole: dict[str, Any], count: int) -> None:
    """1 to 3 SIGKILLs in each run: weights, optimizer, metrics, predictions, checkpoints and log are equal, times aside."""
    draw, kills = random.Random(count), dict.fromkeys(KINDS, 0)
    for number in range(count):
        for attempt in range(draw.randint(1, 3)):
            kind = KINDS[number % 5] if attempt == 0 else draw.choice(KINDS)
            done = runs.run("killed", plan_of(draw, kind, whole))
            assert done["code"] in (0, -signal.SIGKILL), done["said"]
            kills[kind] += done["code"] != 0
        runs.finished("killed")
        runs.equal("killed", "whole")
        shutil.rmtree(runs.folder / "killed")
    print(f"{count} runs, {sum(kills.values())} kills: {kills}")
    assert all(n >= count // 10 for n in kills.values()), kills
    assert sum(kills.values()) >= count


def chosen(operations: list[str], every: bool) -> list[tuple[int, str]]:
    """(operation, error) to inject: all of both, or in turn at a sample over kinds of operations and files."""
    if every:
        return [(n, cause) for n in range(len(operations)) for cause in ("EIO", "ENOSPC")]
    draw, kinds = random.Random(7), {}
    for n in draw.sample(range(len(operations)), len(operations)):
        kind, path = operations[n].split(" ", 1)
        kinds[kind, re.sub(r"\d+|\.(new|trash)\.", "", Path(path).name)] = n
    kept = {kind: n for (kind, _), n in kinds.items()}  # one of each kind, and some files besides
    sample = sorted({*kept.values(), *list(kinds.values())[::6]})
    return [(n, ("EIO", "ENOSPC")[i % 2]) for i, n in enumerate(sample)]


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_refusing_disk_is_an_error_that_says_all_and_costs_nothing(runs: Runs, short: dict[str, Any], every: bool) -> None:
    """EIO and ENOSPC at storage operations of a run: every one in the slow suite."""
    plans = chosen(short["operations"], every)
    for n, cause in plans:
        operation, folder = short["operations"][n], runs.folder / "refused"
        done = runs.run("refused", {"at": ["operation", n], "do": cause}, SHORT)
        assert done["code"] == 1, (operation, done["said"])
        error = next(line for line in done["said"].splitlines() if line.startswith("error: "))
        text = {"EIO": "Input/output error", "ENOSPC": "No space left on device"}[cause]
        assert re.search(rf"{folder}\S*: cannot be written: {text}; [\d,]+ bytes needed, [\d,]+ free; ", error), (
            operation,
            error,
        )
        assert "Traceback" not in done["said"]
        good = checkpoint.newest(folder / "checkpoints")
        if good:
            assert f"the last good checkpoint is {good} (step {int(good.name[5:])})" in error, (operation, error)
        else:
            assert "no checkpoint was saved yet" in error or "nothing was begun" in error, (operation, error)
        runs.finished("refused", SHORT)
        runs.equal("refused", "short")
        shutil.rmtree(folder)
    print(f"{len(plans)} injected errors at {len(short['operations'])} operations")
    assert len({short["operations"][n].split()[0] for n, _ in plans}) >= 7


SIGNALS = {  # where it comes -> (plan, exit code, step of the checkpoint it leaves)
    "evaluation": (["evaluate", 2], "SIGTERM", 143, 6),
    "a save's files": (["write:optimizer.safetensors", 1], "SIGTERM", 143, 4),
    "a best's files": (["write:weights.safetensors", 1], "SIGINT", 130, 3),
    "the log": (["write:log.jsonl", 9], "SIGINT", 130, None),
    "final scores": (["evaluate", 7], "SIGTERM", 143, 8),
}


@pytest.mark.parametrize("place", SIGNALS)
def test_a_signal_anywhere_saves_ends_and_goes_on_identically(runs: Runs, whole: dict[str, Any], place: str) -> None:
    at, name, code, step = SIGNALS[place]
    shutil.rmtree(runs.folder / "signalled", ignore_errors=True)
    done = runs.run("signalled", {"at": at, "do": name})
    assert done["code"] == code, done["said"]
    assert "--resume" in done["said"]
    newest = checkpoint.newest(runs.folder / "signalled" / "checkpoints")
    assert newest
    assert step is None or newest.name == f"step-{step:08d}"
    assert not (runs.folder / "signalled" / "metrics.json").exists()
    runs.finished("signalled")
    runs.equal("signalled", "whole")


def test_a_signal_while_tokenising_leaves_nothing(runs: Runs) -> None:
    done = runs.run("tokenising", {"at": ["encode", 0], "do": "SIGTERM"}, ["data.max_length=40"])  # not in the cache
    assert done["code"] == 143, done["said"]
    assert "stopped before training began; nothing was written" in done["said"]
    assert not (runs.folder / "tokenising").exists()


@pytest.mark.parametrize("place", [("evaluate", 3), ("write:optimizer.safetensors", 1), ("forward", 9)])
def test_a_second_signal_ends_at_once_within_c_code_with_the_last_checkpoint_good(
    runs: Runs, whole: dict[str, Any], place: tuple[str, int]
) -> None:
    out = f"twice-{place[0][:5]}"
    done = runs.run(out, {"at": list(place), "do": "SIGINT+stuck:SIGINT"})
    assert done["code"] == 130, done["said"]
    assert done["seconds"] < 20
    assert done["said"].count("SIGINT: finishing this step") == 1
    assert "go on with" not in done["said"]  # it did not wait for the step
    assert checkpoint.newest(runs.folder / out / "checkpoints") or place[0] != "forward"
    runs.finished(out)
    runs.equal(out, "whole")


def test_signals_that_come_together_are_one_request(runs: Runs, whole: dict[str, Any]) -> None:
    """The terminal's own and the one that make passes on: the step is finished and saved."""
    done = runs.run("together", {"at": ["forward", 9], "do": "SIGINT+SIGINT+SIGTERM"})
    assert done["code"] == 130, done["said"]
    assert "go on with: --out" in done["said"]
    assert checkpoint.newest(runs.folder / "together" / "checkpoints")
    runs.finished("together")
    runs.equal("together", "whole")
