"""Two processes that train together are one process: the laws of engine/distributed.py, in real processes under torchrun."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BASE, StopAt, make_bert, make_rows, write_jsonl
from safetensors.torch import load_file
from test_loop import one_window_gradients, relative, run
from test_windows import encoded

from engine import checkpoint, disk, distributed, find, recipe, report, seeds
from engine.data.windows import Windows

pytestmark = pytest.mark.xdist_group("ranks")  # what the file starts once, it starts in one worker

ENVIRONMENT = {
    **os.environ, "PYTHONPATH": f"{find.PROJECT}:{Path(__file__).parent}", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
}  # fmt: skip
STILL = ["tune.method=full", "train.clip=null"]


def lay_out(folder: Path) -> Path:
    """A model without dropout, 90 rows to train on, a recipe that evaluates and saves often."""
    make_bert(folder / "still", layers=1, dropout=0.0)
    for name, count, seed in (("train", 90, 1), ("validation", 31, 2), ("test", 30, 3)):
        write_jsonl(folder / f"{name}.jsonl", make_rows(count, seed, noise=0.2))
    text = BASE.format(model=folder / "still").replace("epochs: 2", "max_steps: 8\n  micro_batch_tokens: 100")
    more = "checkpoint: {every: 3, keep: 9}\nearly_stopping: {monitor: loss, patience: 9}\n"
    text = text.replace(
        "evaluate: {bootstrap: 50}\n", more + "evaluate: {bootstrap: 0, every: 3, metrics: [accuracy, f1_macro]}\n"
    )
    # a key's bias has no gradient but rounding, which AdamW with a tiny eps would blow up to steps of the learning rate
    (folder / "still.yaml").write_text(text.replace("1e-2", "1e-2\n  eps: 1e-4"))
    return folder


class Pair:
    """What two processes found, and the folder they worked in."""

    def __init__(self, folder: Path):
        self.folder = folder
        os.chdir(folder)
        stop = StopAt("one-two", 3)
        assert run(recipe.load("still.yaml"), "one-two", interrupted=stop).progress.step == 3
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        done = subprocess.run(
            [*command, str(Path(__file__).with_name("ranks.py")), str(folder)], env=ENVIRONMENT, capture_output=True, text=True,
            timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        self.said = done.stdout
        self.found = [torch.load(folder / f"found{rank}.pt", weights_only=True) for rank in (0, 1)]
        self.one = run(recipe.load("still.yaml"), "alone")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    here = Path.cwd()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write", lambda folder: disk.replace(folder / "report.html", b"report"))  # plots take seconds
        yield Pair(lay_out(tmp_path_factory.mktemp("ranks")))
    os.chdir(here)


def weights(folder: Path) -> list[torch.Tensor]:
    return list(load_file(folder / "model" / "model.safetensors").values())


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("name", "options"), [("even", []), ("uneven", ["train.batch_size=13"]), ("one", ["train.batch_size=89"])]
)
def test_the_gradients_of_two_ranks_are_those_of_one_process(pair: Pair, name: str, options: list[str]) -> None:
    os.chdir(pair.folder)
    expected = one_window_gradients(recipe.load("still.yaml", STILL + options), 100)
    assert len(pair.found[0][name]) == len(expected)
    if name == "one":
        assert len(expected) == 2  # 89 rows, then one: rank 1 has none
    for first, second, alone in zip(pair.found[0][name], pair.found[1][name], expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert relative(first, alone) < 1e-6


def test_dropout_differs_by_rank(pair: Pair) -> None:
    seeds.seed_all(1, 2, 3)
    alone = float(torch.rand(()))
    assert pair.found[0]["draw"] == alone != pair.found[1]["draw"]


def test_what_no_rank_has_a_gradient_for_keeps_none(pair: Pair) -> None:
    for found in pair.found:
        assert found["buckets"] == [[3.0] * 3, None, [5.0] * 3, None, 2.0]


def test_a_run_of_two_ranks_ends_where_one_process_does(pair: Pair) -> None:
    assert relative(weights(pair.folder / "whole"), weights(pair.folder / "alone")) < 1e-5
    assert pair.found[0]["scores"] == pair.found[1]["scores"]
    for two, one in zip(pair.found[0]["scores"], pair.one.progress.evaluations, strict=True):
        assert two == pytest.approx(one, rel=1e-4)
    for split in ("validation", "test"):
        rows = [
            [json.loads(line) for line in (pair.folder / out / "predictions" / f"{split}.jsonl").read_text().splitlines()]
            for out in ("whole", "alone")
        ]
        assert [r["text"] for r in rows[0]] == [r["text"] for r in rows[1]]
        assert [r["probabilities"]["positive"] for r in rows[0]] == pytest.approx(
            [r["probabilities"]["positive"] for r in rows[1]], abs=1e-4
        )


def test_one_rank_makes_the_frozen_cache_and_both_use_it(pair: Pair) -> None:
    os.chdir(pair.folder)
    assert pair.said.count("frozen  1 of 1 blocks, 0 MB, made") == 1
    options = ["tune.method=last_n", "tune.n=0", "train.cache_frozen=float32"]
    plan = next(r for r in run_log(options, "frozen-alone") if r["event"] == "plan")
    assert plan["frozen_cache"].endswith("found"), "what two processes have made, one finds"
    assert relative(weights(pair.folder / "frozen"), weights(pair.folder / "frozen-alone")) < 1e-5


def run_log(options: list[str], out: str) -> list[dict[str, Any]]:
    run(recipe.load("still.yaml", options), out)
    return log(Path(out))


def test_only_one_rank_writes_and_speaks(pair: Pair) -> None:
    two, one = (log(pair.folder / out) for out in ("whole", "alone"))
    kinds = [(r["event"], r.get("step"), r.get("items"), r.get("tokens")) for r in two]
    assert kinds == [(r["event"], r.get("step"), r.get("items"), r.get("tokens")) for r in one]
    assert pair.said.count(f"run     {Path('whole')}") == 1
    for a, b in zip(two, one, strict=True):
        if a["event"] == "step":
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    names = [sorted(str(p.relative_to(pair.folder / out)) for p in (pair.folder / out).rglob("*")) for out in ("whole", "alone")]
    assert names[0] == names[1]


def test_a_run_goes_on_with_more_or_fewer_ranks(pair: Pair) -> None:
    os.chdir(pair.folder)
    assert relative(weights(pair.folder / "one-two"), weights(pair.folder / "alone")) < 1e-5
    steps = [r["step"] for r in log(pair.folder / "one-two") if r["event"] == "step"]
    assert steps == list(range(1, 9))
    # a signal at rank 1 stopped both at the same step, with a checkpoint; one process goes on from it
    assert pair.found[0]["stopped"] == pair.found[1]["stopped"]
    newest = checkpoint.newest(pair.folder / "signalled" / "checkpoints")
    assert newest
    assert checkpoint.read_state(newest)["progress"]["step"] == pair.found[0]["stopped"] < 8
    run(recipe.load("still.yaml"), "signalled", resume=True)
    assert relative(weights(pair.folder / "signalled"), weights(pair.folder / "alone")) < 1e-5
    assert [r["step"] for r in log(pair.folder / "signalled") if r["event"] == "step"] == list(range(1, 9))
    noted = json.loads((pair.folder / "signalled" / "environment.json").read_text())["resumed"]
    assert "processes: 2 -> 1" in noted[0]["different"]


def test_ranks_agree_on_what_goes_wrong_on_one_of_them(pair: Pair) -> None:
    """Memory: both cut the window and redo the step. Numbers: both replay, and leave the step out if it does not help."""
    for name, event, skipped in (("short", "memory", 0), ("replayed", "replayed", 0), ("skipped", "skipped", 1)):
        first, second = (found[name] for found in pair.found)
        assert first == second
        assert (first["step"], first["skipped"]) == (8, skipped)
        told = [r for r in log(pair.folder / name) if r["event"] == event]
        assert [r["step"] for r in told] == [3 if name == "short" else 5]
        if not skipped:
            assert relative(weights(pair.folder / name), weights(pair.folder / "alone")) < 1e-5


def launch(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "engine.launch", "2", "finetune", *arguments],
        cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def ranks_of(launcher: int) -> list[int]:
    """The process numbers of the ranks, in order."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            environment = (stat.parent / "environ").read_bytes().split(b"\0")
        except (OSError, IndexError):
            continue
        if parent == launcher:
            found += [(int(e[5:]), int(stat.parent.name)) for e in environment if e.startswith(b"RANK=")]
    return [pid for _, pid in sorted(found)]


