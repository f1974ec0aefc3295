"""Words and tokens: which token answers for a word, and how a long document becomes windows.

    words     Blackburn            lives  in  Llanfair ...
    tokens    black   ##burn       lives  in  ll   ##an  ##fa  ##ir ...
    answers   yes     -            yes    yes yes  -     -     -          the first token of a word stands for it

Words are tokenised as one text with spaces between them, and a token belongs to the word in whose characters it ends. So
byte-level tokenizers get the space that they saw in pretraining. A word of which a tokenizer leaves nothing (a stray
variation selector, a soft hyphen) becomes its unknown token: every word has a token.

A document of more tokens than the model takes is cut at word boundaries into windows that overlap. A word that stands in
several is scored once, in the window where it has most context: the larger of its min(tokens before, tokens after).

    document   a b c d e f g h i j k l m n          capacity 8, stride 4
    window 1   a b c d e f g h                      scores a b c d e f
    window 2           e f g h i j k l              scores g h i j
    window 3                   i j k l m n          scores k l m n
"""

import unicodedata
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray
CLITICS = ("s", "re", "m", "ve", "ll", "d")  # what English hangs on a word by an apostrophe


def ideograph(c: str) -> bool:
    """Whether `c` is of a script that is written without spaces and here is a word by itself: Han, Hiragana, Katakana."""
    return "\u2e80" <= c <= "\u9fff" or "\uf900" <= c <= "\ufaff" or "\U00020000" <= c <= "\U0003ffff"


def split(text: str) -> list[tuple[int, int]]:
    """The words of a text as (start, end) in characters, punctuation marks and ideographs as words of their own.

    As newspapers' data sets part them: "Peter's" is Peter and 's; "Saint-Denis", "O'Neill", "3.5" and "U.S." stay whole.
    """
    words: list[tuple[int, int]] = []
    start = None
    for i, c in enumerate((*text, " ")):
        alone = ideograph(c) or unicodedata.category(c)[0] in "PS"
        if not c.isspace() and (not alone or (start is not None and _joins(text, start, i))):
            start = i if start is None else start
            continue
        if start is not None:
            words.append((start, i))
            start = None
        if not c.isspace():
            if c in "'’" and _clitic(text, i):
                start = i  # 's begins here
            else:
                words.append((i, i + 1))
    return words


def _clitic(text: str, i: int) -> bool:
    """Whether an apostrophe at `i` begins 's, 're ..., hung on the word before."""
    end = i + 1
    while end < len(text) and text[end].isalpha():
        end += 1
    return i > 0 and text[i - 1].isalnum() and text[i + 1 : end].lower() in CLITICS


def _joins(text: str, start: int, i: int) -> bool:
    """Whether the mark at `i` stands inside the word that began at `start`."""
    before, after = text[i - 1], text[i + 1 : i + 2]
    if text[i] == "." and i - start == 1 and before.isalpha():  # U.
        return after.isalpha() and text[i + 2 : i + 3] == "."
    if text[i] == "." and "." in text[start:i] and before.isalpha():  # U.S.
        return all(len(part) == 1 for part in text[start:i].split("."))
    if text[i] in ".,:/" and before.isdigit():
        return after.isdigit()
    if text[i] in "'’":
        return before.isalpha() and after.isalpha() and not _clitic(text, i)
    return text[i] in "-_" and before.isalnum() and after.isalnum() and not ideograph(after)


@dataclass
class Tokens:
    """One document: its tokens, and where each word's begin. W words, T tokens."""

    ids: Array  # (T,)
    starts: Array  # (W + 1,): word w is ids[starts[w] : starts[w + 1]], one token at the least


def tokenize(documents: list[list[str]], tokenizer: Any) -> list[Tokens]:
    """The tokens of each document's words, without special ones."""
    encoded = tokenizer([" ".join(words) for words in documents], add_special_tokens=False, verbose=False)
    unknown = next((i for i in (tokenizer.unk_token_id, tokenizer.pad_token_id) if i is not None), 0)
    made = []
    for words, one in zip(documents, encoded.encodings, strict=True):
        ends = np.cumsum([len(word) + 1 for word in words])  # where the word after begins
        offsets = np.asarray(one.offsets, dtype=np.int64).reshape(-1, 2)  # (T, 2)
        last = np.maximum(offsets[:, 1] - 1, offsets[:, 0])
        of = np.minimum(np.maximum.accumulate(np.searchsorted(ends, last, side="right")), len(words) - 1)  # (T,): its word
        ids = np.asarray(one.ids, dtype=np.int64)
        without = np.setdiff1d(np.arange(len(words)), of)
        if len(without):
            at = np.searchsorted(of, without)
            ids, of = np.insert(ids, at, unknown), np.insert(of, at, without)
        made.append(Tokens(ids, np.searchsorted(of, np.arange(len(words) + 1))))
    return made


@dataclass
class Window:
    """Words `first` to `last` - 1 of a document stand in it; those in `scored` are answered here."""

    first: int
    last: int
    scored: Array


def windows(starts: Array, capacity: int, stride: int) -> list[Window]:
    """The windows of a document whose words begin at tokens `starts` (W + 1,).

    A window holds at most `capacity` tokens, and shares at most `stride` with the one before. A word that is longer than a
    window counts as long as one: the rest of it is cut.
    """
    sizes = np.minimum(np.diff(starts), capacity)
    at = np.concatenate([[0], np.cumsum(sizes)])  # (W + 1,)
    count = len(sizes)
    if at[-1] <= capacity:
        return [Window(0, count, np.arange(count))]
    bounds = []
    first = last = 0
    while last < count:
        if last:
            first = max(int(np.searchsorted(at, at[last] - stride)), int(np.searchsorted(at, at[last + 1] - capacity)), first + 1)
        last = int(np.searchsorted(at, at[first] + capacity, side="right")) - 1
        bounds.append((first, last))
    context, best = np.full(count, -1.0), np.zeros(count, dtype=np.int64)
    for number, (first, last) in enumerate(bounds):
        before = at[first:last] - at[first] if first else np.full(last, np.inf)  # a document's end is no lack of context
        after = at[last] - at[first + 1 : last + 1] if last < count else np.full(last - first, np.inf)
        least = np.minimum(before, after)
        better = least > context[first:last]
        context[first:last][better], best[first:last][better] = least[better], number
    made = [Window(first, last, np.flatnonzero(best == number)) for number, (first, last) in enumerate(bounds)]
    return [window for window in made if len(window.scored)]


def special_ids(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that a tokenizer puts before and after a text: ([CLS], [SEP])."""
    one = tokenizer("a", return_special_tokens_mask=True)
    mask, ids = one["special_tokens_mask"], one["input_ids"]
    head = mask.index(0) if 0 in mask else len(mask)
    tail = mask[::-1].index(0) if 0 in mask else 0
    return ids[:head], ids[len(ids) - tail :]
