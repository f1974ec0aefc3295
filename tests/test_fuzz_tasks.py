"""Every task's reader on rows and files that nobody meant well by; a new task is held to it as soon as it has a small data set.

The law, as in test_fuzz.py: what is read is used or dropped for a reason that is counted, and what is used can be encoded; or
there is one message, with file and line, and exit code 2. Never another exception, never a hang.
"""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import write_jsonl
from test_fuzz import ANSWERS, FAULTS, TEXTS, limited
from test_tasks import TASKS, Make, bodies, case, make, prepared

from engine import prepare, recipe
from engine.__main__ import main
from engine.data import several
from engine.errors import InputError

__all__ = ["bodies", "make"]  # fixtures
FILES = 300  # of each kind and task
ALONE: list[Any] = [None, True, 0, -1, 7, 2**70, 1e300, -0.0, 0.1, "", " ", "O", "B-PER", "I-PER", "joy", "|", ", ", "[]", "{}", [], [[]], {}]


def value(draw: random.Random, depth: int = 0) -> Any:
    """Any JSON value; text is nasty."""
    kind = draw.randrange(8)
    if kind < 3 or depth > 2:
        return draw.choice(ALONE)
    if kind < 5:
        return draw.choice(TEXTS)
    if kind < 7:
        return [value(draw, depth + 1) for _ in range(draw.randrange(4))]
    keys = draw.sample(["text", "answer_start", "start", "answers", "id", "x", ""], draw.randrange(4))
    return {key: value(draw, depth + 1) for key in keys}


def inside(given: Any, draw: random.Random) -> Any:
    """The same value with one place in it replaced, doubled or gone."""
    if isinstance(given, list) and given and draw.random() < 0.8:
        i = draw.randrange(len(given))
        new = draw.choice(([], [value(draw, 2)], [given[i], given[i]], [inside(given[i], draw)]))
        return given[:i] + new + given[i + 1 :]
    if isinstance(given, dict) and given and draw.random() < 0.8:
        key = draw.choice(list(given))
        return {**given, key: inside(given[key], draw)} if draw.random() < 0.7 else {k: v for k, v in given.items() if k != key}
    if isinstance(given, int | float) and draw.random() < 0.5:
        return given + draw.choice((-1, 1, 1000, -(10**12), 0.5))
    return value(draw)


def spoilt(rows: list[dict[str, Any]], draw: random.Random) -> list[dict[str, Any]]:
    """Rows with 1 to 4 faults: of a value, within a value, a column gone or new, a row that is something else."""
    out = [dict(row) for row in rows]
    for _ in range(draw.randint(1, 4)):
        row = out[draw.randrange(len(out))]
        columns = list(row)
        fault = draw.randrange(5)
        if fault == 0 or not columns:
            row[draw.choice(("text", "tokens", "tags", "labels", "is_impossible", "id", "extra", draw.choice(TEXTS)))] = value(draw)
        elif fault == 1:
            del row[draw.choice(columns)]
        elif fault == 2:
            row[draw.choice(columns)] = value(draw)
        else:
            column = draw.choice(columns)
            row[column] = inside(row[column], draw)
    return out


def outcome(given: recipe.Recipe, tokenizer: Any) -> prepare.rows.Split | str:
    """Read, learn, clean, encode: the split, or the message. Anything else fails the law."""
    with limited(20):
        try:
            task = prepare._task(given)
            split = prepare._every_split(given, task, given.folders, [])["train"]
            encoded = several.encoded(task, split, tokenizer, given.data.max_length, None)
            assert len(encoded) >= len(split) > 0
            assert set(encoded.places(split.table.places)) == set(split.table.places)
            return split
        except InputError as error:
            return str(error)


def lawful(found: prepare.rows.Split | str, file: str) -> None:
    if isinstance(found, str):
        assert file in found
        assert not ANSWERS.search(found)
        assert found.count("\n") <= 24
    else:
        assert found.read == len(found) + sum(found.dropped.values())
        assert all(reason and n > 0 for reason, n in found.dropped.items())


@pytest.mark.parametrize("kind", ["rows", "bytes"])
@pytest.mark.parametrize("name", TASKS)
def test_what_a_task_reads_is_used_dropped_or_named(make: Make, name: str, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    one = case(name)
    own, write = getattr(one, "ENDING", ".jsonl"), getattr(one, "write", write_jsonl)
    ending = ".jsonl" if kind == "rows" else own  # rows of any JSON values, or the task's own format with its bytes spoilt
    both = {mode: make(name, f"data.train=fuzzed{ending}", "data.validation=null", "data.test=null", f"data.bad_rows={mode}")
            for mode in ("error", "drop")}  # fmt: skip
    good = one.rows(6, 1)
    write_jsonl(Path("fuzzed.jsonl"), good) if kind == "rows" else write(Path(f"fuzzed{ending}"), good)
    tokenizer = prepared(both["error"]).loaded.tokenizer
    readers = len(getattr(one, "PARTS", "."))  # multitask reads the file for each of its tasks
    raw, came = Path(f"fuzzed{ending}").read_bytes(), {"used": 0, "dropped": 0, "refused": 0}
    for number in range(FILES):
        draw = random.Random(f"{name} {kind} {number}")
        mode = draw.choice(("error", "drop"))
        if kind == "rows":
            write_jsonl(Path("fuzzed.jsonl"), spoilt(good, draw))
        else:
            Path(f"fuzzed{ending}").write_bytes(FAULTS[draw.choice(list(FAULTS))](raw, draw))
        try:
            found = outcome(both[mode], tokenizer)
            lawful(found, f"fuzzed{ending}")
            if isinstance(found, str):
                came["refused"] += 1
                if mode == "error" and "cannot be used" in found:
                    assert re.search(rf"fuzzed{re.escape(ending)}:(row )?\d+: ", found), found
            else:
                assert kind == "bytes" or found.read == len(good) * readers  # counted by the writer
                came["dropped" if found.dropped else "used"] += 1
            if number % 100 == 7:  # and from the command line
                path = both[mode].path
                options = [f"data.train=fuzzed{ending}", "data.validation=null", "data.test=null", f"data.bad_rows={mode}"]
                code, said = main(["check", str(path), *one.RECIPE, *options]), capsys.readouterr()
                assert (code, "Traceback" in said.err) == (2 if isinstance(found, str) else code, False), said.err
                assert code in (0, 2), said.err
        except BaseException as error:
            error.add_note(f"file {number}, bad_rows {mode}: {Path(f'fuzzed{ending}').read_bytes()[:600]!r}")
            raise
    print(name, kind, json.dumps(came))
    assert came["refused"] > 10
    assert came["used"] + came["dropped"] > 10
