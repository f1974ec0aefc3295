"""Attention on a CPU, a few rows at a time, so that scores stay in the cache.

    for some rows:   S = scaling Q K^T + bias       (heads, M, C) each          bias: 0 where one may look, else the least number
                     P = softmax(S)                 is kept for the gradient
                     O = (P * mask) V               mask: dropout's, 0 or 1 / (1 - p)

    backward:        dV = (P * mask)^T dO           dP = (dO V^T) * mask
                     dS = P (dP - sum(dP P))        dQ = scaling dS K,  dK = scaling dS^T Q

It is the formula and nothing else (Vaswani et al. 2017, arXiv:1706.03762), with the gradient written down beside it. What is
gained on a CPU: torch computes attention with dropout in a dozen passes over all scores at once, which fall out of the cache,
with a softmax that looks for rows without any place to look at (there are none here); and its kernel without dropout is slowed
down tenfold by oneDNN's float32 products (engine/fast/kernels.py). Here those take the large products, at twice MKL's rate; for
the small ones of packed rows, whose shapes are many, building the kernels would take longer than they save.

`attention` stands in transformers' registry as NAME. Everything unusual (another device, shared keys, a bias by position,
causality without a mask) is left to torch.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from engine.fast import kernels
from engine.fast.dropout import PoolDropout, fresh
from engine.fast.proof import TOLERANCE, Proof

NAME = "rows_sdpa"
CACHE = 1 << 19  # scores computed at a time: 2 MB of float32
LARGE = 1 << 14  # scores of one head in one row, from which on oneDNN's products are the faster ones
Draw = Callable[[Tensor], Tensor]  # like a tensor: a mask of its shape, 0 or 1 / (1 - p)


class Attention(torch.autograd.Function):
    """query (R, heads, M, D), key and value (R, heads, C, D), bias (R or 1, 1, M, C) or None -> (R, heads, M, D)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scaling: float, draw: Draw | None) -> Tensor:
        q = q * scaling
        out, keeps, masks = torch.empty_like(q), any(ctx.needs_input_grad), []
        kept = q.new_empty(*q.shape[:3], k.shape[2]) if keeps else None  # P
        with products(q, k), torch.autocast(q.device.type, enabled=False):
            for i in some_rows(q, k):
                scores = flat(q[i]) @ flat(k[i]).transpose(1, 2)  # (rows * heads, M, C)
                if bias is not None:
                    scores.view(-1, *q.shape[1:3], k.shape[2]).add_(bias[i] if len(bias) > 1 else bias)
                p = torch.softmax(scores, -1, out=None if kept is None else flat(kept[i]))  # type: ignore[call-overload]
                if draw is not None:
                    masks.append(draw(p))
                    p = p * masks[-1]
                torch.bmm(p, flat(v[i]), out=flat(out[i]))
        if kept is not None:
            ctx.save_for_backward(q, k, v, kept, *masks)
            ctx.scaling = scaling
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, kept, *masks = ctx.saved_tensors
        g = g.contiguous()
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        with products(q, k), torch.autocast(q.device.type, enabled=False):
            for number, i in enumerate(some_rows(q, k)):
                p, mask = flat(kept[i]), masks[number] if masks else None
                torch.bmm((p if mask is None else p * mask).transpose(1, 2), flat(g[i]), out=flat(dv[i]))
                dp = flat(g[i]) @ flat(v[i]).transpose(1, 2)  # (rows * heads, M, C)
                ds = torch._softmax_backward_data(dp if mask is None else dp.mul_(mask), p, -1, p.dtype)
                torch.bmm(ds, flat(k[i]), out=flat(dq[i]))
                torch.bmm(ds.transpose(1, 2), flat(q[i]), out=flat(dk[i]))  # q is scaled already
        return dq.mul_(ctx.scaling), dk, dv, None, None, None


def flat(x: Tensor) -> Tensor:
    """(rows, heads, ...) -> (rows * heads, ...), a view."""
    return x.view(-1, *x.shape[2:])


def products(q: Tensor, k: Tensor) -> AbstractContextManager[None]:
    """The context whose products suit scores of this size."""
    return contextlib.nullcontext() if q.shape[2] * k.shape[2] >= LARGE else kernels.plain_products()


def some_rows(q: Tensor, k: Tensor) -> Iterator[slice]:
    """As many rows at a time as the cache holds the scores of."""
    step = max(1, CACHE // (q.shape[1] * q.shape[2] * k.shape[2]))
    for i in range(0, len(q), step):
        yield slice(i, i + step)


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, **more: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """transformers' attention interface: (R, heads, M or C, D) -> (R, M, heads, D), no weights."""
    pools = next((child.pools for child in module.children() if isinstance(child, PoolDropout)), None)
    causal = more.get("is_causal") if more.get("is_causal") is not None else getattr(module, "is_causal", True)
    other = more.get("position_bias") is not None or query.shape[1] != key.shape[1] or (attention_mask is None and causal)
    if query.device.type != "cpu" or other or not (kernels.active() or (pools and dropout)):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **more)  # type: ignore[no-any-return,no-untyped-call]
    draw: Draw | None = None
    if dropout:
        draw = (lambda p: pools.mask(p, dropout)) if pools else (lambda p: fresh(p, dropout))
    out: Tensor = Attention.apply(  # type: ignore[no-untyped-call]
        query.contiguous(), key.contiguous(), value.contiguous(), bias_of(attention_mask, query.dtype),
        query.shape[-1] ** -0.5 if scaling is None else scaling, draw,
    )  # fmt: skip
    return out.transpose(1, 2), None  # (R, M, heads, D)


def bias_of(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What is added to the scores; made once for a mask, which all layers share. None where all may look at all."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    made: tuple[torch.dtype, Tensor | None] | None = getattr(mask, "bias", None)
    if made is None or made[0] != dtype:
        bias = None if bool(mask.all()) else torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
        made = mask.bias = (dtype, bias)  # type: ignore[attr-defined]
    return made[1]


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def possible(model: Any) -> bool:
    """Whether the model's attention is torch's, by transformers' registry, and has no bias by position."""
    return getattr(model.config, "_attn_implementation", "") == "sdpa" and not model.config.is_encoder_decoder


def install(model: Any, proof: Proof) -> list[str]:
    """Let the model use this attention if a probe batch agrees; what was found, if it does not."""
    model.config._attn_implementation = NAME
    distance, found = proof.distance()
    if distance <= TOLERANCE:
        return []
    model.config._attn_implementation = "sdpa"
    return [f"attention is torch's: the probe batch {found}"]
