"""The command line as people meet it: exit codes, messages, no half-made folders, no tracebacks."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeRecipe, make_rows, write_jsonl

from engine import find
from engine.__main__ import main
from engine.errors import InputError

PYTHON = [sys.executable, "-m", "engine"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(find.PROJECT), "HF_HUB_OFFLINE": "1"}


def engine(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PYTHON, *arguments], capture_output=True, text=True, env=ENVIRONMENT, timeout=120)


def test_help_answers_at_once_and_imports_nothing_heavy() -> None:
    def cost(*command: str) -> float:
        """Seconds of processor time, which a busy machine stretches less than the clock's."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=ENVIRONMENT)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(cost("-m", "engine", "--help") for _ in range(3)) < 0.3 + min(cost("-c", "pass") for _ in range(3))
    done = engine("--help")
    loaded = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "engine", "--help"], capture_output=True, text=True, env=ENVIRONMENT
    ).stderr
    assert not any(name in loaded for name in ("| torch", "| transformers", "| numpy", "| pydantic", "| sklearn"))
    for verb in ("finetune", "check", "layers", "evaluate", "predict", "describe", "recipes"):
        assert verb in done.stdout


def broken(name: str, edit: Any) -> None:
    path = Path(name)
    path.write_bytes(edit(path.read_bytes()))


def first_row(**changes: Any) -> Any:
    def edit(content: bytes) -> bytes:
        rows = [json.loads(line) for line in content.decode().splitlines()]
        rows[0].update(changes)
        return "".join(json.dumps(r) + "\n" for r in rows).encode()

    return edit


