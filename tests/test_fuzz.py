"""Data files that nobody meant well by: thousands, seeded, of every format and fault.

The law, for each file: its rows come out and the ledger balances (read = used + dropped, by reason), or one InputError
names the file. Never another exception, a hang, a raw control character, or a row that is gone without a word: what a
file holds is counted here by its own writer, not by the reader under test.
"""

import codecs
import csv
import gzip
import io
import json
import os
import random
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from conftest import SHARED, MakeRecipe, make_rows, write_jsonl

from engine import prepare
from engine.data import read, rows
from engine.errors import InputError, plain
from engine.tasks.classification import Task

FORMATS = ("jsonl", "json", "csv", "tsv", "txt", "parquet")
SECONDS = 5  # a file takes about a millisecond
NASTY = ["", " ", "\t", "nan", "NaN", "None", "null", "N/A", "0", "1", "1.0", "-1", "true", "True", "é", "e\u0301", "ﬁ", "\u200b", "\u202eabc",
         "\x1b[31mred\x1b[0m", "\x07", "\x7f\x9b2J", "\u2028", "\x85", "\ufeff", "\ufffe", "\U0001f600", "a\u0000b", "<script>alert(1)</script>", '"', '""', '"open',
         "'", ",", ";", "\t\t", "a,b", "a\nb", "a\r\nb", "a\rb", "=1+1", "$(touch canary)", "../../x", "%s%n", "{{7*7}}", "x" * 3000, "中文", "ا" * 9, "a" + "\u0301" * 60]  # fmt: skip


class Hang(BaseException):
    """No `except Exception` may swallow it."""


@contextmanager
def limited(seconds: int = SECONDS) -> Iterator[None]:
    """The block ends within `seconds`, or the test does."""

    def late(number: int, frame: FrameType | None) -> None:
        raise Hang(f"{seconds} s are over")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def naughty() -> list[str]:
    """The Big List of Naughty Strings where it is at hand, and our own."""
    path = SHARED / "data" / "blns" / "blns.json"
    return NASTY + (json.loads(path.read_text("utf-8")) if path.exists() else [])


TEXTS = naughty()


# -- well-formed files, by writers of our own -------------------------------------------------------------------------


def drawn(draw: random.Random, kind: str) -> list[dict[str, Any]]:
    """0 to 8 rows of what `kind` can hold."""
    made: list[dict[str, Any]] = []
    for _ in range(draw.choice((0, 1, 2, 3, 5, 8))):
        text: Any = draw.choice(TEXTS) if draw.random() < 0.6 else " ".join(draw.choices(["good", "bad", "film", "was"], k=3))
        label: Any = draw.choice(("a", "b", "a", "b", "b", draw.choice(TEXTS)))
        if kind in ("jsonl", "json") and draw.random() < 0.15:
            label = draw.choice((1, 1.0, True, False, None, 0, -7, 2**70, 1e300, ["a"], {"a": 1}, [[[]]]))
        if kind in ("jsonl", "json") and draw.random() < 0.05:
            text = draw.choice((None, 3, ["t"], {}))
        row = {"text": text, "label": label}
        if kind not in ("csv", "tsv", "txt", "parquet") and draw.random() < 0.2:
            row[draw.choice(TEXTS) or "k"] = draw.choice((1, None, [], {"x": [1, {"y": 2}]}, "z"))
        made.append(row)
    if kind in ("csv", "tsv", "txt"):  # a NUL is refused, which has its own cases
        made = [{k: v.replace("\0", "") for k, v in row.items()} for row in made]
    if kind == "tsv":  # without quotes there is no way to write these
        made = [{k: re.sub(r"[\t\r\n]", " ", v) for k, v in row.items()} for row in made]
    if kind == "txt":
        made = [{"text": t} for row in made if (t := re.sub(r"[\r\n]", " ", row["text"])).strip()]
    return made


