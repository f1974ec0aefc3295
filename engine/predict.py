"""Use a finished run: score it on a file, or predict."""

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from engine import blocks, evaluate, models, optim, runs
from engine.data import encode, read, rows, several
from engine.errors import InputError, listing, nearest
from engine.fast import kernels, weights
from engine.fast.install import install
from engine.prepare import INPUTS, tell

TOKENS = 4096  # padded tokens in one forward pass
WORTHWHILE = 64  # examples; fewer are answered before the pieces of speed would be proven


def _outputs(run: runs.Run, split: rows.Split) -> tuple[Any, encode.Encoded]:
    """The run's outputs for the rows of a split, by the fast pieces that the recipe asks for and the model allows."""
    recipe = run.recipe
    device = models.device_of(recipe.train.device, recipe.where("train.device"))
    run.model.to(device)
    encoded = several.encoded(run.task, split, run.tokenizer, recipe.data.max_length, None)
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
    rows.require_columns(table, columns, f"{run.recipe.within}data.columns")
    return table


def evaluate_run(
    folder: str, data: str | None, overrides: list[str], *, as_json: bool = False, allow_code: bool = False
) -> dict[str, Any]:
    """Print (and return) the scores of a run on `data`, or on its own test split."""
    run = runs.open_run(folder, overrides, allow_code=allow_code)
    split, files, notes = _labelled_of_each(run, data) if run.task.parts else _labelled(run, data)
    made, encoded = _outputs(run, split)
    names = [n for n in run.recipe.evaluate.metrics or [] if not data or n in run.task.every_metric()] or run.task.default_metrics
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
    for note in notes:
        tell(f"note: {note}")
    for name, value in report["scores"].items():
        interval = report["intervals"].get(name)
        tell(f"  {name:<20} {value:8.4f}" + (f"   95 % [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else ""))
    for block in run.task.sections(report["detail"], evaluate.lines(run.task, scored, encoded, split.table.rows)):
        if said := blocks.printed(block):
            tell("\n" + "\n".join(said))
    return result


def _labelled(run: runs.Run, data: str | None) -> tuple[rows.Split, list[str], list[str]]:
    """(rows with their truth, their files, notes) of a file, or of the run's own test split."""
    key = f"{run.recipe.within}data.test"
    files = [data] if data else run.recipe.data.test
    if not files:
        raise InputError(f"{run.folder}: its recipe has no {key}; name a file with --data")
    table = _table(run, files, "--data" if data else key, run.task.columns, run.recipe.data.bad_rows)
    note = run.task.adapt(table.rows)
    return rows.clean(table, run.task, run.recipe.data.bad_rows), files, [note] if note else []


def _labelled_of_each(run: runs.Run, data: str | None) -> tuple[rows.Split, list[str], list[str]]:
    """The same of every task; or of the one that `data`, NAME=FILE, is for, and then the run is that one's alone."""
    name, _, file = (data or "").partition("=")
    if data and (name not in run.task.parts or not file):
        raise InputError(f"--data {data}: this run has several tasks; say whose file it is: --data {next(iter(run.task.parts))}=FILE"
                         f"{nearest(name, run.task.parts)}")  # fmt: skip
    if data:
        run.task.only(name)
    parts, files, notes = {}, [], []
    for name, part in run.task.parts.items():
        parts[name], read_from, said = _labelled(replace(run, recipe=run.recipe.part(name), task=part), file or None)
        files += read_from
        notes += [f"{name}: {note}" for note in said]
    return several.join(parts), files, notes


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
    opened: dict[str, runs.Run] = {}
    for folder in folders:
        run, _ = bases.open_unmerged(folder, shared, allow_code=allow_code)
        first = next(iter(opened.values()), run)
        (ours, base), (theirs, other) = bases.base_of(first.folder), bases.base_of(run.folder)
        if ours != theirs:
            raise InputError(
                f"--also {folder}: its base model is {other} (sha256 {theirs[:12]}...), that of {first.folder} is {base} ({ours[:12]}...);"
                f" runs are held together on one base. Ask it alone: predict {folder}"
            )
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
    if texts is not None and run.task.parts:
        own = [one for part in run.task.parts.values() if "text" in (one := part.inputs()) and "text_pair" not in one]
        if not own:
            raise InputError("--text: none of this run's tasks reads a single text; give a file with --input")
        table = read.Table(
            [{one["text"]: t for one in own} for t in texts], [f"--text {i}" for i in range(1, len(texts) + 1)], {}
        )
    elif texts is not None:
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
    """For each row its columns (without the target) and what the run says of it; of several tasks by each that can read the row."""
    if run.task.parts:
        yield from _answers_of_each(run, table)
        return
    made, encoded = _outputs(run, rows.Split(table, len(table)))
    hidden = run.task.targets() | {run.task.answer}
    for row, one in zip(table.rows, run.task.predictions(made, encoded, table.rows), strict=True):
        answer = one.pop("prediction")
        yield {**{name: value for name, value in row.items() if name not in hidden}, run.task.answer: answer, **one}


def _answers_of_each(run: runs.Run, table: read.Table) -> list[dict[str, Any]]:
    """For each row its columns, and under the name of each task that can read it what that task says."""
    parts = run.task.parts
    whose = [run.task.readers(row) for row in table.rows]
    index = {name: [i for i, names in enumerate(whose) if name in names] for name in parts}
    taken = {name: table.take(rows_of) for name, rows_of in index.items() if rows_of}
    made, encoded = _outputs(run, several.join({name: rows.Split(one, len(one)) for name, one in taken.items()}))
    read_by = {column for part in parts.values() for column in part.inputs().values()}
    hidden = {column for part in parts.values() for column in part.targets()} - read_by | set(parts)
    lines = [{name: value for name, value in row.items() if name not in hidden} for row in table.rows]
    for (name, one), outputs in zip(taken.items(), made, strict=True):
        said = parts[name].predictions(outputs, encoded.parts[name], one.rows)  # type: ignore[attr-defined]
        for i, answer in zip(index[name], said, strict=True):
            lines[i][name] = {parts[name].answer: answer.pop("prediction"), **answer}
    return lines


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
