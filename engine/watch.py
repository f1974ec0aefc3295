"""Observers: they see the loop's records and cannot steer it. A log file, a progress bar."""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any, TextIO

Record = dict[str, Any]


class Log:
    """log.jsonl: one JSON object a line, flushed at once; numbers that are not finite become null."""

    def __init__(self, path: Path, keep_until: int | None = None):
        if keep_until is not None:
            self._rewind(path, keep_until)
        self.file: TextIO = path.open("a", encoding="utf-8")

    def __call__(self, record: Record) -> None:
        self.file.write(json.dumps({**_finite(record), "time": round(time.time(), 3)}, ensure_ascii=False) + "\n")
        self.file.flush()

    @staticmethod
    def _rewind(path: Path, step: int) -> None:
        """Drop what a resumed run will write again, and a last line that was cut off."""
        kept = []
        for line in path.read_text("utf-8").splitlines() if path.exists() else []:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if record.get("step", 0) <= step and record.get("event") != "finished":
                kept.append(line + "\n")
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept), "utf-8")
        temporary.replace(path)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_log(path: Path) -> list[Record]:
    """The records of a log; a torn last line is left out."""
    records = []
    for line in path.read_text("utf-8").splitlines():
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
                self.say(f"step {record['step']}: the numbers were not finite (loss {value}); this step was skipped")
        elif record["event"] == "evaluation":
            scores = "  ".join(f"{k} {v:.4f}" for k, v in record.items() if isinstance(v, float))
            self.say(f"step {record['step']:>5}/{self.steps}  validation  {scores}{'  *best' if record['best'] else ''}")

    def say(self, line: str) -> None:
        from tqdm import tqdm

        tqdm.write(line, file=sys.stderr if sys.stderr.isatty() else sys.stdout)

    def close(self) -> None:
        self.bar.close()