WRONG: dict[str, tuple[list[str], Any, list[str]]] = {
    "unknown key": (["train.epoch=1"], None, ["train.epoch", "did you mean 'epochs'?"]),
    "wrong type": (["train.epochs=many"], None, ["train.epochs", "a whole number is needed, not 'many'"]),
    "missing file": (["data.train=gone.jsonl"], None, ["data.train", "no file gone.jsonl"]),
    "missing column": (["data.columns.text=txet"], None, ["data.columns.text", "no column 'txet'; did you mean 'text'?"]),
    "empty file": ([], lambda: broken("train.jsonl", lambda b: b""), ["train.jsonl", "the file has no rows"]),
    "unknown label": ([], lambda: broken("test.jsonl", first_row(label="positif")), ["test.jsonl:1:", "'positif' is not in the training set; did you mean 'positive'?"]),
    "empty text": ([], lambda: broken("validation.jsonl", first_row(text="  ")), ["validation.jsonl:1:", "column 'text' is empty"]),
    "invalid UTF-8": ([], lambda: broken("train.jsonl", lambda b: b[:60] + b"\xff" + b[60:]), ["train.jsonl:", "this is not UTF-8"]),
    "single class": ([], lambda: write_jsonl(Path("train.jsonl"), [{"text": "good", "label": "positive"}] * 9), ["train.jsonl", "holds only 'positive'"]),
    "unknown model": (["model.name=nobody/nothing"], None, ["model.name", "no model 'nobody/nothing'", "Three ways out"]),
    "unmatched target": (["tune={method: lora, at: '**.kwery'}"], None, ["tune.at", "'**.kwery' matches no module", "query"]),
    "unmatched swap": (["swap=[{at: '**.atention', with: 'torch.nn:Identity'}]"], None, ["swap.0.at", "matches no module", "attention"]),
    "unknown metric": (["evaluate.metrics=[acuracy]"], None, ["evaluate.metrics", "did you mean 'accuracy'?"]),
    "unknown recipe": ([], None, ["no recipe 'nothing' in recipes/"]),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_ends_with_2_one_message_and_no_folder(
    recipe: MakeRecipe, capfd: pytest.CaptureFixture[str], case: str
) -> None:
    overrides, spoil, said = WRONG[case]
    path = "nothing" if case == "unknown recipe" else str(recipe().path)
    if spoil:
        spoil()
    assert main(["finetune", path, *overrides]) == 2
    output = capfd.readouterr()
    for part in said:
        assert part in output.err
    assert "Traceback" not in output.err + output.out
    assert output.err.startswith("error: ")
    assert len(output.err) < 900
    assert not list(Path("runs").glob("*/*")) if Path("runs").exists() else True
    assert not [p for p in Path("runs").glob("*") if p.name != ".cache"]


def test_a_run_from_the_command_line_leaves_what_was_promised(recipe: MakeRecipe, capfd: pytest.CaptureFixture[str]) -> None:
    done = engine("finetune", str(recipe().path), "train.epochs=1", "early_stopping={monitor: accuracy}", "--debug")
    assert done.returncode == 0, done.stderr
    latest = Path("runs/tiny/latest")
    assert latest.is_symlink()
    for name in ("recipe.yaml", "environment.json", "log.jsonl", "metrics.json", "report.html", "model/config.json", "model/README.md",
                 "model/tokenizer.json", "predictions/validation.jsonl", "predictions/test.jsonl", "plots/loss.png"):  # fmt: skip
        assert (latest / name).stat().st_size > 0, name
    results = json.loads((latest / "metrics.json").read_text())
    assert results["stopped"] == "finished"
    assert results["steps"] == 6
    low, high = results["intervals"]["test"]["accuracy"]
    assert low <= results["test"]["accuracy"] <= high
    predictions = [json.loads(line) for line in (latest / "predictions/test.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in Path("test.jsonl").read_text().splitlines()]
    assert [(p["text"], p["label"]) for p in predictions] == [(r["text"], r["label"]) for r in rows]
    for p in predictions:
        assert p["prediction"] == max(p["probabilities"], key=p["probabilities"].get)
        assert sum(p["probabilities"].values()) == pytest.approx(1)
    assert results["test"]["accuracy"] == pytest.approx(
        sum(p["label"] == p["prediction"] for p in predictions) / len(predictions)
    )
    page = (latest / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page

    text = engine("predict", "runs/tiny/latest", "--text", rows[0]["text"], "--text", rows[1]["text"])
    made = [json.loads(line) for line in text.stdout.splitlines()]
    assert [m["label"] for m in made] == [p["prediction"] for p in predictions[:2]]
    assert made[0]["probabilities"] == pytest.approx(predictions[0]["probabilities"], abs=1e-5)
    assert main(["predict", "runs/tiny/latest", "--input", "test.jsonl", "--output", "out.jsonl"]) == 0
    assert [json.loads(line)["label"] for line in Path("out.jsonl").read_text().splitlines()] == [
        p["prediction"] for p in predictions
    ]

    Path("other.csv").write_text("sentence,verdict\n" + "".join(f"{r['text']},{int(r['label'] == 'positive')}\n" for r in rows))
    capfd.readouterr()
    columns = ["data.columns.text=sentence", "data.columns.label=verdict"]
    assert main(["evaluate", "runs/tiny/latest", "--data", "other.csv", *columns, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["scores"]["accuracy"] == results["test"]["accuracy"]

    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(latest / "model"),
        AutoTokenizer.from_pretrained(latest / "model"),
    )
    assert model.config.id2label == {0: "negative", 1: "positive"}
    logits = model(**tokenizer([rows[0]["text"]], return_tensors="pt")).logits.softmax(-1)[0]
    assert dict(zip(["negative", "positive"], logits.tolist(), strict=True)) == pytest.approx(
        predictions[0]["probabilities"], abs=1e-5
    )


def test_signals_save_and_end_and_the_run_goes_on_identically(recipe: MakeRecipe) -> None:
    """Real processes: begun and stopped by SIGTERM, gone on with and stopped by SIGINT, then finished."""
    path, log = str(recipe().path), Path("stopped/log.jsonl")
    options = ["train.epochs=30", "evaluate.every=60", "checkpoint.every=60", "data.test=null"]  # long, with few syncs of the disk
    for number, code, steps, more in ((signal.SIGTERM, 143, 5, []), (signal.SIGINT, 130, 20, ["--resume"])):
        command = [*PYTHON, "finetune", path, *options, "--out", "stopped", *more]
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        deadline = time.time() + 90
        while not (log.exists() and log.read_text().count('"event": "step"') >= steps):
            assert process.poll() is None, process.communicate()
            assert time.time() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert process.returncode == code, err
        assert "go on with: --out stopped --resume" in out
        assert "Traceback" not in err
        assert not Path("stopped/metrics.json").exists()
    assert main(["finetune", path, *options, "--out", "stopped", "--resume"]) == 0
    assert main(["finetune", path, *options, "--out", "whole"]) == 0
    assert Path("stopped/model/model.safetensors").read_bytes() == Path("whole/model/model.safetensors").read_bytes()
    assert Path("stopped/metrics.json").read_bytes() == Path("whole/metrics.json").read_bytes()


def test_a_used_folder_is_not_written_over(recipe: MakeRecipe, capfd: pytest.CaptureFixture[str]) -> None:
    Path("used").mkdir()
    Path("used/mine.txt").write_text("mine")
    assert main(["finetune", str(recipe().path), "--out", "used"]) == 2
    assert "exists and is not empty" in capfd.readouterr().err
    assert os.listdir("used") == ["mine.txt"]


def test_check_layers_describe_and_recipes(recipe: MakeRecipe, capfd: pytest.CaptureFixture[str]) -> None:
    rows = make_rows(30, 3)
    rows[4] = json.loads(Path("train.jsonl").read_text().splitlines()[0])
    write_jsonl(Path("test.jsonl"), rows)
    path = str(recipe().path)
    assert main(["check", path]) == 0
    out = capfd.readouterr().out
    for said in (
        "90 rows read = 90 used + 0 dropped",
        "1 also in train",
        "6 windows x 2 epochs = 12 steps",
        "first window: loss",
        "texts of test also stand in train",
    ):
        assert said in out
    assert not [p for p in Path("runs").glob("*") if p.name != ".cache"]
    assert main(["layers", path, "tune={method: last_n, n: 1}"]) == 0
    out = capfd.readouterr().out
    assert "bert.encoder.layer.1.attention.self.query" in out
    assert "last_n: 1 of 2 blocks train" in out
    assert main(["describe", "train.clip"]) == 0
    assert "Largest norm of the whole gradient" in capfd.readouterr().out
    assert main(["describe", "train.clipp"]) == 2
    assert "did you mean 'train.clip'?" in capfd.readouterr().err
    assert main(["recipes"]) == 0
    assert "bert_sentiment" in capfd.readouterr().out
    assert main(["evaluate", "nowhere"]) == 2
    assert "no run folder" in capfd.readouterr().err


def test_debug_shows_the_traceback(recipe: MakeRecipe) -> None:
    with pytest.raises(InputError, match=r"gone.jsonl"):  # nothing catches it, so Python shows it
        main(["finetune", str(recipe().path), "data.train=gone.jsonl", "--debug"])


def test_the_makefile_refuses_what_is_no_recipe_and_no_shell_reads_the_rest(tmp_path: Path) -> None:
    """RECIPE is a plain name or a path, or make ends; OUT and its like reach the engine as one argument each, to the letter."""
    canary, seen, venv = tmp_path / "canary", tmp_path / "seen", tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").write_text('#!/bin/sh\nprintf "%s\\0" "$@" > "$SEEN"\n')
    (venv / "bin" / "python").chmod(0o755)
    (venv / "ready").touch()  # newer than setup.cfg: nothing is installed
    make = ["make", "-C", str(find.PROJECT), f"VENV={venv}"]
    environment = {**os.environ, "SEEN": str(seen)}
    hostile = [
        f"x; touch {canary}",
        f"$(touch {canary})",
        f"$(shell touch {canary})",
        f"`touch {canary}`",
        "a b",
        "x,y",
        "a\nb",
        "x)",
    ]
    for value in [*hostile, "--debug", "-x"]:
        for given in (("make", [f"RECIPE={value}"], {}), ("environment", [], {"RECIPE": value})):
            done = subprocess.run([*make, "finetune", *given[1]], capture_output=True, text=True, env=environment | given[2])
            assert done.returncode == 2, (value, given[0])
            assert "RECIPE is neither a plain name nor a recipe path" in done.stderr
    assert not seen.exists()
    for name in ("plain", "recipes/bert_sentiment.yaml", "../my-recipes/a_1.yml", "/abs/x.yaml"):
        subprocess.run([*make, "finetune", f"RECIPE={name}"], capture_output=True, check=True, env=environment)
        assert seen.read_text().split("\0")[:-1] == ["-m", "engine", "finetune", name]
    for value in [*hostile, "plain"]:
        subprocess.run([*make, "finetune", "RECIPE=r", f"OUT={value}"], capture_output=True, check=True, env=environment)
        assert seen.read_text().split("\0")[:-1] == ["-m", "engine", "finetune", "r", "--out", value]
    assert not canary.exists()
    listed = subprocess.run(["make", "-C", str(find.PROJECT)], capture_output=True, text=True).stdout
    assert "make finetune" in listed
    assert "make test" in listed
