"""Observers: they see the loop's records and cannot steer it. A log file, a progress bar."""

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from engine import disk

Record = dict[str, Any]


class Log:
    """log.jsonl: one JSON object a line, written at once; numbers that are not finite become null.

    A resumed run cuts the file to the length that its checkpoint remembers: `keep` bytes. What came after that step is
    written again, so no line stands there twice and none is torn.
    """

    def __init__(self, path: Path, keep: int = 0):
        self.path = path
        with disk.refusing(path, 0):
            opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            self.file = os.fdopen(opened, "rb", buffering=0)  # closes itself
            self._rewind(keep)

    def __call__(self, record: Record) -> None:
        line = json.dumps({**_finite(record), "time": round(time.time(), 3)}, ensure_ascii=False) + "\n"
        with disk.refusing(self.path, len(line.encode())):
            disk.put(self.file.fileno(), line.encode())

    def sync(self) -> int:
        """Make all lines last; returns the log's length in bytes."""
        with disk.refusing(self.path, 0):
            disk.sync_file(self.file.fileno())
        return os.fstat(self.file.fileno()).st_size

    def _rewind(self, keep: int) -> None:
        content = self.file.read()
        if len(content) < keep:
            print(f"warning: {self.path}: lines before the checkpoint are missing ({len(content):,} of {keep:,} bytes are there)")
            keep = content.rfind(b"\n") + 1
        os.ftruncate(self.file.fileno(), keep)


class Quiet:
    """The log and the bar of the ranks that do not write."""

    def __call__(self, record: Record) -> None: ...

    def sync(self) -> int:
        return 0

    def close(self) -> None: ...


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_log(path: Path) -> list[Record]:
    """The records of a log, none if there is no log yet; a torn last line is left out."""
    records = []
    for line in path.read_text("utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


class Bar:
    """A tqdm bar on a terminal: loss, learning rate, tokens/s, ETA. Elsewhere only a line for each evaluation."""

    def __init__(self, steps: int, done: int, epochs: int, per_epoch: int):
        from tqdm import tqdm

        self.bar = tqdm(
            total=steps,
            initial=done,
            disable=not sys.stderr.isatty(),
            unit="step",
            dynamic_ncols=True,
            smoothing=0.1,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
        )
        self.epochs, self.per_epoch, self.steps = epochs, per_epoch, steps
        self.loss: float | None = None
        self.tokens, self.since = 0, time.perf_counter()

    def __call__(self, record: Record) -> None:
        if record["event"] in ("step", "skipped"):
            value = record["loss"]
            if math.isfinite(value):
                self.loss = value if self.loss is None else 0.9 * self.loss + 0.1 * value
            self.tokens += record["tokens"]
            rate = self.tokens / max(1e-9, time.perf_counter() - self.since)
            self.bar.set_description(f"epoch {min(self.epochs, record['epoch'] + 1)}/{self.epochs}", refresh=False)
            loss = "" if self.loss is None else f"loss {self.loss:.4f}, "
            self.bar.set_postfix_str(f"{loss}lr {record['learning_rate']:.1e}, {rate:,.0f} tok/s", refresh=False)
            self.bar.update()
            if record["event"] == "skipped":
                self.say(f"step {record['step']}: the numbers were not finite (loss {value}), twice; this step was skipped")
        elif record["event"] == "memory":
            self.say(
                f"step {record['step']}: memory ran out in {record['during']}; from now on {record['tokens']:,} tokens at once"
            )
        elif record["event"] == "replayed":
            self.say(
                f"step {record['step']}: the numbers were not finite, and were when it was replayed: chance, or faulty hardware"
            )
        elif record["event"] == "evaluation":
            scores = "  ".join(f"{k} {v:.4f}" for k, v in record.items() if isinstance(v, float))
            self.say(f"step {record['step']:>5}/{self.steps}  validation  {scores}{'  *best' if record['best'] else ''}")

    def say(self, line: str) -> None:
        from tqdm import tqdm

        tqdm.write(line, file=sys.stderr if sys.stderr.isatty() else sys.stdout)

    def close(self) -> None:
        self.bar.close()
