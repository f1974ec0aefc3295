"""How answers are compared and found: SQuAD's normalisation, exact match and F1, the best spans, the null threshold.

    "The Panthers' 24!"  --lower, no punctuation, no articles, one space-->  "panthers 24"

    exact match = 1 if both are the same text after that, else 0
    F1          = 2 P R / (P + R) of the shared words, as a bag:  P = shared / predicted,  R = shared / gold

Of several gold answers the best counts. A question without an answer is right exactly if nothing is predicted. These are
the rules of SQuAD's evaluate-v2.0.py (arXiv:1806.03822), which on v1.1 gives what its older script gives.

Chinese and Japanese put no spaces between words. Where the context is written so, every Han or kana character is a token
of its own, what stands between is split at spaces, all of Unicode's punctuation goes, and articles stay: the mixed
segmentation of CMRC 2018 (arXiv:1810.07366) with the bag of tokens of MLQA's and XQuAD's script (arXiv:1910.07475).
"""

import re
import string
import unicodedata
from collections import Counter
from functools import lru_cache

import numpy as np

ARTICLES = re.compile(r"\b(a|an|the)\b")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
CHARACTER = re.compile("[\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")  # kana, Han
FAR = np.float64(-1e30)  # of a span that cannot be


@lru_cache(maxsize=4096)
def without_spaces(context: str) -> bool:
    """Whether a text is written without spaces between words: a fifth or more of it is Han or kana."""
    found = 0 if context.isascii() else len(CHARACTER.findall(context))
    return found > 0 and 5 * found >= sum(not c.isspace() for c in context)


def words_of(text: str, characters: bool = False) -> list[str]:
    """The tokens that F1 counts. `characters`: each Han or kana character is one."""
    text = text.lower()
    if not characters:
        return ARTICLES.sub(" ", text.translate(NO_PUNCTUATION)).split()
    kept = "".join(c for c in text if c not in string.punctuation and not unicodedata.category(c).startswith("P"))
    return CHARACTER.sub(r" \g<0> ", kept).split()


def exact_match(predicted: str, gold: str, characters: bool = False) -> float:
    """1 if both hold the same words in the same order, else 0."""
    return float(words_of(predicted, characters) == words_of(gold, characters))


def f1(predicted: str, gold: str, characters: bool = False) -> float:
    """The bag-of-words F1, from 0 to 1; where one of both has no word, 1 if both have none."""
    p, g = words_of(predicted, characters), words_of(gold, characters)
    if not p or not g:
        return float(p == g)
    shared = sum((Counter(p) & Counter(g)).values())
    return 2 * shared / (len(p) + len(g))  # 2 P R / (P + R) with P = shared / len(p) and R = shared / len(g)


def against(predicted: str, golds: list[str], characters: bool = False) -> tuple[float, float]:
    """(exact match, F1) by the best of the gold answers; none, or none with a word in it, means that there is no answer."""
    golds = [gold for gold in golds if words_of(gold, characters)] or [""]
    return max(exact_match(predicted, g, characters) for g in golds), max(f1(predicted, g, characters) for g in golds)


def best_spans(scores: np.ndarray, usable: np.ndarray, longest: int, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The n spans i..j of one window with the highest start[i] + end[j], best first: (scores, i, j), each (<= n,).

    `scores` (T, 2) are the start and end logits. A span begins and ends at usable tokens (T,), i <= j, and holds at most
    `longest` tokens. All are compared at once: sums[i, k] = start[i] + end[i + k].
    """
    length = len(scores)
    longest = min(longest, length)
    allowed = np.where(usable[:, None], scores.astype(np.float64), FAR)  # (T, 2)
    ends = np.concatenate([allowed[:, 1], np.full(longest - 1, FAR)])
    sums = (allowed[:, :1] + np.lib.stride_tricks.sliding_window_view(ends, longest)).ravel()  # (T * longest,)
    first = sums.argmax(keepdims=True) if n == 1 else np.argpartition(-sums, min(n, len(sums)) - 1)[:n]
    first = first[np.lexsort((first, -sums[first]))]  # of equal sums the earlier one
    first = first[sums[first] > FAR / 2]
    return sums[first], first // longest, first // longest + first % longest


def best_threshold(margins: np.ndarray, answered: np.ndarray, unanswered: np.ndarray) -> float:
    """The t for which "no answer where margin > t" scores most, from the (R,) scores of either choice.

    margin = null score - score of the best span. Every t between two neighbouring margins gives the same total, so all
    totals are two cumulative sums. Of equally good ones the middle of the gap that is nearest to 0.
    """
    order = np.argsort(margins, kind="stable")
    m = margins[order]
    totals = np.concatenate([[0.0], np.cumsum(answered[order])]) + np.concatenate(
        [np.cumsum(unanswered[order][::-1])[::-1], [0.0]]
    )
    middles = np.concatenate([[m[0] - 1], (m[:-1] + m[1:]) / 2, [m[-1] + 1]])  # (R + 1,): the k lowest are answered
    possible = np.concatenate([[True], m[:-1] < m[1:], [True]])  # equal margins cannot be told apart
    good = possible & (totals >= totals[possible].max() - 1e-9)
    return float(middles[good][np.abs(middles[good]).argmin()])
