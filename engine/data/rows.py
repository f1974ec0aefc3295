"""Rows to examples: columns mapped, bad rows named or counted, splits taken apart, facts told.

No row disappears silently: rows read = rows used + rows dropped, by reason, in the log and in the report.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.data.conll import line_of
from engine.data.read import Table
from engine.errors import InputError, listing, nearest


@dataclass
class Split:
    """One cleaned split and what became of its rows."""

    table: Table
    read: int
    dropped: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.table)


def require_columns(table: Table, columns: dict[str, str], where: str) -> None:
    """Every mapped column must exist in the file; `columns` is role -> column name."""
    have: set[str] = set().union(*(row.keys() for row in table.rows[:1000]))
    source = table.places[0].rpartition(":")[0]
    problems = [
        f"{where}.{role}: {source} has no column '{name}'{nearest(name, have)}"
        for role, name in columns.items()
        if name not in have and not any(name in row for row in table.rows)
    ]
    if problems:
        raise InputError(listing(problems))


def clean(table: Table, task: Any, bad_rows: str) -> Split:
    """Keep the rows that `task.problem` finds nothing wrong with; the others stop the run or are dropped and counted."""
    good, problems, dropped = [], [], Counter(table.dropped)
    for i, row in enumerate(table.rows):
        problem = task.problem(row)
        if problem is None:
            good.append(i)
        else:
            reason, detail, *word = problem  # with the number of the word, where it is one word's
            dropped[reason] += 1
            problems.append(f"{line_of(table.places[i], word[0]) if word else table.places[i]}: {detail}")
    if problems and bad_rows == "error":
        hint = f"\n{len(problems):,} of {len(table):,} rows; mend them, or drop them with data.bad_rows=drop"
        raise InputError(listing(problems) + hint)
    if not good:
        raise InputError(f"{table.places[0].rpartition(':')[0]}: no usable row is left\n{listing(problems)}")
    return Split(table.take(good) if problems else table, len(table) + sum(table.dropped.values()), dropped)


def reasons(split: Split) -> str:
    """What was dropped: "3 empty text, 1 not JSON"."""
    return ", ".join(f"{n:,} {reason}" for reason, n in split.dropped.items())


def split_off(
    split: Split, fraction: float, strata: list[Any], seed: int, groups: list[Any] | None = None
) -> tuple[Split, Split]:
    """(the rest, `fraction` of the rows), each stratum shared out alike; a pure function of rows and seed.

    Rows of one group (None: a row alone) stay together, in the stratum of the first of them.
    """
    units: dict[Any, list[int]] = {}
    for i in range(len(split)):
        units.setdefault((i,) if groups is None or groups[i] is None else groups[i], []).append(i)
    shared: dict[Any, list[list[int]]] = {}
    for unit in units.values():
        shared.setdefault(strata[unit[0]], []).append(unit)
    order = np.random.Generator(np.random.PCG64([seed, 0x5B117]))
    taken: set[int] = set()
    for members in shared.values():
        count = round(fraction * len(members))
        taken.update(i for k in order.permutation(len(members))[:count].tolist() for i in members[k])
    if not taken or len(taken) == len(split):
        raise InputError(f"data.validation: {fraction} of {len(split)} rows leaves one side empty")
    rest = [i for i in range(len(split)) if i not in taken]
    other = split.table.take(sorted(taken))
    return Split(split.table.take(rest), split.read - len(taken), split.dropped), Split(other, len(taken))


def facts(splits: dict[str, Split], task: Any) -> dict[str, Any]:
    """What the data are like: counts, duplicates, texts that stand in two splits."""
    if task.parts:
        return _facts_of_each(splits, task)
    out: dict[str, Any] = {}
    texts = {name: [task.text_of(row) for row in split.table.rows] for name, split in splits.items()}
    for name, split in splits.items():
        out[name] = {
            "rows_read": split.read,
            "rows_used": len(split),
            "dropped": dict(split.dropped),
            "duplicates": len(texts[name]) - len(set(texts[name])),
            **task.facts(split.table.rows),
        }
        earlier = [other for other in splits if other != name and list(splits).index(other) < list(splits).index(name)]
        for other in earlier:
            both = set(texts[other])
            out[name][f"also_in_{other}"] = sum(text in both for text in texts[name])
    return out


def _facts_of_each(splits: dict[str, Any], task: Any) -> dict[str, Any]:
    """Of several data sets: their sums, and each one's own under "tasks"."""
    each = {name: facts({split: s.parts[name] for split, s in splits.items()}, part) for name, part in task.parts.items()}
    out: dict[str, Any] = {}
    for split in splits:
        of = {name: {"task": type(task.parts[name]).__module__.rpartition(".")[2], **one[split]} for name, one in each.items()}
        counted = [
            key
            for key in next(iter(of.values()))
            if key in ("rows_read", "rows_used", "duplicates") or key.startswith("also_in_")
        ]
        dropped = sum((Counter(one["dropped"]) for one in of.values()), Counter[str]())
        out[split] = {key: sum(one[key] for one in of.values()) for key in counted} | {"dropped": dict(dropped), "tasks": of}
    return out
