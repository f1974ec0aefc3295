"""Bfloat16 working weights beside float32 masters: the model computes in 16 bits, the optimizer moves 32.

    forward, backward      working weight, bfloat16          weight.grad, bfloat16, of one micro-batch
                                  ^                                 |  at once: added up, and dropped
    optimizer's step       master, float32      <------      master.grad, float32, of the whole window

A bfloat16 number has 8 significant bits: at 1.0 its neighbours are 0.0078 apart, and an update of 1e-5 would vanish.
So the update is made in float32, where it counts (mixed precision: Micikevicius et al. 2018, arXiv:1710.03740), and so are
the sums over micro-batches, over processes and of the norm by which gradients are clipped. After the step the masters are
copied down. Autocast, in contrast, keeps float32 weights and casts them anew in every forward pass.

A frozen weight has no use for a master, but must come back bit for bit, since model/ is saved in float32. It is split into
the bfloat16 nearest to it and what is left, the lower half of its bits, as a 16-bit whole number:

    float32 bits  =  bfloat16 bits * 65536  +  rest            rest in [-32768, 32767]

Two bytes and two bytes: no more than before; and none for the rest where the weights were made in bfloat16.

`master` stands as an attribute on the parameter. What saves, loads, freezes or sums asks `freeze.moved(parameter)`, and so
sees the float32 ones by the parameters' own names.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from engine.freeze import ever_trains

HALF = 16  # bits


def split(weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """float32 -> (the nearest bfloat16, the rest of the bits as int16; None where there is no rest). Ties go away from zero."""
    bits = weight.contiguous().view(torch.int32)
    high = (bits + (1 << (HALF - 1))) >> HALF  # the nearest multiple of 65536
    rest = (bits - (high << HALF)).to(torch.int16)
    return high.to(torch.int16).view(torch.bfloat16), rest if bool(rest.any()) else None


def join(high: Tensor, rest: Tensor | None) -> Tensor:
    """The float32 numbers that were split."""
    if rest is None:
        return high.float()
    return ((high.view(torch.int16).to(torch.int32) << HALF) + rest).view(torch.float32)


class Masters:
    """A model whose float32 parameters compute in bfloat16, until `restore`. A `kind` of float32 changes nothing."""

    def __init__(self, model: nn.Module, kind: str):
        self.working = [p for p in model.parameters() if kind == "bfloat16" and p.dtype == torch.float32]
        self.rests: dict[nn.Parameter, Tensor | None] = {}
        self.hooks: list[Any] = []
        for p in self.working:
            if ever_trains(p):
                p.master = nn.Parameter(p.data)  # type: ignore[attr-defined]
                p.data = p.data.bfloat16()
                trains = p.requires_grad  # one that thaws later takes its hook now
                self.hooks.append(p.requires_grad_(True).register_post_accumulate_grad_hook(send_up))
                p.requires_grad_(trains)
            else:
                p.data, self.rests[p] = split(p.data)
        self.trained = [p for p in self.working if hasattr(p, "master")]
        count = sum(p.numel() for p in self.trained)
        self.said = f"bfloat16 weights; {count:,} of them trained in float32" if self.working else ""

    def copy_down(self, optimizer: Any = None) -> None:
        """After a step: the working weights are the masters, rounded."""
        copy_down(self.trained)

    def restore(self) -> None:
        """The float32 parameters again: the masters, and every frozen bit as it was."""
        for hook in self.hooks:
            hook.remove()
        for p in self.working:
            p.data = p.master.data if hasattr(p, "master") else join(p.data, self.rests[p])
            p.__dict__.pop("master", None)
        self.working, self.trained, self.hooks, self.rests = [], [], [], {}


@contextmanager
def lowered(model: nn.Module, kind: str) -> Iterator[None]:
    """A model that computes in `kind` for the block: to predict as a run has evaluated."""
    masters = Masters(model, kind)
    try:
        yield
    finally:
        masters.restore()


@torch.no_grad()
def send_up(working: Tensor) -> None:
    """As soon as a working weight has its gradient: add it to the master's and drop it."""
    gradient, working.grad = working.grad, None  # first, so that none is left if memory runs out below
    master: nn.Parameter = working.master  # type: ignore[attr-defined]
    if gradient is None:  # a lookup has given it to the master itself (fast/vocabulary.py)
        return
    if master.grad is None:
        master.grad = gradient.float()
    else:
        master.grad += gradient


@torch.no_grad()
def copy_down(parameters: Any) -> None:
    """Bring the working weights among `parameters` up to their masters."""
    working = [p for p in parameters if hasattr(p, "master")]
    if working:
        torch._foreach_copy_(working, [p.master for p in working])
