"""Compact vocabulary: of the table of word embeddings only the rows that the data uses take part in training.

    ids of a batch    2  417  9001       the model, its tokenizer and its data keep their ids
                      |    |     |
    place (V,)        0   31    874      -1 where a token stands in no split: asking for it is an error
                      |    |     |
    weight (U, H)     only these rows have gradients, AdamW's averages and a place in checkpoints

SST-2 uses 11,573 of BERT's 30,522 rows. The others never get a gradient; so clipping does not see them, AdamW's averages of
them stay zero, and all that a step does to them is weight decay, p <- p (1 - lr_t * decay). After T steps that is

    p  *  product over t of (1 - lr_t * decay)

one number, kept in float64, with which the rest is multiplied once, when the whole table is put together again: for model/,
for an adapter, at the end. Without weight decay these rows keep every bit; with it they differ from those of T separate
products by rounding alone (T * 6e-8 relative at the most). The rows that train see the same arithmetic as before.

Left alone: a table that does not train, one that is tied to an output layer, which needs all rows, one that has been swapped
or adapted, and one of which the data uses nearly all.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine import distributed
from engine.errors import RunError
from engine.freeze import ever_trains, moved
from engine.layers._around import replaced

WORTH = 0.9  # a larger share of used rows is not worth it


class CompactEmbedding(nn.Module):
    """In the place of an nn.Embedding (V, H): the rows `tokens` of its weight."""

    def __init__(self, old: nn.Embedding, tokens: Tensor):
        super().__init__()
        self.weight = nn.Parameter(old.weight.detach()[tokens], requires_grad=old.weight.requires_grad)  # (U, H)
        if hasattr(old.weight, "thaws"):
            self.weight.thaws = old.weight.thaws  # type: ignore[attr-defined]
        place = torch.full((old.num_embeddings,), -1, device=tokens.device)
        place[tokens] = torch.arange(len(tokens), device=tokens.device)
        pad = -1 if old.padding_idx is None else int(place[old.padding_idx])
        self.padding_idx = pad if pad >= 0 else None
        self.register_buffer("place", place, persistent=False)  # (V,)
        self.register_buffer("tokens", tokens.cpu())  # (U,) in checkpoints, which belong to these tokens
        self.register_buffer("decayed", torch.ones((), dtype=torch.float64))  # what decay has left of the other rows

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) token ids -> (B, T, H)."""
        return Lookup.apply(self.weight, self.place[ids], self.padding_idx)  # type: ignore[index,no-any-return,no-untyped-call]


class Lookup(torch.autograd.Function):
    """Rows of a weight (U, H) by their places (B, T) -> (B, T, H).

    The gradient is added where the optimizer looks for it, in float32, to the rows that were read. As F.embedding gives it, it
    would be a whole table for each micro-batch, zeros but for a few hundred rows, and in bfloat16 two. The memory of the last
    step's gradient is used again: only the rows that were read then have to be made zero, not all (a tenth of a step in bfloat16).
    """

    @staticmethod
    def forward(ctx: Any, weight: nn.Parameter, places: Tensor, padding: int | None) -> Tensor:
        ctx.weight, ctx.places, ctx.padding = weight, places, padding
        return F.embedding(places, weight)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, None, None]:  # type: ignore[override]
        weight, places = moved(ctx.weight), ctx.places.flatten()
        if weight.grad is None:
            weight.grad = _zeros(weight)
        if hasattr(weight, "used"):
            weight.used.append(places)
        weight.grad.index_add_(0, places, g.flatten(0, -2).to(weight.dtype))
        if ctx.padding is not None:
            weight.grad[ctx.padding] = 0.0
        return None, None, None


def _zeros(weight: Any) -> Tensor:
    """A gradient of zeros; `used` are the places that have been written to since. Other ranks write anywhere: theirs is new."""
    if distributed.world() > 1:
        return torch.zeros_like(weight)
    if hasattr(weight, "spare"):
        for places in weight.used:
            weight.spare.index_fill_(0, places, 0.0)
    else:
        weight.spare = torch.zeros_like(weight)
    weight.used = []
    return weight.spare  # type: ignore[no-any-return]


