"""Several data sets as one: their splits joined, and windows of which each is drawn from one of them.

    sentiment   s s s s s s s s      windows of 2:   ss  ss  ss  ss
    topics      t t t t                              tt  tt               an epoch   ss tt ss ss tt ss
    similarity  p p                                  pp                              pp ...

Joined, an example is a number as before: first all of sentiment's, then all of topics'. A batch holds examples of one data set
alone, so a loss's items have one meaning, and says which by its column "task".

Mixing decides how many windows of an epoch are drawn from which data set, of n_k windows each:

    proportional    n_k                        every example once an epoch
    temperature     in ratios n_k ^ (1 / T)    T = 1 is proportional; the larger T, the more equal (arXiv:1907.05019)
    round_robin     each in turn               equally many of each

An epoch always has as many windows as all data sets together. A data set that gives fewer than it has goes on in the next
epoch where it stopped; one that gives more begins anew in another order. Whose turn it is, and with which examples, is a pure
function of (seed, epoch), as it is for one data set: going on in the middle is slicing.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from engine.data import encode
from engine.data.encode import Array, Batch, Encoded
from engine.data.read import Table
from engine.data.rows import Split
from engine.data.windows import Windows
from engine.errors import RowError

TURNS = 0x7A5C5  # beside the seed, for whose turn it is


@dataclass
class Splits(Split):
    """One split of several data sets: all rows, one data set after the other."""

    parts: dict[str, Split] = field(default_factory=dict)


def join(parts: dict[str, Split]) -> Splits:
    """The splits of one name as one."""
    tables = [split.table for split in parts.values()]
    rows, places = ([one for table in tables for one in getattr(table, name)] for name in ("rows", "places"))
    sources = {file: sha for table in tables for file, sha in table.sources.items()}
    dropped = sum((split.dropped for split in parts.values()), Counter())
    return Splits(Table(rows, places, sources), sum(split.read for split in parts.values()), dropped, parts)


class Joined(Encoded):
    """The tokens of several data sets: `parts` by name, and of all together what is asked of a split as a whole."""

    def __init__(self, parts: dict[str, Encoded], rows: list[int]):
        """`rows`: how many rows each data set has; examples may be more."""
        made = list(parts.values())
        flat = np.concatenate([one.ragged["input_ids"][0] for one in made])
        lengths = np.concatenate([one.lengths for one in made])
        first_row = np.cumsum([0, *rows])
        self.parts, self.first = parts, np.cumsum([0, *map(len, made)])
        self.rows = [slice(int(a), int(b)) for a, b in itertools.pairwise(first_row)]  # of each data set
        scalars = {
            "truncated": np.concatenate([one.scalars["truncated"] for one in made]),
            "row": np.concatenate([one.row + start for one, start in zip(made, first_row, strict=False)]),
            "task": np.repeat(np.arange(len(made)), [len(one) for one in made]),
        }
        reused = all(one.reused for one in made)
        super().__init__({"input_ids": (flat, np.concatenate([[0], np.cumsum(lengths)]))}, scalars, {}, reused=reused)

    def batch(self, index: Array, place: tuple[int, int] | None = None) -> Batch:
        """Examples of one data set as tensors, its own columns, and "task": its number, one for each example."""
        numbers = self.scalars["task"][index]
        number = int(numbers[0])
        assert (numbers == number).all(), "a batch is drawn from one data set"
        part = list(self.parts.values())[number]
        return {**part.batch(index - self.first[number], place), "task": torch.from_numpy(numbers)}

    def unlike(self) -> Batch:
        """Those of the data set that has the longest example."""
        return max(self.parts.values(), key=lambda one: int(one.lengths.max())).unlike()


def encoded(
    task: Any, split: Split, tokenizer: Any, max_length: int, cache: Any, interrupted: Callable[[], bool] = lambda: False
) -> Encoded:
    """A split as tokens; of several data sets each as its own task sees it, up to its own length."""
    if not isinstance(split, Splits):
        return _encoded(task, split, tokenizer, max_length, cache, interrupted)
    made = {}
    for name, one in split.parts.items():
        of = task.parts[name]
        made[name] = _encoded(of, one, tokenizer, of.options.max_length, cache, interrupted)
    return Joined(made, [len(one) for one in split.parts.values()])


def _encoded(task: Any, split: Split, tokenizer: Any, max_length: int, cache: Any, interrupted: Callable[[], bool]) -> Encoded:
    try:
        return encode.encode(task, split.table.rows, tokenizer, max_length, cache, interrupted)
    except RowError as error:
        raise error.at(split.table.places) from error


class Mixed(Windows):
    """Windows of several data sets, each drawn from one."""

    def __init__(self, encoded: Joined, items: Callable[[Batch], int], *, mixing: str, temperature: float, **how: Any):
        super().__init__(encoded, items, **how)
        self.mixing, self.names, self.first = mixing, list(encoded.parts), encoded.first
        self.sizes = np.diff(encoded.first)  # examples of each
        self.counts = np.array([math.ceil(n / self.batch_size) for n in self.sizes])  # windows that each has
        self.per_epoch = int(self.counts.sum())
        power = {"proportional": 1.0, "temperature": 1 / temperature, "round_robin": 0.0}[mixing]
        self.shares = apportion(self.per_epoch, self.counts.astype(float) ** power)  # windows that each gives an epoch

    def turns(self, epoch: int) -> Array:
        """The number of the data set that each window of the epoch is drawn from, (per_epoch,)."""
        if self.mixing == "round_robin":
            return np.arange(self.per_epoch) % len(self.shares)
        random = np.random.Generator(np.random.PCG64([self.seed, epoch, TURNS]))
        return random.permutation(np.repeat(np.arange(len(self.shares)), self.shares))

    def plan(self, epoch: int) -> list[Array]:
        """The examples of each window: those that are next in the data set whose turn it is."""
        given, orders, out = epoch * self.shares, {}, []
        for k in self.turns(epoch).tolist():
            again, number = divmod(int(given[k]), int(self.counts[k]))  # how often it began anew, and its window
            if (k, again) not in orders:
                random = np.random.Generator(np.random.PCG64([self.seed, again]))
                orders[k, again] = random.permutation(int(self.sizes[k])) + self.first[k]
            out.append(orders[k, again][number * self.batch_size : (number + 1) * self.batch_size])
            given[k] += 1
        return out

    def order(self, epoch: int) -> Array:
        """All examples of the epoch in their order."""
        return np.concatenate(self.plan(epoch))

    def unlike(self) -> list[Any]:
        """The first window of each data set."""
        plan, turns = self.plan(0), self.turns(0)
        return [self.window(plan[int(np.argmax(turns == k))]) for k in range(len(self.shares)) if (turns == k).any()]

    def said(self) -> str:
        """Whose windows an epoch has."""
        shares = ", ".join(f"{name} {n}" for name, n in zip(self.names, self.shares.tolist(), strict=True))
        return f"{self.mixing} mixing; windows of an epoch: {shares}"


def apportion(total: int, weights: Array) -> Array:
    """`total` shared out in these ratios, whole numbers, at least 1 each: the largest remainders get what is left over."""
    exact = total * weights / weights.sum()
    shares = np.maximum(1, np.floor(exact + 1e-9).astype(int))
    while shares.sum() != total:
        step = 1 if shares.sum() < total else -1
        off = step * (exact - shares)
        shares[int(np.argmax(np.where((step > 0) | (shares > 1), off, -np.inf)))] += step
    return shares
