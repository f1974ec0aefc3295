"""Where each example's tokens stand in the file of the frozen cache, found by the tokens themselves.

    file     0 | a a | b b | c c c | d d d d d ...     row 0 is padding's; the examples of all splits, the shortest first
    batch    c c c - -                                 -> example 2 -> rows  5 6 7 0 0
             d d d d d                                    example 3          8 9 ...

What enters a block behind a frozen beginning depends on the tokens alone, so equal tokens have equal states, whichever row
or split they come from. A batch therefore brings nothing but its tokens. Keys are 64-bit hashes, sorted; what they find is
compared token by token, so a collision costs speed and never a wrong state.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.data.encode import Encoded
from engine.data.windows import fitting

INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class Places:
    """Where the tokens of each example stand in the file, found by the tokens. N examples of all splits."""

    def __init__(self, splits: list[Encoded]):
        self.splits = splits
        self.columns = [c for c in INPUTS if c in splits[0].ragged]
        self.first = np.cumsum([0, *map(len, splits)])  # number of each split's first example
        lengths = np.concatenate([s.lengths for s in splits])
        self.order = np.argsort(lengths, kind="stable")  # of the file: the shortest first, whatever the split
        self.lengths = torch.from_numpy(lengths.astype(np.int64))  # (N,)
        starts = np.empty(len(lengths), dtype=np.int64)
        starts[self.order] = 1 + np.concatenate([[0], np.cumsum(lengths[self.order])[:-1]])  # row 0 is padding's
        self.starts = torch.from_numpy(starts)  # (N,)
        self.total = 1 + int(lengths.sum())
        keys = np.fromiter((hash(self._tokens(i)) for i in range(len(lengths))), dtype=np.int64, count=len(lengths))
        self.by_key = np.argsort(keys, kind="stable")
        self.keys = keys[self.by_key]

    def locate(self, example: int) -> tuple[Encoded, int]:
        """The split and the row of an example."""
        which = int(np.searchsorted(self.first, example, side="right")) - 1
        return self.splits[which], example - int(self.first[which])

    def _tokens(self, example: int) -> bytes:
        split, row = self.locate(example)
        parts = []
        for name in self.columns:
            flat, offsets = split.ragged[name]
            parts.append(np.ascontiguousarray(flat[offsets[row] : offsets[row + 1]], dtype=np.int32).tobytes())
        return b"".join(parts)

    def find(self, given: dict[str, Any]) -> Tensor | None:
        """The examples (B,) that a padded batch of model inputs holds; None if it holds one that is not known."""
        if {n for n, v in given.items() if v is not None and not isinstance(v, bool)} != {*self.columns, "attention_mask"}:
            return None
        mask = given["attention_mask"].cpu().numpy() != 0
        lengths = mask.sum(1)
        if not np.array_equal(mask, np.arange(mask.shape[1]) < lengths[:, None]):
            return None
        columns = [given[name].cpu().numpy().astype(np.int32) for name in self.columns]  # (B, T) each
        found = []
        for i, n in enumerate(lengths):
            tokens = b"".join(column[i, :n].tobytes() for column in columns)
            key = hash(tokens)
            at = int(np.searchsorted(self.keys, key))
            if at == len(self.keys) or self.keys[at] != key or self._tokens(int(self.by_key[at])) != tokens:
                return None
            found.append(int(self.by_key[at]))
        return torch.tensor(found)

    def places(self, examples: Tensor, t: int) -> Tensor:
        """Rows of the file, (B, T); 0 where an example has ended."""
        at = self.starts[examples][:, None] + torch.arange(t)
        return at.masked_fill_(torch.arange(t) >= self.lengths[examples][:, None], 0)

    def batches(self, budget: int) -> Iterator[tuple[Encoded, np.ndarray]]:
        """All examples in the file's order, in batches of one split and one length: (split, its rows)."""
        lengths, which = self.lengths.numpy(), np.searchsorted(self.first, self.order, side="right") - 1
        ends = np.flatnonzero((np.diff(which) != 0) | (np.diff(lengths[self.order]) != 0)) + 1
        for run in np.split(self.order, ends):
            number = int(np.searchsorted(self.first, run[0], side="right")) - 1
            for part in fitting(run, lengths, budget):
                yield self.splits[number], part - self.first[number]
