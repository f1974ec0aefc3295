"""Masked language modelling: hide some tokens of a text and tell them from the others. So an encoder learns a language.

    the film was never dull     ->     the film was [MASK] dull     ->     logits (M, V) for the M hidden tokens

Of each example 15 % of the tokens are chosen, one at the least. Of these 80 % are replaced by [MASK], 10 % by a random
token, and 10 % stay as they are: in later use there is no [MASK], and the model must not rely on one.

Loss: the sum over the chosen tokens of  -log softmax(logits)[token].  Items are chosen tokens.

Which tokens are chosen is a pure function of (seed, epoch, example): however a window is cut, wherever a run goes on, it
hides the same ones, and others in the next epoch. In evaluation it is a function of the example alone, so that two
models are asked the same. A text that holds [MASK] itself is asked only that.

Nothing is cut: a text longer than data.max_length becomes several examples. The body computes all T tokens; the head, which
is as wide as the vocabulary, only the chosen ones.

Devlin et al. 2019, arXiv:1810.04805.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from engine import schema
from engine.blocks import Block, Example, Examples, marked
from engine.data.encode import Batch, Encoded, Vary
from engine.data.read import Row
from engine.errors import InputError
from engine.tasks._base import Base, Judged, shown_columns, sum_by_row
from engine.tasks._text import text_problem

MASK, RANDOM = 0.8, 0.1  # of the chosen tokens
FIXED = (0x3A5C, 0)  # the place of evaluation
SHOWN = 8  # texts in a report


class Options(schema.Data):
    """What of a text is hidden."""

    masked: float = Field(0.15, gt=0, lt=1, description="Share of an example's tokens to hide and to tell.")


def accuracy(right: np.ndarray, items: np.ndarray, losses: np.ndarray) -> float:
    """Hidden tokens whose likeliest guess is right."""
    return float(right.sum() / items.sum()) if items.sum() else math.nan


def perplexity(right: np.ndarray, items: np.ndarray, losses: np.ndarray) -> float:
    """exp(mean loss): among how many equally likely tokens the model chooses, so to say."""
    return float(np.exp(losses.sum() / items.sum())) if items.sum() else math.nan


class Task(Base):
    """Hidden tokens, told from the others."""

    roles: ClassVar = {"text": "required"}
    auto_class = "AutoModelForMaskedLM"
    peft_type = "FEATURE_EXTRACTION"
    pipeline_tag = "fill-mask"
    default_metrics: ClassVar = ["perplexity", "accuracy"]
    metrics: ClassVar = {"perplexity": perplexity, "accuracy": accuracy}
    answer = "filled"
    per_token = True
    tokenizer: Any = None

    # -- rows ---------------------------------------------------------------------------------------------------------

    def problem(self, row: Row, target: bool = True) -> tuple[str, str] | None:
        return text_problem(row, "text", self.columns["text"])

    def text_of(self, row: Row) -> str:
        return str(row.get(self.columns["text"], ""))

    def facts(self, rows: list[Row]) -> dict[str, Any]:
        return {"characters": sum(len(self.text_of(row)) for row in rows)}

    @classmethod
    def summary(cls, fact: dict[str, Any]) -> str:
        return f"{fact['characters']:,} characters"

    def gold(self, row: Row) -> Any:
        return self.text_of(row)

    def asked(self) -> str:
        return f"{self.options.masked if self.options else 0.15:.0%} of the tokens are hidden"

    def chance(self) -> float | None:
        return math.log(len(self.tokenizer)) if self.tokenizer else None

    # -- tokens -------------------------------------------------------------------------------------------------------

    def fingerprint(self) -> Any:
        return [self.columns]

    def encode(self, rows: list[Row], tokenizer: Any, max_length: int) -> dict[str, list[Any]]:
        """Ragged input_ids; a text of more than max_length tokens as several examples."""
        made = tokenizer(
            [self.text_of(row) for row in rows], truncation=True, max_length=max_length, return_overflowing_tokens=True
        )
        ids = [one or [tokenizer.unk_token_id or 0] for one in made["input_ids"]]
        row = list(made["overflow_to_sample_mapping"])
        asking = {r for r, one in zip(row, ids, strict=True) if tokenizer.mask_token_id in one}
        return {"input_ids": ids, "row": row, "asks": [r in asking for r in row], "truncated": [False] * len(ids)}

    def vary(self, tokenizer: Any) -> Vary:
        """Hide tokens. InputError if the tokenizer has nothing to hide them behind."""
        if tokenizer.mask_token_id is None:
            raise InputError("task: masked_lm: this model's tokenizer has no [MASK] token; it is an encoder's task")
        self.tokenizer = tokenizer
        names = ("pad_token_id", "cls_token_id", "sep_token_id", "bos_token_id", "eos_token_id", "mask_token_id")
        closed = np.unique([i for name in names if (i := getattr(tokenizer, name)) is not None])  # these are never hidden
        words = np.setdiff1d(np.arange(len(tokenizer)), [*closed, *tokenizer.all_special_ids])
        share, mask = self.options.masked if self.options else 0.15, tokenizer.mask_token_id

        def hide(batch: Batch, index: np.ndarray, place: tuple[int, int] | None) -> Batch:
            """input_ids (B, T) with some tokens hidden, labels (B, T) with these tokens and -100 elsewhere."""
            ids, labels = batch["input_ids"].numpy(), np.full(batch["input_ids"].shape, -100)
            lengths, asks = batch["attention_mask"].sum(1).tolist(), batch["asks"].tolist()
            for b, i in enumerate(index.tolist()):
                if place is None and asks[b]:
                    continue
                draw = np.random.Generator(np.random.PCG64([*(place or FIXED), i]))
                text, label = ids[b, : lengths[b]], labels[b]
                free = np.flatnonzero(~np.isin(text, closed))
                free = free if len(free) else np.arange(len(text))
                chosen = draw.permutation(free)[: max(1, round(share * len(free)))]
                label[chosen] = text[chosen]
                fate = draw.random(len(chosen))
                text[chosen[fate < MASK]] = mask
                other = chosen[(fate >= MASK) & (fate < MASK + RANDOM)]
                text[other] = draw.choice(words, len(other))
            return {**batch, "labels": torch.from_numpy(labels)}

        return hide

    # -- loss and judgement -------------------------------------------------------------------------------------------

    def items(self, batch: dict[str, Tensor]) -> int:
        """What the loss sums over: hidden tokens."""
        return int((batch["labels"] != -100).sum())

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Logits (M, V) of the hidden tokens, float32, in the order of the batch."""
        return self._logits(model, batch, batch["labels"] != -100)

    def _logits(self, model: nn.Module, batch: dict[str, Tensor], wanted: Tensor) -> Tensor:
        """Logits (M, V) at the places where `wanted` (B, T) is true."""
        with only(model, wanted) as chosen:
            logits = super().forward(model, batch)
        return logits[0] if chosen else logits[wanted]

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The SUM of the hidden tokens' cross-entropies."""
        return F.cross_entropy(self.forward(model, batch), batch["labels"][batch["labels"] != -100], reduction="sum")

    def output(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """For each token (B, T, 3): the likeliest one, its probability, the loss. Zeros where nothing was asked."""
        labels, wanted = batch["labels"], self._asked(batch)
        wanted[:, 0] |= ~wanted.any()  # a batch without a question: the head wants one token
        logits = self._logits(model, batch, wanted)  # (M, V)
        best = logits.softmax(-1).max(-1)
        losses = F.cross_entropy(logits, labels[wanted], reduction="none")  # 0 where the label is -100
        out = torch.zeros(*labels.shape, 3, device=labels.device)
        out[wanted] = torch.stack([best.indices.float(), best.values, losses], -1)
        return out

    def _asked(self, batch: dict[str, Tensor]) -> Tensor:
        """Where a token is to be told, (B, T): it was hidden here, or in the text itself."""
        return (batch["labels"] != -100) | (batch["input_ids"] == self.tokenizer.mask_token_id)

    def lower_is_better(self, name: str) -> bool:
        return name == "perplexity" or super().lower_is_better(name)

    def judge(self, outputs: list[np.ndarray], encoded: Encoded, rows: list[Row]) -> Judged:
        """Right guesses (R,), hidden tokens (R,), losses (R,)."""
        counts = np.zeros((len(encoded), 3))  # right, hidden, loss
        for i, made in enumerate(outputs):
            label = encoded.batch(np.asarray([i]))["labels"][0].numpy()
            hidden = label != -100
            counts[i] = (made[hidden, 0] == label[hidden]).sum(), hidden.sum(), made[hidden, 2].astype(np.float64).sum()
        right, items, losses = (sum_by_row(column, encoded.row, len(rows)) for column in counts.T)
        return Judged((right, items, losses), losses, items)

    def predictions(self, outputs: list[np.ndarray], encoded: Encoded, rows: list[Row]) -> list[dict[str, Any]]:
        """The text with the likeliest tokens at the hidden places; for each of them where it is, how sure, and what was hidden."""
        texts, limit = [self.text_of(row) for row in rows], int(encoded.lengths.max())
        made = self.tokenizer(
            texts, truncation=True, max_length=limit, return_overflowing_tokens=True, return_offsets_mapping=True
        )["offset_mapping"]
        found: list[list[dict[str, Any]]] = [[] for _ in rows]
        for i, (one, spans) in enumerate(zip(outputs, made, strict=True)):
            batch = encoded.batch(np.asarray([i]))
            for t in self._asked(batch)[0].nonzero().flatten().tolist():
                start, end = spans[t] if spans else (0, 0)
                if start == end:
                    continue  # a special token, of a text that has no other
                label = int(batch["labels"][0, t])
                truth = texts[encoded.row[i]][start:end] if label != -100 else None
                right = None if truth is None else bool(one[t, 0] == label)
                found[encoded.row[i]].append({
                    "start": start, "end": end, "token": self._word(max(0, int(one[t, 0]))), "probability": float(one[t, 1]),
                    "truth": truth, "right": right,
                })  # fmt: skip
        return [{"prediction": filled(text, tokens), "tokens": tokens} for text, tokens in zip(texts, found, strict=True)]

    def _word(self, token: int) -> str:
        """A token as it stands in a text."""
        return str(self.tokenizer.decode([token])).removeprefix("##").strip()

    # -- what is shown ------------------------------------------------------------------------------------------------

    header: ClassVar = [("right", "n")]

    @classmethod
    def sections(cls, detail: dict[str, Any], lines: list[dict[str, Any]]) -> list[Block]:
        note = "Green: told rightly. Red: told wrongly, with the guess behind it."
        return [Examples("Hidden tokens", cls.header, [cls.example(line) for line in lines[:SHOWN]], note)] if lines else []

    @classmethod
    def wrong(cls, line: dict[str, Any]) -> bool | None:
        return None

    @classmethod
    def mistakes(cls, lines: list[dict[str, Any]]) -> Examples | None:
        return None

    @classmethod
    def example(cls, line: dict[str, Any]) -> Example:
        spans = [
            (t["start"], t["end"], "good" if t["right"] else "bad", "" if t["right"] else t["token"])
            for t in line["tokens"]
            if t["truth"] is not None
        ]
        kept = {k: v for k, v in line.items() if k != "tokens"}
        _, other = shown_columns(kept)
        right = sum(bool(t["right"]) for t in line["tokens"])
        return Example(
            {"text": marked(line["label"], spans)},
            {k: v for k, v in other.items() if v != line["label"]},
            [f"{right} of {len(spans)}"],
        )


def filled(text: str, tokens: list[dict[str, Any]]) -> str:
    """`text` with the guesses in their places."""
    for one in sorted(tokens, key=lambda t: -t["start"]):
        text = text[: one["start"]] + one["token"] + text[one["end"] :]
    return text


@contextmanager
def only(model: Any, wanted: Tensor) -> Iterator[bool]:
    """Let the head see those tokens of the body's output (B, T, H) alone where `wanted` (B, T) is true, as (1, M, H).

    Such a head treats each token by itself, so this changes nothing but the work: V H multiplications a token, more than
    the whole body has where the model is small. Says False where the model has no body of its own.
    """
    body = getattr(model, getattr(model, "base_model_prefix", "") or " ", None)
    if body is None or body is model:
        yield False
        return

    def choose(module: nn.Module, args: Any, out: Any) -> Any:
        hidden = out.last_hidden_state
        out["last_hidden_state"] = hidden[:, -wanted.shape[1] :][wanted].unsqueeze(0)  # what a prompt put before is left out
        return out

    handle = body.register_forward_hook(choose)
    try:
        yield True
    finally:
        handle.remove()