def written(made: list[dict[str, Any]], kind: str, draw: random.Random) -> bytes:
    """The rows as a well-formed file, by the format's own grammar."""
    end = draw.choice(("\n", "\n", "\r\n", "\r")) if kind in ("jsonl", "csv", "txt") else "\n"
    if kind == "parquet":
        sink = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table({k: [r[k] for r in made] for k in ("text", "label")}), sink)
        return sink.getvalue()
    if kind == "jsonl":
        blank = draw.choice(("", "", end, "  " + end))
        text = "".join(json.dumps(r, ensure_ascii=draw.random() < 0.5) + end + blank for r in made)
    elif kind == "json":
        text = json.dumps(made, ensure_ascii=draw.random() < 0.5, indent=draw.choice((None, 1)))
    elif kind == "txt":
        text = "".join(r["text"] + end for r in made)
    elif kind == "csv":
        out = io.StringIO()
        writer = csv.writer(out, lineterminator=end, quoting=draw.choice((csv.QUOTE_ALL, csv.QUOTE_MINIMAL, csv.QUOTE_NONNUMERIC)))
        writer.writerows([["text", "label"], *([r["text"], r["label"]] for r in made)])
        text = out.getvalue()
    else:
        text = "\n".join(["text\tlabel", *(f"{r['text']}\t{r['label']}" for r in made)]) + "\n"
    raw = text.encode("utf-8")
    return codecs.BOM_UTF8 + raw if draw.random() < 0.1 or text.startswith("\ufeff") else raw


# -- faults -----------------------------------------------------------------------------------------------------------


def flip(raw: bytes, draw: random.Random) -> bytes:
    out = bytearray(raw or b"x")
    for _ in range(draw.randint(1, 4)):
        out[draw.randrange(len(out))] = draw.randrange(256)
    return bytes(out)


def insert(raw: bytes, draw: random.Random) -> bytes:
    at = draw.randint(0, len(raw))
    what = draw.choice((b"\0", b"\xff", b"\xed\xa0\x80", b'"', b"'", b"\r", b"\n", b"\t", b",", b"{", b"[", b"}", b"]", b"\\", b"\\ud800", b"\xef\xbb\xbf", b"\x1b[2J", b"NaN",
                        b"Infinity", b"9" * 5000, b"[" * 3000, b'{"a":' * 800, b"\n\n\n", b"null", b"\xe2\x80\xa8", b"\x85", b"\x1a", b"#", b"//", b"x" * 100_000))  # fmt: skip
    return raw[:at] + what + raw[at:]


def repeat(raw: bytes, draw: random.Random) -> bytes:
    a, b = sorted((draw.randint(0, len(raw)), draw.randint(0, len(raw))))
    return raw[:b] + raw[a:b] * draw.randint(1, 3) + raw[b:]


