"""Compacter: bottlenecks whose weights are sums of Kronecker products (Mahabadi et al. 2021, arXiv:2106.04647).

    W = sum_i A_i (x) (s_i t_i),  i = 1 .. n          A_i (n, n),  s_i (out / n, rank),  t_i (rank, in / n)

    A (x) B puts A[a, b] B at block (a, b):    [ A11 B  A12 B ]       n = 2: W (out, in) from four numbers
                                               [ A21 B  A22 B ]       and one block (out / 2, in / 2)

The A_i are one tensor that all bottlenecks of the model share; each has factors of rank 1 of its own, so a weight costs
(in + out) * rank numbers where an adapter's costs in * out / reduction. `t` of every `up` starts at zero: the model starts as
the pretrained one. Sites and forward pass are those of adapter.py.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from transformers.activations import ACT2FN

from engine.errors import InputError
from engine.freeze import train_only
from engine.schema import Patterns, Tune
from engine.swap import swap
from engine.tune._bottleneck import Site, check_activation, narrowed, places, width_of

STAYS = True  # a bottleneck does not fold into a plain weight: the saved model keeps its layers


class Options(Tune):
    """Placement and size."""

    placement: Literal["houlsby", "pfeiffer"] = Field(
        "houlsby", description="After attention and feed-forward, or feed-forward alone."
    )
    at: Patterns | None = Field(None, description="Paths of the projections to follow; by default those of the placement.")
    reduction: int = Field(32, ge=1, description="The bottleneck is the hidden size divided by this.")
    n: int = Field(4, ge=1, description="How many Kronecker products are summed; divides the hidden size and the bottleneck.")
    rank: int = Field(1, ge=1, description="Rank of each product's own factor.")
    activation: str = Field("gelu", description="The non-linearity between down and up.")


class Rule(nn.Module):
    """The matrices A_i that all bottlenecks share."""

    def __init__(self, n: int):
        super().__init__()
        self.A = nn.Parameter(torch.randn(n, n, n) * 0.01)  # (i, n, n)


class Kronecker(nn.Module):
    """A linear layer whose weight is sum_i A_i (x) (s_i t_i)."""

    def __init__(self, d_in: int, d_out: int, rule: Rule, rank: int, *, owner: bool = False, zero: bool = False):
        super().__init__()
        n = len(rule.A)
        if owner:
            self.rule = rule  # one place registers the shared tensor, so that it is named, saved and counted once
        self._rule = (rule,)  # all read it there; in a tuple a module is no child
        self.s = nn.Parameter(torch.empty(n, d_out // n, rank))
        self.t = nn.Parameter(torch.empty(n, rank, d_in // n))
        self.bias = nn.Parameter(torch.zeros(d_out))
        for s, t in zip(self.s, self.t, strict=True):  # each of the n matrices for itself
            nn.init.xavier_uniform_(s)
            nn.init.zeros_(t) if zero else nn.init.xavier_uniform_(t)

    def weight(self) -> Tensor:
        """W, (out, in)."""
        a = self._rule[0].A
        blocks = torch.einsum("iab,icr,ird->acbd", a, self.s, self.t)  # (n, out / n, n, in / n)
        return blocks.reshape(len(self.bias), -1)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return F.linear(x, self.weight(), self.bias)


class Compacter(Site):
    """A frozen projection, followed by a bottleneck of two Kronecker layers."""

    def __init__(self, base: nn.Module, down: Kronecker, up: Kronecker, activation: str):
        super().__init__(base, "projection")
        self.down, self.up, self.act = down, up, ACT2FN[activation]

    def update(self, x: Tensor) -> Tensor:
        """(..., H) -> (..., H)."""
        return self.up(self.act(self.down(x)))  # type: ignore[no-any-return]


def apply(model: nn.Module, options: Options, head: list[str]) -> str:
    """Put the bottlenecks in, freeze the rest but the head; returns the coverage line."""
    check_activation(options.activation)
    rule, first = Rule(options.n), True

    def build(old: nn.Module, path: str) -> nn.Module:
        nonlocal first
        width = width_of(old, path, "projection")
        narrow = narrowed(width, options.reduction)
        if width % options.n or narrow % options.n:
            raise InputError(
                f"tune.n: {options.n} must divide the hidden size {width} and the bottleneck {narrow}"
                f" (hidden size / tune.reduction = {width} / {options.reduction})"
            )
        down = Kronecker(width, narrow, rule, options.rank, owner=first)
        up = Kronecker(narrow, width, rule, options.rank, zero=True)
        first = False
        return Compacter(old, down, up, options.activation)

    done = swap(model, options.at or places(options.placement, "projection"), build, where="tune.at")
    train_only(model, [f"{s.path}.{part}" for s in done for part in ("down", "up")] + head)
    return f"compacter: {len(done)} bottlenecks ({options.placement}, H / {options.reduction}, n = {options.n})"