class Vocabulary:
    """A model whose word embeddings are compact, until `restore`. Where that would gain nothing, `path` is ""."""

    def __init__(self, model: Any, ids: Iterable[np.ndarray], special: Iterable[int]):
        self.model, self.path, self.said = model, *_why_not(model)
        if not self.path:
            return
        self.old: nn.Embedding = model.get_submodule(self.path)
        count = self.old.num_embeddings
        seen = np.zeros(count, dtype=bool)
        for flat in ids:
            seen[flat] = True
        seen[[i for i in special if i is not None and 0 <= i < count]] = True
        if seen.sum() > WORTH * count:
            self.path, self.said = "", f"the whole vocabulary trains: {seen.sum():,} of its {count:,} tokens are used"
            return
        device = self.old.weight.device
        self.tokens, self.others = (torch.from_numpy(np.flatnonzero(which)).to(device) for which in (seen, ~seen))
        self.rest = self.old.weight.detach()[self.others]  # (V - U, H)
        self.new = CompactEmbedding(self.old, self.tokens).train(self.old.training)
        replaced(model, self.path, self.new)
        self.old.weight = nn.Parameter(torch.empty(0), requires_grad=False)  # its memory is free
        self.said = f"{seen.sum():,} of {count:,} rows of the word embeddings train: the others stand in no split"

    def note_decay(self, optimizer: torch.optim.Optimizer) -> None:
        """After a step: what it has done to the rows that are not there."""
        if not self.path:
            return
        weight = moved(self.new.weight)
        group = next((g for g in optimizer.param_groups if any(p is weight for p in g["params"])), None)
        if group is not None and weight.grad is not None:  # AdamW does not touch what has no gradient
            self.new.decayed *= 1 - group["lr"] * group["weight_decay"]  # type: ignore[operator]

    @torch.no_grad()
    def restore(self) -> None:
        """The whole table in its old place; call it when the weights are float32 again."""
        if not self.path:
            return
        small = self.new.weight
        whole = torch.empty(self.old.num_embeddings, small.shape[1], dtype=small.dtype, device=small.device)
        whole[self.tokens] = small.detach()
        whole[self.others] = (self.rest * self.new.decayed.to(self.rest.device)).to(whole.dtype)  # type: ignore[operator]
        self.old.weight = nn.Parameter(whole, requires_grad=small.requires_grad)
        if hasattr(small, "thaws"):
            self.old.weight.thaws = small.thaws  # type: ignore[attr-defined]
        replaced(self.model, self.path, self.old)
        self.path = ""


def _why_not(model: Any) -> tuple[str, str]:
    """(the path of the table of word embeddings, "") where it may become compact, else ("", why not)."""
    table = model.get_input_embeddings()
    paths = [path for path, module in model.named_modules(remove_duplicate=False) if module is table]
    if type(table) is not nn.Embedding or table.max_norm is not None or table.scale_grad_by_freq or table.sparse:
        return "", f"the whole vocabulary is kept: its embeddings are a {type(table).__name__} of another kind"
    weight: Any = table.weight
    if not ever_trains(weight):
        return "", ""
    shared = [name for name, p in model.named_parameters(remove_duplicate=False) if p is weight]
    if len(paths) != 1 or len(shared) != 1:
        return "", f"the whole vocabulary trains: its embeddings are shared by {' and '.join(shared)}"
    return paths[0], ""


def check(model: nn.Module, saved: dict[str, Tensor], where: Any) -> None:
    """RunError if a checkpoint's tensors hold the rows of other tokens than this model's."""
    for path, module in model.named_modules():
        if isinstance(module, CompactEmbedding):
            tokens: Tensor = module.tokens  # type: ignore[assignment]
            if not torch.equal(saved[f"{path}.tokens"], tokens):
                raise RunError(f"{where}: it holds other tokens' embeddings than those of this data; has the tokenizer changed?")
