"""Windows: order is pure, nothing is lost, a cut fits the budget and is the cheapest one."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.encode import Encoded
from engine.data.windows import OVERHEAD, Windows, cut, in_order


def encoded(lengths: list[int]) -> Encoded:
    flat = np.concatenate([np.full(n, i + 1) for i, n in enumerate(lengths)]).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Encoded({"input_ids": (flat, offsets)}, {"labels": np.arange(len(lengths))}, {"input_ids": 0})


def windows(lengths: list[int], batch_size: int = 4, tokens: int = 32, seed: int = 0) -> Windows:
    return Windows(encoded(lengths), lambda b: len(b["labels"]), batch_size=batch_size, tokens=tokens, seed=seed)


LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=40)


@given(LENGTHS, st.integers(1, 9), st.integers(0, 3))
def test_every_example_is_seen_once_an_epoch(lengths: list[int], batch_size: int, epoch: int) -> None:
    made = list(windows(lengths, batch_size).epoch(epoch))
    assert sorted(np.concatenate([w.rows for w in made])) == list(range(len(lengths)))
    assert [len(w.rows) for w in made[:-1]] == [batch_size] * (len(made) - 1)
    assert len(made) == windows(lengths, batch_size).per_epoch
    for w in made:
        seen = np.concatenate([b["labels"].numpy() for b in w.micro_batches])
        assert sorted(seen) == sorted(w.rows)
        assert w.items == len(w.rows)


@given(LENGTHS, st.integers(1, 9), st.integers(0, 12))
def test_skipping_is_slicing(lengths: list[int], batch_size: int, skip: int) -> None:
    whole = [w.rows.tolist() for w in windows(lengths, batch_size).epoch(1)]
    assert [w.rows.tolist() for w in windows(lengths, batch_size).epoch(1, skip)] == whole[skip:]


def test_order_depends_on_seed_and_epoch_alone() -> None:
    lengths = [5] * 50
    assert (windows(lengths).order(0) == windows(lengths, batch_size=7, tokens=99).order(0)).all()
    assert (windows(lengths).order(0) != windows(lengths).order(1)).any()
    assert (windows(lengths).order(0) != windows(lengths, seed=1).order(0)).any()


@given(st.lists(st.integers(1, 30), min_size=1, max_size=9), st.integers(8, 80))
@settings(max_examples=60)
def test_a_cut_fits_the_budget_and_no_cut_is_cheaper(lengths: list[int], budget: int) -> None:
    sizes = np.asarray(lengths)
    parts = cut(np.arange(len(sizes)), sizes, budget)
    padded = [len(p) * sizes[p].max() for p in parts]
    assert all(area <= budget or len(p) == 1 for area, p in zip(padded, parts, strict=True))
    ordered, cheapest = np.sort(sizes), None
    for ends in itertools.chain.from_iterable(itertools.combinations(range(1, len(sizes)), k) for k in range(len(sizes))):
        pieces = np.split(ordered, ends)
        areas = [len(p) * p.max() for p in pieces]
        if all(a <= budget or len(p) == 1 for a, p in zip(areas, pieces, strict=True)):
            cost = sum(areas) + OVERHEAD * len(pieces)
            cheapest = cost if cheapest is None else min(cheapest, cost)
    assert sum(padded) + OVERHEAD * len(parts) == cheapest


def test_padding_holds_no_tokens() -> None:
    batch = encoded([3, 1, 5]).batch(np.array([0, 2, 1]))
    assert batch["input_ids"].tolist() == [[1, 1, 1, 0, 0], [3, 3, 3, 3, 3], [2, 0, 0, 0, 0]]
    assert batch["attention_mask"].sum(1).tolist() == [3, 5, 1]


@pytest.mark.parametrize("tokens", [1, 16, 1000])
def test_evaluation_sees_every_example_once(tokens: int) -> None:
    seen = in_order(encoded([4, 9, 1, 7, 30, 2]), tokens)
    assert sorted(np.concatenate(seen)) == list(range(6))
