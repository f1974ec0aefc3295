"""Entities as spans: tags to spans, spans to precision, recall and F1.

A tagger answers word by word; what counts is whole entities. A tag is a prefix and a type, and the scheme says what the
prefixes mean:

    word     Peter   Blackburn   saw   New     York    City    ,   Oslo    Bergen
    BIO2     B-PER   I-PER       O     B-LOC   I-LOC   I-LOC   O   B-LOC   B-LOC     every entity begins with B
    BIO1     I-PER   I-PER       O     I-LOC   I-LOC   I-LOC   O   I-LOC   B-LOC     B only parts two neighbours of one type
    IOBES    B-PER   E-PER       O     B-LOC   I-LOC   E-LOC   O   S-LOC   S-LOC     E ends one, S is one of a single word
    span     (PER, 0, 2)               (LOC, 3, 6)                 (LOC, 7, 8), (LOC, 8, 9)

IOBES goes by other letters too: BILOU (L for E, U for S) and BMES (M for I). Tags without prefixes ("plain", such as parts
of speech) are spans of one word each.

`decode` takes any sequence, also one that no scheme allows, as conlleval and seqeval's default mode do (Tjong Kim Sang and
De Meulder 2003): an I or E that continues nothing begins an entity. That is how predictions are read. Gold tags are held to
their scheme by `fault`.

An entity is right if its type and both ends are. With c right ones, p predicted and g gold ones (of a type, or of all):

    precision = c / p      recall = c / g      F1 = 2 c / (p + g)      each 0 where it would be 0 / 0

micro: counts of all types summed first (the CoNLL score); macro: the mean over the types that occur; weighted: that mean,
weighted by g. Scores depend on the sums of a sentence's counts alone, so a bootstrap over sentences adds rows of a matrix.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

Span = tuple[str, int, int]  # type, first word, the word after the last
LETTERS = {"B": "B", "I": "I", "E": "E", "S": "S", "L": "E", "U": "S", "M": "I"}  # as files write it -> as it is meant here
UNTYPED = "_"  # the type of a bare B, I, E, S, as seqeval calls it
FULL = {"BIO2": "BIO2 (an entity begins with B-)", "BIO1": "BIO1 (B- only parts neighbours of one type)",
        "IOBES": "IOBES (B- begins, I- goes on, E- ends, S- stands alone)", "plain": "tags without prefixes, a word each",
        "any": "any tags, read as seqeval does"}  # fmt: skip


@lru_cache(maxsize=65536)
def parse(tag: str) -> tuple[str, str]:
    """A tag as (prefix, type): B-PER -> ("B", "PER"); O -> ("O", ""); a tag without a prefix is a word's own: NOUN -> ("S", "NOUN")."""
    if tag == "O":
        return "O", ""
    letter, dash, kind = tag[:1], tag[1:2], tag[2:]
    if letter in LETTERS and (dash == "-" or not dash):
        return LETTERS[letter], kind or UNTYPED
    return "S", tag


def has_prefix(tag: str) -> bool:
    """Whether `tag` is O or begins with a scheme's letter: O, B-PER, S, but not NOUN."""
    return tag == "O" or (tag[:1] in LETTERS and tag[1:2] in ("-", ""))


def decode(tags: Sequence[str]) -> list[Span]:
    """The entities of one sentence, in order, by the lenient reading above."""
    spans: list[Span] = []
    start, before, of = 0, "O", ""
    for i, tag in enumerate((*tags, "O")):
        prefix, kind = parse(tag)
        goes_on = prefix in ("I", "E") and before in ("B", "I") and kind == of
        if before != "O" and not goes_on:
            spans.append((of, start, i))
        if not goes_on:
            start = i
        before, of = prefix, kind
    return spans


def scheme(sentences: Iterable[Sequence[str]]) -> str:
    """The scheme of these tags: IOBES, BIO2, BIO1 or plain.

    IOBES where an E or S stands. Else each entity's first tag votes: I for BIO1, and B where no entity of its type ends just
    before for BIO2; the majority wins, so that a few broken sentences are faults of the data and not another scheme.
    """
    letters: set[str] = set()
    prefixed = plain = first_i = first_b = 0
    for tags in sentences:
        before, of = "O", ""
        for tag in tags:
            if has_prefix(tag):
                prefixed += tag != "O"
            else:
                plain += 1
                continue
            prefix, kind = parse(tag)
            letters.add(prefix)
            if prefix != "O" and (before == "O" or kind != of):
                first_i, first_b = first_i + (prefix == "I"), first_b + (prefix == "B")
            before, of = prefix, kind
    if plain > prefixed:
        return "plain"
    if letters & {"E", "S"}:
        return "IOBES"
    return "BIO1" if first_i > first_b else "BIO2"


