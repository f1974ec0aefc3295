"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv:2106.09685).

    y = W x + b  +  scaling * B A dropout(x)          scaling = alpha / r

            x (.., in) -------------> W (out, in) frozen ------> + --> y (.., out)
                 \\                                              /
                  `--> A (r, in) --> (.., r) --> B (out, r) --'

Only A and B train: r * (in + out) numbers instead of in * out. B starts at zero, so at the first step the model is
the pretrained one; A starts as a linear layer's weight does. Afterwards W + scaling * B A is a plain weight again.

    rslora   scaling = alpha / sqrt(r): a high rank no longer learns slower (Kalajdzievski 2023, arXiv:2312.03732)
    dora     the direction is adapted by LoRA and its length by a vector m of its own, for each output
             (Liu et al. 2024, arXiv:2402.09353):   W' = m * (W + scaling * B A) / |W + scaling * B A|
    quantize QLoRA: the frozen weights are held in 4 bits (nf4) or 8 (int8), see engine/layers/quantized.py; what is
             merged and saved is the quantised weight plus the update, as plain floats (arXiv:2305.14314)
    b_rate   LoRA+: B learns this many times faster than A (Hayou et al. 2024, arXiv:2402.12354)
    pissa    A and B start as the principal part of W, by its singular values (Meng et al. 2024, arXiv:2404.02948):
             B_0 A_0 = U_r S_r V_r^T / scaling; the update is scaling * (B A - B_0 A_0), which is zero at first. The paper
             takes B_0 A_0 out of W; here W stays as it is and the difference is computed, which is the same function
             and keeps the base bit-equal.

On an embedding the update of token i is scaling * B A[:, i].

The gradient of the update, written down (`LowRank`): with z = A x and g the gradient of y,

    dB = scaling g^T z        dz = scaling g B        dA = dz^T x        dx = dz A        (and g goes on to W x as it is)

Kept for it are x, which the other projections of x keep as well, and z of r numbers a token; the update itself is never a
tensor of its own, it is added up within the product.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.errors import InputError
from engine.fast import kernels
from engine.layers._around import Around, shape_of

THIN = 8  # up to this r MKL is the faster at sums over r, of 448 and of 1,024 tokens


class LowRank(torch.autograd.Function):
    """y (..., out), x (..., in), A (r, in), B (out, r) -> y + scaling x A^T B^T, of y's type."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        with torch.autocast(y.device.type, enabled=False):
            rows = x.to(y.dtype).flatten(0, -2)  # (N, in)
            z = rows @ a.T.to(y.dtype)  # (N, r)
            with thin(a):
                out = torch.addmm(y.flatten(0, -2), z, b.T.to(y.dtype), alpha=scaling)
        ctx.save_for_backward(rows, z, a, b)
        ctx.scaling, ctx.kind = scaling, x.dtype
        return out.view(y.shape)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, z, a, b = ctx.saved_tensors
        g2 = g.flatten(0, -2)
        dz = (g2 @ b.to(g.dtype)).mul_(ctx.scaling)  # (N, r)
        db = (g2.T @ z).mul_(ctx.scaling) if ctx.needs_input_grad[3] else None
        da = dz.T @ x if ctx.needs_input_grad[2] else None
        with thin(a):
            dx = (dz @ a.to(g.dtype)).view(*g.shape[:-1], -1).to(ctx.kind) if ctx.needs_input_grad[1] else None
        return g, dx, None if da is None else da.to(a.dtype), None if db is None else db.to(b.dtype), None


def thin(a: Tensor) -> AbstractContextManager[None]:
    """The context whose products suit sums over r: the fast ones are slower at so few, and each keeps code for every number of tokens."""
    return kernels.plain_products() if len(a) <= THIN else nullcontext()


class LoRALinear(Around):
    """A frozen nn.Linear (or Conv1D) with a trainable low-rank update beside it."""

    def __init__(
        self,
        base: nn.Module,
        r: int,
        alpha: float,
        dropout: float = 0.0,
        rslora: bool = False,
        dora: bool = False,
        pissa: bool = False,
    ):
        super().__init__(base)
        d_out, d_in, _ = shape_of(base)
        self.r, self.alpha = r, alpha
        self.scaling = alpha / math.sqrt(r) if rslora else alpha / r
        self.lora_A = nn.Parameter(torch.empty(r, d_in))  # (r, in)
        self.lora_B = nn.Parameter(torch.zeros(d_out, r))  # (out, r)
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.register_buffer("start_A", None)  # (r, in), (out, r): PiSSA's principal part
        self.register_buffer("start_B", None)
        if pissa:
            self._take_principal_part()
        self.dropout = nn.Dropout(dropout)
        self.magnitude = nn.Parameter(self.rows().norm(dim=1).detach().clone()) if dora else None  # (out,)

    @torch.no_grad()
    def _take_principal_part(self) -> None:
        if self.r > min(self.rows().shape):
            raise InputError(
                f"tune.r: {self.r} is more than the rank that a {tuple(self.rows().shape)} weight can have, as pissa needs"
            )
        u, s, v = torch.linalg.svd(self.rows().float(), full_matrices=False)
        root = (s[: self.r] / self.scaling).sqrt()
        self.lora_A.copy_(root[:, None] * v[: self.r])
        self.lora_B.copy_(u[:, : self.r] * root)
        self.start_A, self.start_B = self.lora_A.detach().clone(), self.lora_B.detach().clone()

    def rows(self) -> Tensor:
        """The base weight as (out, in)."""
        weight: Tensor = self.base.weight  # type: ignore[assignment]
        return weight.T if self.transposed else weight

    def delta(self) -> Tensor:
        """The update as a weight, (out, in)."""
        product = self.lora_B @ self.lora_A
        return self.scaling * (product if self.start_A is None else product - self.start_B @ self.start_A)

    def length(self) -> Tensor:
        """m / |W + scaling * B A| for each output, (out, 1); the norm counts as a constant, as the paper has it."""
        assert self.magnitude is not None
        return (self.magnitude / (self.rows() + self.delta()).norm(dim=1).detach())[:, None]

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if self.magnitude is None and self.start_A is None:
            return LowRank.apply(self.base(x), self.dropout(x), self.lora_A, self.lora_B, self.scaling)  # type: ignore[no-any-return,no-untyped-call]
        update = self.dropout(x) @ self.lora_A.T @ self.lora_B.T  # (..., out)
        if self.start_A is not None:
            update = update - x @ self.start_A.T.to(x.dtype) @ self.start_B.T.to(x.dtype)
        update = self.scaling * update
        y = self.base(x)  # (..., out)
        if self.magnitude is None:
            return y + update  # type: ignore[no-any-return]
        bias = 0.0 if self.bias is None else self.bias
        made = self.length()[:, 0] * (y - bias + update) + bias
        return made.to(y.dtype)  # type: ignore[no-any-return]

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The plain layer that computes the same. Changes the base in place."""
        base = self.plain_base()
        rows = self.rows() + self.delta()
        if self.magnitude is not None:
            rows = self.length() * rows
        base.weight.copy_(rows.T if type(base).__name__ == "Conv1D" else rows)  # type: ignore[operator]
        return base

    def for_peft(self) -> dict[str, Tensor]:
        """Tensors by the peft package's names. PiSSA's difference is written as plain LoRA of rank 2 r: [B, -B_0] [A; A_0]."""
        a: Tensor = self.lora_A
        b: Tensor = self.lora_B
        if self.start_A is not None:
            a, b = torch.cat([a, self.start_A]), torch.cat([b, -self.start_B], dim=1)
        made: dict[str, Tensor] = {"lora_A.weight": a, "lora_B.weight": b}
        return made if self.magnitude is None else {**made, "lora_magnitude_vector": self.magnitude}

    @torch.no_grad()
    def take_back(self, made: dict[str, Tensor]) -> None:
        """What `for_peft` put together, filled by now, goes back into its parts; everything else was filled in place."""
        if self.start_A is not None:
            a, b = made["lora_A.weight"], made["lora_B.weight"]
            self.lora_A.copy_(a[: self.r])
            self.start_A.copy_(a[self.r :])
            self.lora_B.copy_(b[:, : self.r])
            self.start_B.copy_(-b[:, self.r :])


class LoRAEmbedding(nn.Module):
    """A frozen nn.Embedding with a trainable low-rank update beside it. A starts at zero, B random, as in the peft package."""

    def __init__(self, base: nn.Embedding, r: int, alpha: float, rslora: bool = False):
        super().__init__()
        self.base, self.r, self.alpha = base, r, alpha
        self.scaling = alpha / math.sqrt(r) if rslora else alpha / r
        self.lora_A = nn.Parameter(torch.zeros(r, base.num_embeddings))  # (r, V)
        self.lora_B = nn.Parameter(torch.randn(base.embedding_dim, r))  # (H, r)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, H)."""
        return self.base(ids) + self.scaling * (F.embedding(ids, self.lora_A.T, self.base.padding_idx) @ self.lora_B.T)  # type: ignore[no-any-return]

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The plain embedding that computes the same. Changes the base in place."""
        self.base.weight += self.scaling * (self.lora_B @ self.lora_A).T
        return self.base

    def for_peft(self) -> dict[str, Tensor]:
        """Tensors by the peft package's names."""
        return {"lora_embedding_A": self.lora_A, "lora_embedding_B": self.lora_B}

    def take_back(self, made: dict[str, Tensor]) -> None:
        """Filled in place."""
