"""Tokens to windows: what one optimizer step sees, cut into micro-batches that fit the memory.

A *window* is `batch_size` examples, in an order that is a pure function of (seed, epoch). A *micro-batch* is the part
of it that goes through the model at once. The loss of the window is the sum over its micro-batches divided by the
window's items, so how a window is cut changes memory and speed and nothing else. That freedom is used: a window is
sorted by length before it is cut, so that little padding is computed.

    window of 8:   [9 23 5 6 31 8 5 12]  ->  sorted  5 5 6 8 9 | 12 23 | 31     (budget 48 padded tokens)

Because order and cut are pure functions, going on in the middle of an epoch is `epoch(n, skip=k)`: slicing.

Of several processes each takes its share of every window: sorted by length, the rows are dealt like cards, so that all
shares hold about as many tokens. A short last window may leave a rank without a row; its window has no micro-batch.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from engine.data.encode import Array, Encoded

Batch = dict[str, torch.Tensor]
OVERHEAD = 64  # padded tokens that one more forward and backward pass costs about as much as


@dataclass
class Window:
    """One optimizer step's examples: `rows` index the split, `items` is what the loss is divided by."""

    rows: Array  # of all ranks
    micro_batches: list[Batch]  # of this rank
    items: int  # of this rank
    tokens: int  # without padding, of all ranks
    epoch: int = 0


class Windows:
    """The windows of one split. `items(batch)` counts what the task's loss sums over; `rank` of `world` takes its share."""

    def __init__(
        self, encoded: Encoded, items: Callable[[Batch], int], *, batch_size: int, tokens: int, seed: int, packed: bool = False,
        places: list[str] | None = None, rank: int = 0, world: int = 1,
    ):  # fmt: skip
        self.encoded, self.items, self.batch_size, self.tokens, self.seed = encoded, items, batch_size, tokens, seed
        self.places = places  # "file:line" of each example
        self.packed = packed  # whether the model packs rows, so that padding costs nothing
        self.rank, self.world = rank, world
        self.per_epoch = math.ceil(len(encoded) / batch_size)

    def order(self, epoch: int) -> Array:
        """The permutation of the split in this epoch, (N,): a pure function of (seed, epoch)."""
        return np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(len(self.encoded))

    def plan(self, epoch: int) -> list[Array]:
        """The rows of each window of the epoch; the last one may be shorter."""
        order = self.order(epoch)
        return [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[Window]:
        """The windows of one epoch from number `skip` on."""
        for rows in self.plan(epoch)[skip:]:
            yield self.window(rows, epoch)

    def unlike(self) -> list[Window]:
        """A window of each kind that there is, for a look at what a run would do."""
        return [self.window(self.plan(0)[0])]

    def said(self) -> str:
        """Whose windows an epoch has, where there are several data sets."""
        return ""

    def window(self, rows: Array, epoch: int = 0) -> Window:
        batches = [self.encoded.batch(part, (self.seed, epoch)) for part in self.parts(rows, self.rank)]
        return Window(rows, batches, sum(map(self.items, batches)), int(self.encoded.lengths[rows].sum()), epoch)

    def parts(self, rows: Array, rank: int) -> list[Array]:
        """The micro-batches of one rank's share of a window's `rows`, as row numbers."""
        lengths = self.encoded.lengths
        if self.world > 1:
            rows = rows[np.argsort(lengths[rows], kind="stable")][rank :: self.world]
        return cut(rows, lengths[rows], self.tokens, self.packed)

    def smaller(self, window: Window) -> Window | None:
        """The same rows with half the tokens a micro-batch, the budget of all windows and ranks from now on; None if each is one row."""
        lengths = self.encoded.lengths
        parts = [lengths[part] for rank in range(self.world) for part in self.parts(window.rows, rank)]
        loads = [int(p.sum() if self.packed else len(p) * p.max()) for p in parts if len(p) > 1]
        if not loads:
            return None
        self.tokens = max(loads) // 2  # of what was computed: the budget itself may be far above it
        return self.window(window.rows, window.epoch)

    def where(self, rows: Array) -> list[str]:
        """Where examples stand, the longest first, for messages: "file:line", or their number in the split."""
        longest_first = rows[np.argsort(-self.encoded.lengths[rows], kind="stable")]
        return [self.places[i] if self.places else f"example {i}" for i in longest_first.tolist()]


def cut(rows: Array, lengths: Array, budget: int, packed: bool = False) -> list[Array]:
    """`rows` sorted by length and cut so that each part holds at most `budget` tokens: padded to its longest, or its own
    tokens alone when rows are packed.

    Among all padded cuts the cheapest is taken, by dynamic programming over the sorted lengths: cost of a part = its
    padded tokens + OVERHEAD. A single row above the budget is a part of its own.
    """
    by_length = np.argsort(lengths, kind="stable")
    sizes = lengths[by_length].astype(np.int64)
    n = len(sizes)
    if n == 0:
        return []
    if packed:
        ends, held = [n], 0
        for i in range(n - 1, -1, -1):  # from the longest down: a part is full when the next row would not fit
            if held and held + sizes[i] > budget:
                ends.append(i + 1)
                held = 0
            held += int(sizes[i])
        bounds = [0, *ends[::-1]]
        return [rows[by_length[a:b]] for a, b in itertools.pairwise(bounds)]
    best = np.zeros(n + 1, dtype=np.int64)  # best[j]: the least cost of the first j rows
    start = np.zeros(n + 1, dtype=np.int64)  # where the last part of that cut begins
    for j in range(1, n + 1):
        lowest = max(0, min(j - 1, j - budget // int(sizes[j - 1])))
        costs = best[lowest:j] + (j - np.arange(lowest, j)) * sizes[j - 1] + OVERHEAD
        start[j] = lowest + int(np.argmin(costs))
        best[j] = costs.min()
    made, j = [], n
    while j > 0:
        made.append(rows[by_length[start[j] : j]])
        j = int(start[j])
    return made[::-1]


def in_order(encoded: Encoded, tokens: int) -> list[Array]:
    """All examples once, for evaluation, as row numbers: sorted by length, cut by `tokens` padded ones."""
    return fitting(np.argsort(encoded.lengths, kind="stable"), encoded.lengths, tokens)


def fitting(by_length: Array, lengths: Array, tokens: int) -> list[Array]:
    """Rows, the shortest first, cut so that each part padded to its longest holds at most `tokens`, or is one row."""
    parts, at = [], 0
    while at < len(by_length):
        size = 1
        while at + size < len(by_length) and (size + 1) * lengths[by_length[at + size]] <= tokens:
            size += 1
        parts.append(by_length[at : at + size])
        at += size
    return parts


def describe_plan(windows: Windows, epochs: int, max_steps: int | None) -> dict[str, Any]:
    """The arithmetic of a run: windows, steps and what padding costs, from the first epoch's plan."""
    lengths = windows.encoded.lengths
    real = padded = parts = 0
    for rows in windows.plan(0):
        real += int(lengths[rows].sum())
        for part in (part for rank in range(windows.world) for part in windows.parts(rows, rank)):
            padded += int(lengths[part].sum()) if windows.packed else len(part) * int(lengths[part].max())
            parts += 1
    steps = windows.per_epoch * epochs
    return {
        "examples": len(lengths),
        "windows_per_epoch": windows.per_epoch,
        "steps": min(steps, max_steps or steps),
        "micro_batches_per_window": round(parts / windows.per_epoch, 2),
        "real_tokens": real,
        "padded_tokens": padded,
    }