def fault(tags: Sequence[str], scheme: str) -> tuple[int, str] | None:
    """(word, what is wrong) of the first tag that `scheme` forbids, or None; "plain" and "any" forbid nothing."""
    if scheme in ("plain", "any"):
        return None
    before, of = "O", ""
    for i, tag in enumerate((*tags, "O")):
        prefix, kind = parse(tag)
        if not has_prefix(tag):
            return i, f"the tag '{tag}' is neither O nor a prefix and a type, such as B-{tag}"
        opened = before in ("B", "I") and (scheme == "IOBES" or kind == of)  # by the word before, for this one to go on
        if scheme == "IOBES":
            if opened and not (prefix in ("I", "E") and kind == of):
                what = f"an entity of type {of} is left open by '{tags[i - 1]}'"
                return i - 1, f"{what}; in IOBES its last word has E-, or S- if it is the only one"
            if not opened and prefix in ("I", "E"):
                return i, f"'{tag}' continues no entity; in IOBES the first word has B-, or S- if it is the only one"
        elif scheme == "BIO2" and prefix == "I" and not opened:
            after = f"'{tags[i - 1]}'" if i else "the beginning"
            return i, f"'{tag}' after {after} continues no entity; in BIO2 the first word of an entity has B-"
        elif scheme == "BIO1" and prefix == "B" and not opened:
            after = f"'{tags[i - 1]}'" if i else "the beginning"
            return i, f"'{tag}' after {after} parts no two entities; in BIO1 the first word of an entity has I- there"
        before, of = prefix, kind
    return None


def types(labels: Iterable[str]) -> list[str]:
    """The entity types that these tags can make, by the alphabet."""
    return sorted({parse(tag)[1] for tag in labels} - {""})


def counts(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]], kinds: list[str]) -> np.ndarray:
    """What each sentence adds to the scores: (N, K + 1, 3) of (right, predicted, gold).

    Rows 0 to K - 1 are entities by type; the last is words: (right tags, words, words).
    """
    of = {kind: k for k, kind in enumerate(kinds)}
    out = np.zeros((len(gold), len(kinds) + 1, 3), dtype=np.int64)
    for n, (truth, made) in enumerate(zip(gold, predicted, strict=True)):
        assert len(truth) == len(made), f"sentence {n} has {len(truth)} words and {len(made)} predicted tags"
        wanted, found = set(decode(truth)), set(decode(made))
        for column, spans in enumerate((wanted & found, found, wanted)):
            for kind, _, _ in spans:
                out[n, of[kind], column] += 1
        out[n, -1] = sum(a == b for a, b in zip(truth, made, strict=True)), len(truth), len(truth)
    return out


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, and 0 where b is 0."""
    return np.divide(a, b, out=np.zeros(np.broadcast(a, b).shape), where=b != 0)


def _prf(sums: np.ndarray) -> dict[str, np.ndarray]:
    """(..., 3) of (right, predicted, gold) -> precision, recall and F1, (...) each."""
    c, p, g = (sums[..., i].astype(np.float64) for i in range(3))
    return {"precision": _ratio(c, p), "recall": _ratio(c, g), "f1": _ratio(2 * c, p + g)}


def scores(sums: np.ndarray) -> dict[str, np.ndarray]:
    """Every metric of summed counts (..., K + 1, 3), (...) each: precision, recall, f1, the same _macro and _weighted, accuracy."""
    entities, words = sums[..., :-1, :], sums[..., -1, :]
    out = _prf(entities.sum(axis=-2))
    occurs = (entities[..., 1:].sum(axis=-1) > 0).astype(np.float64)  # (..., K): predicted or gold somewhere
    support = entities[..., 2].astype(np.float64)
    for name, each in _prf(entities).items():  # (..., K)
        out[f"{name}_macro"] = _ratio((each * occurs).sum(axis=-1), occurs.sum(axis=-1))
        out[f"{name}_weighted"] = _ratio((each * support).sum(axis=-1), support.sum(axis=-1))
    return {**out, "accuracy": _ratio(words[..., 0].astype(np.float64), words[..., 2])}


METRICS = tuple(scores(np.zeros((1, 3))))  # their names


def per_type(sums: np.ndarray, kinds: list[str]) -> dict[str, dict[str, Any]]:
    """The table of the report: precision, recall, F1, support (gold entities) and predicted ones of each type."""
    each = _prf(sums[:-1])
    return {
        kind: {
            **{name: float(values[k]) for name, values in each.items()},
            "support": int(sums[k, 2]),
            "predicted": int(sums[k, 1]),
        }
        for k, kind in enumerate(kinds)
    }