def test_a_signal_to_one_rank_stops_both_with_its_code(pair: Pair) -> None:
    process = launch(pair.folder, "still.yaml", "train.max_steps=100000", "train.epochs=99999", "--out", "long")
    log_file, began = pair.folder / "long" / "log.jsonl", time.monotonic()
    while not (log_file.exists() and '"event": "step"' in log_file.read_text()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() - began < 60
        time.sleep(0.05)
    ranks = ranks_of(process.pid)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGTERM)
    said, problems = process.communicate(timeout=60)
    assert process.returncode == 143, problems
    assert said.count("stopped at step") == 1
    assert "Traceback" not in problems
    steps = [r["step"] for r in log(pair.folder / "long") if r["event"] == "step"]
    newest = checkpoint.newest(pair.folder / "long" / "checkpoints")
    assert newest
    assert checkpoint.read_state(newest)["progress"]["step"] == steps[-1]


def test_what_is_wrong_is_said_once_with_its_code(pair: Pair) -> None:
    process = launch(pair.folder, "still.yaml", "--out", "still")  # the model's folder: rank 0 alone finds out
    _, problems = process.communicate(timeout=60)
    assert process.returncode == 2, problems
    assert problems.count("error:") == 1
    assert "name another folder" in problems
    assert len(problems.splitlines()) == 1


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("world", [2, 3, 7])
def test_the_shares_of_all_ranks_are_the_window(world: int, packed: bool) -> None:
    lengths = np.random.default_rng(world).integers(1, 40, size=29).tolist()

    def windows(rank: int, world: int) -> list[Any]:
        made = Windows(
            encoded(lengths), lambda b: len(b["labels"]), batch_size=8, tokens=64, seed=3, packed=packed, rank=rank, world=world
        )
        return [(w, [r for part in made.parts(w.rows, rank) for r in part.tolist()]) for w in made.epoch(1, skip=1)]

    one, many = windows(0, 1), [windows(rank, world) for rank in range(world)]
    for i, (window, rows) in enumerate(one):
        shares = [of_rank[i] for of_rank in many]
        assert sorted(r for _, share in shares for r in share) == sorted(rows)
        assert sum(w.items for w, _ in shares) == window.items
        assert {w.tokens for w, _ in shares} == {window.tokens}
        assert max(len(s) for _, s in shares) - min(len(s) for _, s in shares) <= 1


def test_one_process_pays_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys; from engine import distributed as d; d.start(); d.total(1); d.from_first(1); d.sum_gradients([], 0); d.stop();"
    code += " assert 'torch' not in sys.modules and d.world() == 1"
    subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, check=True)
    assert distributed.total(3) == 3
    assert distributed.gather("x") == ["x"]


@pytest.mark.parametrize("count", ["two", "0", "-1", "2;id", "2 2", "$(id)", "1.5"])
def test_make_refuses_what_is_no_number_of_processes(count: str, tmp_path: Path) -> None:
    done = subprocess.run(
        ["make", "-C", str(find.PROJECT), "-n", "finetune", "RECIPE=x", f"NPROC={count}"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "NPROC is not a whole number" in done.stderr