FAULTS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "flip": flip,
    "insert": insert,
    "repeat": repeat,
    "cut": lambda raw, draw: raw[: draw.randint(0, len(raw))],
    "remove": lambda raw, draw: raw[: (a := draw.randint(0, len(raw)))] + raw[a + draw.randint(1, 9) :],
    "noise": lambda raw, draw: draw.randbytes(draw.randint(0, 200)),
    "utf-16": lambda raw, draw: raw.decode("latin-1").encode(draw.choice(("utf-16", "utf-16-le", "utf-16-be", "utf-32"))),
    "latin-1": lambda raw, draw: raw + "ÄÖÜ".encode("latin-1"),
    "gzip": lambda raw, draw: gzip.compress(raw),
    "header": lambda raw, draw: draw.choice((b"text,text\n", b"text\n", b"label,text,\n", b",\n", b"\n", b"text;label\n", b"sep=,\n")) + raw,
    "ragged": lambda raw, draw: raw + draw.choice((b"x\n", b"a,b,c,d\n", b"a\tb\tc\n", b",,,,\n", b'"\n', b'x,"y\n', b'"a"b,c\n')),
    "two in one": lambda raw, draw: raw + raw,
    "twice a key": lambda raw, draw: raw.replace(b'"label"', b'"text"', 1),
    "trailing comma": lambda raw, draw: raw.replace(b"}", b",}", 1).replace(b"]", b",]", 1),
    "another format": lambda raw, draw: written(drawn(draw, k := draw.choice(FORMATS)), k, draw),
    "ending": lambda raw, draw: raw.rstrip(b"\n") + draw.choice((b"", b"\r", b"\n\n", b"\x1a", b" \n ")),
    "many columns": lambda raw, draw: (",".join(f"c{i}" for i in range(500)) + "\n").encode() + raw,
}
ANSWERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def outcome(path: Path, mode: str, **options: Any) -> rows.Split | str:
    """What reading and cleaning a file comes to: the split, or the message. Anything else fails the law."""
    with limited():
        try:
            table = read.read([path.name], "data.train", bad_rows=mode, **options)
            columns = {"text": "text"} if "label" not in table.rows[0] else {}
            task = Task({"text": "text", "label": "label"} | columns, ["a", "b"])
            rows.require_columns(table, {"text": "text"}, "data.columns")
            return rows.clean(table, task, mode)
        except InputError as error:
            return str(error)


def lawful(found: rows.Split | str, path: Path) -> None:
    if isinstance(found, str):
        assert path.name in found, found
        assert not ANSWERS.search(found), found
        assert found.count("\n") <= 24, found
        assert len(found) < 20_000, found[:300]
        return
    assert found.read == len(found) + sum(found.dropped.values())
    assert all(n > 0 and reason for reason, n in found.dropped.items())
    places = found.table.places
    assert len(places) == len(found) == len(set(places))
    if path.suffix != ".json":  # where many rows share a line
        numbers = [int(p.rpartition(":")[2].removeprefix("row ")) for p in places]
        assert numbers == sorted(numbers)
    for row in found.table.rows:  # what is used can be tokenised and written down again
        json.loads(json.dumps(row, ensure_ascii=False).encode(), parse_constant=lambda word: pytest.fail(f"{word} came through"))


def one_file(number: int, folder: Path) -> str:
    """Draw, write, spoil and read file `number`; returns what it came to."""
    draw = random.Random(f"fuzz {number}")
    kind = draw.choice(FORMATS)
    path = folder / f"f{number}.{kind}"
    made = drawn(draw, kind)
    if kind == "parquet":
        made = [{k: v if isinstance(v, str) else None for k, v in row.items()} for row in made]
    raw = written(made, kind, draw)
    fault = draw.choice(["none", "none", *FAULTS])
    path.write_bytes(raw if fault == "none" else FAULTS[fault](raw, draw))
    mode = draw.choice(("error", "drop"))
    try:
        found = outcome(path, mode)
        lawful(found, path)
        if fault == "none":
            if not made:
                assert isinstance(found, str), found
                assert "has no rows" in found
            else:
                table = read.read([path.name], "k")
                assert [{k: v for k, v in row.items()} for row in table.rows] == made
                if not isinstance(found, str):
                    assert found.read == len(made)
        return "error" if isinstance(found, str) else "rows"
    except BaseException as error:
        error.add_note(f"file {number}: {kind}, fault {fault}, bad_rows {mode}, {path.read_bytes()[:300]!r}")
        raise
    finally:
        path.unlink()


def fuzz(first: int, last: int, folder: Path) -> None:
    came = [one_file(i, folder) for i in range(first, last)]
    assert min(came.count("error"), came.count("rows")) > 0.1 * len(came), "the files are all good or all bad"


@pytest.mark.parametrize("part", range(10))
def test_ten_thousand_fuzzed_files_give_rows_or_one_error(tmp_path: Path, part: int) -> None:
    fuzz(1000 * part, 1000 * part + 1000, tmp_path)
