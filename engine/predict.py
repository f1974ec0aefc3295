"""Use a finished run: score it on a file, or predict."""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from engine import blocks, evaluate, models, optim, runs
from engine.data import encode, read, rows
from engine.errors import InputError, listing
from engine.fast import kernels, weights
from engine.fast.install import install
from engine.prepare import INPUTS, tell

TOKENS = 4096  # padded tokens in one forward pass
WORTHWHILE = 64  # examples; fewer are answered before the pieces of speed would be proven


def _outputs(run: runs.Run, table_rows: list[read.Row]) -> tuple[Any, encode.Encoded]:
    """The run's outputs for the rows, by the fast pieces that the recipe asks for and the model allows."""
    recipe = run.recipe
    device = models.device_of(recipe.train.device, recipe.where("train.device"))
    run.model.to(device)
    encoded = encode.encode(run.task, table_rows, run.tokenizer, recipe.data.max_length, None)
    if len(encoded) >= WORTHWHILE:
        install(run.model, recipe, {k: v.to(device) for k, v in encoded.unlike().items() if k in INPUTS}, trains=False)
    autocast = optim.autocast(optim.precision(recipe.train.precision, device), device)
    with kernels.fast_kernels(device, recipe.train.kernels), weights.lowered(run.model, recipe.train.weights):
        return evaluate.outputs(run.model, run.task, encoded, tokens=TOKENS, device=device, autocast=autocast), encoded


def _table(run: runs.Run, files: list[str], where: str, columns: dict[str, str], bad_rows: str) -> read.Table:
    data = run.recipe.data
    table = read.read(
        files, where, folders=run.recipe.folders, format=data.format, names=data.names, quoting=data.quoting, bad_rows=bad_rows
    )
    rows.require_columns(table, columns, "data.columns")
    return table


def evaluate_run(
    folder: str, data: str | None, overrides: list[str], *, as_json: bool = False, allow_code: bool = False
) -> dict[str, Any]:
    """Print (and return) the scores of a run on `data`, or on its own test split."""
    run = runs.open_run(folder, overrides, allow_code=allow_code)
    files = [data] if data else run.recipe.data.test
    if not files:
        raise InputError(f"{run.folder}: its recipe has no data.test; name a file with --data")
    table = _table(run, files, "--data" if data else "data.test", run.task.columns, run.recipe.data.bad_rows)
    note = run.task.adapt(table.rows)
    split = rows.clean(table, run.task, run.recipe.data.bad_rows)
    made, encoded = _outputs(run, split.table.rows)
    names = run.recipe.evaluate.metrics or run.task.default_metrics
    run.task.check(names, "evaluate.metrics")
    scored = evaluate.score(run.task, made, encoded, split.table.rows, names)
    report = evaluate.report(run.task, scored, names, run.recipe.evaluate.bootstrap)
    result = {"data": files, "rows_read": split.read, "rows": len(split), "dropped": dict(split.dropped), **report}
    if as_json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
        return result
    tell(
        f"{run.folder} on {', '.join(files)}: {len(split):,} rows"
        + (f" of {split.read:,} read; dropped: {rows.reasons(split)}" if split.dropped else "")
    )
    if note:
        tell(f"note: {note}")
    for name, value in report["scores"].items():
        interval = report["intervals"].get(name)
        tell(f"  {name:<20} {value:8.4f}" + (f"   95 % [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else ""))
    for block in run.task.sections(report["detail"], evaluate.lines(run.task, scored, encoded, split.table.rows)):
        if said := blocks.printed(block):
            tell("\n" + "\n".join(said))
    return result


def predict_run(
    folder: str,
    texts: list[str] | None,
    source: str | None,
    output: str | None,
    overrides: list[str],
    *,
    also: list[str] | None = None,
    allow_code: bool = False,
) -> None:
    """JSON lines: the input's columns and the answer: label and probabilities, value, entities, text, by task.

    With `also`, each row is answered by every one of the runs, which are held as adapters on one copy of the base weights.
    """
    if also:
        opened = _several([folder, *also], allow_code)
    else:
        opened = {"": runs.open_run(folder, overrides, allow_code=allow_code)}
    tables = {name: _inputs(run, texts, source) for name, run in opened.items()}
    answers = {name: list(_answers(run, tables[name])) for name, run in opened.items()}
    with _sink(output) as file:
        for lines in zip(*answers.values(), strict=True):
            for name, line in zip(answers, lines, strict=True):
                file.write(json.dumps({"run": name, **line} if name else line, ensure_ascii=False, default=str) + "\n")


def _several(folders: list[str], allow_code: bool) -> dict[str, runs.Run]:
    """Runs by their folders' names, as adapters on one base."""
    from engine import bases

    shared: dict[str, Any] = {}
    opened = {}
    for folder in folders:
        run, _ = bases.open_unmerged(folder, shared, allow_code=allow_code)
        opened[str(run.folder)] = run
    every = [p for run in opened.values() for p in run.model.parameters()]
    held = sum(p.numel() for p in {id(p): p for p in every}.values())
    print(
        f"{len(opened)} runs on one base: {held:,} parameters in memory instead of {sum(p.numel() for p in every):,}",
        file=sys.stderr,
    )
    return opened


def _inputs(run: runs.Run, texts: list[str] | None, source: str | None) -> read.Table:
    """The rows to predict, all of them usable."""
    inputs = run.task.inputs()
    if texts is not None:
        if "text" not in inputs:
            raise InputError(f"--text: this run reads {' and '.join(inputs)}; give them as a file with --input")
        if "text_pair" in inputs:
            raise InputError("--text: this run reads pairs of texts; give them as a file with --input")
        table = read.Table([{inputs["text"]: t} for t in texts], [f"--text {i}" for i in range(1, len(texts) + 1)], {})
    else:
        table = _table(run, [str(source)], "--input", {}, "error")  # one answer for each row, or none at all
        rows.require_columns(table, run.task.inputs(set().union(*table.rows)), "data.columns")
    problems = [f"{place}: {problem[1]}" for place, row in zip(table.places, table.rows, strict=True)
                if (problem := run.task.problem(row, target=False))]  # fmt: skip
    if problems:
        raise InputError(listing(problems))
    return table


def _answers(run: runs.Run, table: read.Table) -> Iterator[dict[str, Any]]:
    """For each row its columns (without the target) and what the run says of it."""
    made, encoded = _outputs(run, table.rows)
    hidden = run.task.targets() | {run.task.answer}
    for row, one in zip(table.rows, run.task.predictions(made, encoded, table.rows), strict=True):
        answer = one.pop("prediction")
        yield {**{name: value for name, value in row.items() if name not in hidden}, run.task.answer: answer, **one}


@contextlib.contextmanager
def _sink(output: str | None) -> Iterator[TextIO]:
    """Standard output, or a file that appears whole."""
    if output is None:
        yield sys.stdout
        return
    path = Path(output)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            yield file
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"--output {output}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)
