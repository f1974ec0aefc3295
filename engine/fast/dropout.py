"""Cheap dropout: masks by a faster generator, or windows of a pool of random numbers that is renewed bit by bit.

torch draws a Bernoulli number for every activation, on a CPU with one thread: 12 to 15 % of a step of a small BERT.

Fresh masks (train.kernels, on a CPU) are drawn anew for every activation as well: 16 bits each of numpy's SFC64, whose seed is
torch's next number. The probability is a multiple of 2^-16, within 8e-6 of the one asked
for, and what is kept is scaled by just that; so the mean is exact. It is the same distribution by another generator.

Pools (train.dropout: pool) cost less still:

    pool    0  1/q 1/q 1/q  0  1/q 1/q  0  1/q ...      q = 1 - p;  2^22 numbers or more, in the type of the activations
                    |-- window of this call --|         its beginning is drawn for each call, a multiple of 16
    y = x * window                                      the same mean and variance as nn.Dropout(p)

A window costs nothing to draw, and nothing to keep for the backward pass, since it is a view. Each window by itself is as
random as a fresh mask; two windows of one step may overlap, but not place by place, for they begin at different offsets.

The pool has 32 parts, and each step renews one: the part `step % 32`. What stands in a part is drawn from (seed, rank, part,
the step that last renewed it), and the offsets come from torch's generator, which the loop seeds from (seed, step,
micro-batch, rank). So masks are a pure function of the place, and a run that is resumed draws what it would have drawn.

Masks that share numbers are not independent, so a pool is asked for by name. Where both ways act: in every nn.Dropout, and on
CPUs in the attention of models that go through torch's scaled_dot_product_attention, which elsewhere, and in flash kernels, draws
masks of its own. Activations of more than half the pool get torch's own dropout.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine import seeds
from engine.layers._around import replaced

PARTS = 32
LEAST = 1 << 22  # numbers of a pool
ALIGN = 16  # numbers: a cache line of float32
BITS = 16  # of a fresh mask's number


def fresh(like: Tensor, p: float) -> Tensor:
    """A mask drawn anew, in the shape and type of a tensor: zeros, a share p, and 1 / (1 - p)."""
    dropped = round(p * 2**BITS)
    if like.device.type != "cpu" or dropped == 2**BITS:
        return F.dropout(torch.ones_like(like), p)
    source = np.random.SFC64(int(torch.randint(2**63 - 1, ())))
    words = source.random_raw(-(-like.numel() * BITS // 64)).view(np.int16)[: like.numel()]
    kept = torch.from_numpy(words).view(like.shape) >= dropped - 2 ** (BITS - 1)
    return kept.to(like.dtype).mul_(2**BITS / (2**BITS - dropped))


class Pool:
    """The masks of one probability, type and device."""

    def __init__(self, p: float, size: int, like: Tensor):
        self.p, self.part = p, size // PARTS
        self.generator = torch.Generator(like.device)
        with torch.inference_mode(False):
            self.numbers = torch.empty(PARTS * self.part, dtype=like.dtype, device=like.device)
        self.place: tuple[int, ...] = ()  # (seed, rank, step) that the numbers belong to
        self.drawn: list[tuple[int, ...]] = [()] * PARTS  # and what each part was drawn from

    def mask(self, x: Tensor) -> Tensor:
        """A window of the shape of x."""
        self.renew()
        n = x.numel()
        at = int(torch.randint((len(self.numbers) - n) // ALIGN + 1, ())) * ALIGN  # on the host: no device waits
        return self.numbers[at : at + n].view(x.shape)

    @torch.no_grad()
    def renew(self) -> None:
        """Bring every part to the present step. From one step to the next only the part `step % PARTS` is drawn anew."""
        seed, step, _, rank = (*seeds.place, 0, 0, 0, 0)[:4]
        if self.place == (seed, rank, step):
            return
        self.place = (seed, rank, step)
        for k in range(PARTS):
            turn = step - (step - k) % PARTS + PARTS  # the last step that renewed part k, counted from PARTS: it may be before 0
            if self.drawn[k] != (seed, rank, k, turn):
                self.drawn[k] = (seed, rank, k, turn)
                self.generator.manual_seed(seeds.derive(*self.drawn[k]))
                fresh = torch.empty(self.part, device=self.numbers.device).bernoulli_(1 - self.p, generator=self.generator)
                self.numbers[k * self.part : (k + 1) * self.part] = fresh / (1 - self.p)


class Pools:
    """The pools of a model, each made when it is first needed."""

    def __init__(self, size: int):
        self.size = -(-max(LEAST, size) // (PARTS * ALIGN)) * PARTS * ALIGN
        self.made: dict[tuple[float, torch.dtype, torch.device], Pool] = {}

    def drop(self, x: Tensor, p: float) -> Tensor:
        """x with a share p of its numbers set to zero and the others scaled by 1 / (1 - p)."""
        return F.dropout(x, p) if self.too_large(x) or p == 1.0 else x * self.mask(x, p)

    def too_large(self, x: Tensor) -> bool:
        return 2 * x.numel() > self.size

    def mask(self, x: Tensor, p: float) -> Tensor:
        """Zeros, a share p, and 1 / (1 - p), in the shape and type of x; not for a `too_large` x."""
        key = (p, x.dtype, x.device)
        if key not in self.made:
            self.made[key] = Pool(p, self.size, x)
        return self.made[key].mask(x)


class PoolDropout(nn.Dropout):
    """nn.Dropout with masks from a pool; in eval mode it does nothing, as that does."""

    def __init__(self, p: float, pools: Pools):
        super().__init__(p)
        self.pools = pools

    def forward(self, x: Tensor) -> Tensor:
        return self.pools.drop(x, self.p) if self.training and self.p else x


class FreshDropout(nn.Dropout):
    """nn.Dropout with fresh masks; in eval mode it does nothing, as that does."""

    def forward(self, x: Tensor) -> Tensor:
        return x * fresh(x, self.p) if self.training and self.p else x


class Dropouts:
    """A model whose nn.Dropouts draw from pools, or fresh masks, until `restore`. A `kind` of exact, not `fast`, changes nothing.

    `activations`: about how many numbers the largest dropped tensor has; the pool is made twice as large.
    """

    def __init__(self, model: Any, kind: str, activations: int, fast: bool = False):
        self.model, self.said = model, ""
        wanted = kind == "pool" or (fast and next(model.parameters()).device.type == "cpu")
        paths = [path for path, m in model.named_modules() if wanted and type(m) is nn.Dropout and m.p > 0]
        self.old: dict[str, nn.Dropout] = {path: model.get_submodule(path) for path in paths}
        if not paths:
            return
        pools = Pools(2 * activations) if kind == "pool" else None
        for path, old in self.old.items():
            new = PoolDropout(old.p, pools) if pools else FreshDropout(old.p)
            replaced(model, path, new.train(old.training))
        if pools:
            self.said = f"dropout by windows of a pool of {pools.size:,} numbers in {len(paths)} places"

    def restore(self) -> None:
        """The model's own dropout again."""
        for path, old in self.old.items():
            replaced(self.model, path, old.train(self.model.get_submodule(path).training))
        self.old = {}
