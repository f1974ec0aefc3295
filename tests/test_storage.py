"""What is saved stays saved: power loss, damage, a full disk, two owners. And mutants, to show that these laws have teeth."""

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import MakeRecipe, make_bert
from powerloss import CASES, states
from safetensors.torch import load, save_file
from storage import Operation, Watch

from engine import checkpoint, disk, find, finetune, lock, resume, watch
from engine.errors import InputError, RunError
from engine.progress import Progress

QUIET = {"say": lambda line: None}


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory: thousands of small files in no time."""
    place = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else tmp_path
    folder = place / f"engine-storage-{os.getpid()}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


@dataclass
class Saved:
    """What a save promised: after `operations` of the story, this step with these weights and this log."""

    operations: int
    step: int
    weights: dict[str, torch.Tensor]
    log: bytes


def trainer() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = torch.nn.Linear(3, 2)
    group = {"params": list(model.parameters()), "names": ["weight", "bias"], "lr": 0.1, "initial_lr": 0.1}
    return model, torch.optim.AdamW([group])


def story(folder: Path) -> tuple[list[Operation], list[Saved]]:
    """Five saves with logging, best weights, pruning, and one save that takes an older one's place; as the engine does them."""
    model, optimizer = trainer()
    operations: list[Operation] = []
    seen = Watch(folder, operations.append).install()
    promised, kept = [], []
    try:
        log, checkpoints = watch.Log(folder / "log.jsonl"), folder / "checkpoints"
        for step in (1, 2, 3, 4, 5, 5):
            model(torch.ones(1, 3)).sum().backward()
            optimizer.step()
            log({"event": "step", "step": step})
            best = max(1, step // 2 * 2)
            progress = Progress(step=step, best=1.0, best_step=best)
            if best == step:
                checkpoint.write(checkpoints, f"best-{step:08d}", model, progress)
            length = log.sync()
            checkpoint.write(checkpoints, f"step-{step:08d}", model, progress, optimizer, None, length)
            weights = {name: t.detach().clone() for name, t in model.state_dict().items()}
            kept.append(Saved(seen.count, step, weights, (folder / "log.jsonl").read_bytes()[:length]))
            promised.append(kept[-1])
            checkpoint.prune(checkpoints, 2)
            log({"event": "saved", "step": step})
    finally:
        seen.remove()
    return operations, promised


def broken_promises(memory: Path) -> Iterator[str]:
    """Every way in which a power loss breaks what a save promised; nothing, if the protocol is right."""
    (memory / "story").mkdir()
    operations, promised = story(memory / "story")
    counted = 0
    for done, crashed in states(memory / "story", operations, memory):
        counted += 1
        disk.tidy(crashed / "checkpoints")
        path = checkpoint.newest(crashed / "checkpoints")
        owed = [save for save in promised if save.operations <= done]
        if path is None:
            if owed:
                yield f"{done}: step {owed[-1].step} is lost"
        else:
            state = checkpoint.read_state(path)
            step, length = state["progress"]["step"], state["log_bytes"]
            if owed and step < owed[-1].step:
                yield f"{done}: step {owed[-1].step} is lost, {step} is left"
            weights = load((path / "weights.safetensors").read_bytes())
            same = [save for save in promised if all(torch.equal(save.weights[name], weights[name]) for name in weights)]
            if not same or same[0].step != step:
                yield f"{done}: step {step} has other weights than were saved"
            elif (crashed / "log.jsonl").read_bytes()[:length] != same[0].log:
                yield f"{done}: lines of the log are lost"
            best = checkpoint.best_of(path)
            if best is None or checkpoint.verify(best):
                yield f"{done}: the best weights are lost"
        shutil.rmtree(crashed)
    assert counted == (len(operations) + 1) * (len(CASES) + 2) > 3000


def test_a_power_loss_at_any_moment_loses_no_save_and_loads_nothing_corrupt(memory: Path) -> None:
    assert list(broken_promises(memory)) == []


def manifest_is_last(memory: Path) -> bool:
    """In each folder the manifest is opened when all other files are there and synced, and nothing follows it."""
    (memory / "order").mkdir()
    operations, _ = story(memory / "order")
    unsynced: set[str] = set()
    closed: set[str] = set()
    for operation in operations:
        folder = os.path.dirname(operation.path)
        if operation.kind == "open" and ".new." in operation.path:
            if folder in closed or (operation.path.endswith("manifest.json") and unsynced):
                return False
            unsynced.add(operation.path)
            closed |= {folder} if operation.path.endswith("manifest.json") else set()
        elif operation.kind == "fsync":
            unsynced.discard(operation.path)
        elif operation.kind == "rename":
            closed.discard(operation.path)
    return not closed and not unsynced


def test_the_manifest_is_written_last(memory: Path) -> None:
    assert manifest_is_last(memory)


def damage(path: Path, draw: random.Random) -> str:
    """Flip a bit, cut, or delete."""
    content = bytearray(path.read_bytes())
    kind = draw.choice(["flip", "flip", "flip", "cut", "delete"])
    if kind == "flip":
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del content[draw.randrange(len(content)) :]
    path.unlink() if kind == "delete" else path.write_bytes(content)
    return kind


def undetected(memory: Path, trials: int) -> Iterator[str]:
    """Damage that was not noticed, or that cost more than the checkpoint it hit."""
    model, optimizer = trainer()
    good, run = memory / "good", memory / "run"
    for step, best in ((1, None), (2, 2), (3, 2)):
        progress = Progress(step=step, best=best and 1.0, best_step=best or 0)
        checkpoint.write(good, f"step-{step:08d}", model, progress, optimizer)
        if best == step:
            checkpoint.write(good, f"best-{step:08d}", model, progress)
    assert checkpoint.newest(good) == good / "step-00000003"
    files = sorted(path.relative_to(good) for part in ("step-00000003", "best-00000002") for path in (good / part).iterdir())
    assert len(files) == 7
    draw = random.Random(0)
    for trial in range(trials):
        shutil.copytree(good, run / "checkpoints")
        hit = run / "checkpoints" / files[trial % len(files)]
        kind = damage(hit, draw)
        left = checkpoint.newest(run / "checkpoints", quarantine=True)
        expected = "step-00000002" if hit.parent.name == "step-00000003" else "step-00000001"  # 2 and 3 need best-2
        if left is None or left.name != expected or not (run / "quarantine" / hit.parent.name).exists():
            yield f"{kind} in {hit.parent.name}/{hit.name}: left {left}"
        shutil.rmtree(run)


def test_a_thousand_damages_are_all_detected_and_the_next_older_one_is_used(memory: Path) -> None:
    assert list(undetected(memory, 1000)) == []


def test_when_no_checkpoint_is_whole_a_run_says_so_and_does_not_begin_anew(
    memory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, optimizer = trainer()
    for step in (1, 2):
        path = checkpoint.write(memory / "checkpoints", f"step-{step:08d}", model, Progress(step=step), optimizer)
        (path / "optimizer.safetensors").write_bytes(b"")
    with pytest.raises(RunError, match="optimizer.safetensors is damaged"):
        checkpoint.load_optimizer(path, optimizer, None)
    with pytest.raises(InputError, match="no whole checkpoint to resume from"):
        resume.go_on(memory, model, optimizer, None, print)
    said = capsys.readouterr().out
    assert said.count("moved to") == 2
    with pytest.raises(InputError, match="no whole checkpoint"):  # and it does not forget
        resume.go_on(memory, model, optimizer, None, print)


def log_is_rewound(memory: Path) -> bool:
    path = memory / "log.jsonl"
    log = watch.Log(path)
    for step in (1, 2, 3, 4):
        log({"step": step})
        if step == 2:
            length = log.sync()
    path.open("a").write('{"step": 5, "to')  # torn
    log = watch.Log(path, keep=length)
    log({"step": 3})
    return [line.partition(", ")[0] for line in path.read_text().splitlines()] == [f'{{"step": {n}' for n in (1, 2, 3)]


def test_the_log_is_cut_where_the_checkpoint_says(memory: Path) -> None:
    assert log_is_rewound(memory)


def test_a_full_disk_is_noticed_before_the_first_byte(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = trainer()
    checkpoint.write(memory / "checkpoints", "step-00000001", model, Progress(step=1), optimizer)
    monkeypatch.setattr(disk, "free", lambda path: 1000)
    before = sorted((memory / "checkpoints").rglob("*"))
    with pytest.raises(disk.DiskError, match=r"No space left on device; 1,048,\d+ bytes needed, 1,000 free"):
        checkpoint.write(memory / "checkpoints", "step-00000002", model, Progress(step=2), optimizer)
    assert sorted((memory / "checkpoints").rglob("*")) == before
    assert checkpoint.last_good(memory / "checkpoints").endswith("step-00000001 (step 1); go on with --resume")


@pytest.mark.parametrize("refused", [None, errno.EPERM, errno.EOPNOTSUPP])
def test_the_best_step_is_written_once_and_twice_where_the_disk_has_no_links(
    memory: Path, monkeypatch: pytest.MonkeyPatch, refused: int | None
) -> None:
    def no_links(source: Path, name: Path) -> None:
        raise OSError(refused, os.strerror(refused or 0), str(name))

    if refused:
        monkeypatch.setattr(os, "link", no_links)
    model, optimizer = trainer()
    for step, best in ((1, 1), (2, 1)):
        progress = Progress(step=step, best=1.0, best_step=best)
        if best == step:
            checkpoint.write(memory, f"best-{step:08d}", model, progress)
        checkpoint.write(memory, f"step-{step:08d}", model, progress, optimizer)
        with torch.no_grad():
            model.weight += 1
    best, first, second = (memory / name / "weights.safetensors" for name in ("best-00000001", "step-00000001", "step-00000002"))
    assert best.samefile(first) is not bool(refused)
    assert best.read_bytes() == first.read_bytes() != second.read_bytes()
    assert not any(checkpoint.verify(path.parent) for path in (best, first, second))


def test_a_link_that_fails_is_an_error_of_the_disk(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = trainer()
    progress = Progress(step=1, best=1.0, best_step=1)
    checkpoint.write(memory, "best-00000001", model, progress)
    monkeypatch.setattr(os, "link", lambda source, name: os.stat("/dev/null/x"))
    with pytest.raises(disk.DiskError, match="cannot be written: Not a directory"):
        checkpoint.write(memory, "step-00000001", model, progress, optimizer)
    assert [path.name for path in memory.iterdir()] == ["best-00000001"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_errors_of_a_real_full_device_are_told_also_when_rust_meets_them(tmp_path: Path) -> None:
    with (
        pytest.raises(disk.DiskError, match="/dev/full: cannot be written: No space left on device; 2 bytes needed"),
        disk.refusing(tmp_path, 2),
    ):
        disk.write(Path("/dev/full"), b"ab")
    with pytest.raises(disk.DiskError, match=r"cannot be written: .*os error \d+"), disk.refusing(tmp_path, 4):
        save_file({"x": torch.ones(1)}, tmp_path / "no such folder" / "x.safetensors")


RACE = """
import os, sys, time
from pathlib import Path
from engine import lock
from engine.errors import RunError
folder, start, report = Path(sys.argv[1]), os.pipe(), os.pipe()
for _ in range(50):
    if os.fork() == 0:
        os.close(start[1])
        os.read(start[0], 1)  # all at once
        try:
            held = lock.take(folder)
            said = f"won {os.getpid()}"
        except RunError as error:
            said, held = f"lost {error}", None
        os.write(report[1], (said + "\\n").encode())
        if held:
            os.read(start[0], 1)
            time.sleep(2)
        os._exit(0)
os.close(start[0]); os.close(start[1]); os.close(report[1])
lines = os.fdopen(report[0]).read()
print(lines)
"""


def test_fifty_racing_starts_have_one_winner_whom_the_others_name(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RACE, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(find.PROJECT)},
    )
    lines = done.stdout.split("\n")[:-2]
    won = [line.split()[1] for line in lines if line.startswith("won")]
    lost = [line for line in lines if line.startswith("lost")]
    assert (len(won), len(lost)) == (1, 49), done.stdout + done.stderr
    assert all(f"another run owns this folder: pid {won[0]} on " in line and ", started 20" in line for line in lost), lost[0]
    lock.take(tmp_path).release()  # the winner is dead: the folder is free, though its file is still there


def test_a_second_start_ends_at_once_and_names_the_first(recipe: MakeRecipe) -> None:
    """Two real processes; the first is stopped by SIGTERM as early as it may come, and goes on."""
    command = [sys.executable, "-m", "engine", "finetune", str(recipe().path), "train.epochs=40", "--out", "one"]
    environment = {**os.environ, "PYTHONPATH": str(find.PROJECT)}
    first = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 60
    while not (Path("one/.lock").exists() and Path("one/.lock").stat().st_size):
        assert time.time() < deadline
        time.sleep(0.01)
    second = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert second.returncode == 1
    assert f"another run owns this folder: pid {first.pid} on " in second.stderr
    assert "Traceback" not in second.stderr
    first.send_signal(signal.SIGTERM)
    _, error = first.communicate(timeout=60)
    assert first.returncode == 143, error


def test_a_finished_run_is_told_again_and_nothing_is_done(recipe: MakeRecipe) -> None:
    first = finetune.finetune(recipe("train.epochs=1"), "r", **QUIET)
    before = {path: path.read_bytes() for path in Path("r").rglob("*") if path.is_file() and path.name != ".lock"}
    for again in (False, True):
        said: list[str] = []
        second = finetune.finetune(recipe("train.epochs=1"), "r", resume=again, say=said.append)
        assert second.metrics == json.loads(json.dumps(first.metrics))
        assert "finished already, 6 steps" in said[0]
        assert any(line.startswith("test") and "accuracy" in line for line in said)
    assert {path: path.read_bytes() for path in before} == before
    with pytest.raises(InputError, match="it holds a run of another recipe; it differs in\n  train.learning_rate: 0.01 -> 0.1"):
        finetune.finetune(recipe("train.epochs=1", "train.learning_rate=0.1"), "r", **QUIET)
    with pytest.raises(InputError, match="a run of this recipe; go on with --resume"):
        finetune.finetune(recipe("train.epochs=2"), "r", **QUIET)
    longer = finetune.finetune(recipe("train.epochs=2"), "r", resume=True, **QUIET)
    assert longer.progress.step == json.loads(Path("r/metrics.json").read_text())["steps"] == 12
    steps = [json.loads(line).get("step") for line in Path("r/log.jsonl").read_text().splitlines() if '"event": "step"' in line]
    assert steps == list(range(1, 13))


def test_going_on_with_other_data_or_another_model_is_refused_with_a_list(recipe: MakeRecipe, tmp_path: Path) -> None:
    model = make_bert(tmp_path / "own", layers=1)
    made = recipe("train.epochs=1", model=model)
    finetune.finetune(made, "r", **QUIET)
    longer = recipe("train.epochs=2", model=model)
    rows, weights = Path("train.jsonl").read_bytes(), (model / "model.safetensors").read_bytes()
    Path("train.jsonl").write_bytes(rows.replace(b"good", b"fine", 1))
    make_bert(tmp_path / "own", layers=1, initializer_factor=2.0)
    flipped = bytearray(weights)
    flipped[-1] ^= 1
    (model / "model.safetensors").write_bytes(flipped)
    with pytest.raises(
        InputError, match=r"(?s)changed are\n  data train.jsonl: sha256 \w{16}... -> \w{16}...\n  the base model: sha256"
    ) as caught:
        finetune.finetune(longer, "r", resume=True, **QUIET)
    assert "validation" not in str(caught.value)
    Path("train.jsonl").write_bytes(rows)
    (model / "model.safetensors").write_bytes(weights)
    about = json.loads(Path("r/environment.json").read_text())
    Path("r/environment.json").write_text(json.dumps(about | {"threads": 7, "versions": about["versions"] | {"torch": "1.0"}}))
    said: list[str] = []
    finetune.finetune(longer, "r", resume=True, say=said.append)
    note = next(line for line in said if "equal bits are not promised" in line)
    assert f"torch: 1.0 -> {torch.__version__}" in note
    assert "threads: 7 -> " in note
    assert json.loads(Path("r/environment.json").read_text())["resumed"][0]["step"] == 6


# -- safetensors, part by part ----------------------------------------------------------------------------------------


def test_a_file_written_part_by_part_is_what_the_package_reads(tmp_path: Path) -> None:
    """Every type, no dimension, none of a length, and views; the package's own reader finds each bit."""
    from safetensors.torch import load_file

    torch.manual_seed(0)
    given = {f"t.{kind}": (torch.randn(3, 5) * 9).to(kind) for kind in checkpoint.DTYPES}
    given |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "turned": torch.randn(4, 6).T, "part": torch.randn(9)[2:5]}
    path = tmp_path / "x.safetensors"
    digest = disk.write(path, checkpoint.safetensors(given))
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    found = load_file(path)
    assert found.keys() == given.keys()
    for name, tensor in given.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    disk.write(path, checkpoint.safetensors({}))
    assert load_file(path) == {}
