"""The last layer, only at the positions that the head reads.

    tokens      [CLS]   the   film   was   good          a head that classifies reads [CLS] alone, so in the last block
    keys          k      k     k      k     k            all tokens give keys and values,
    values        v      v     v      v     v
    query         q                                      and one asks, is projected, and goes through the feed-forward:
    output        y                                      (B, 1, H) leaves the block instead of (B, T, H)

Of a block's 12 H^2 multiplications a token two H^2 are left (keys and values). What is left out would be read by nobody, so
outputs and gradients are the same to float32's rounding. With dropout other masks are drawn, since there are fewer places to
draw them for. Of packed texts (engine/fast/packing.py) the positions are those where examples begin:

    row   b b b b b c c c -      M = 2 queries, at 0 and 5, each sees its own example; then one row an example: (B, 1, H)

`reads_first` asks the gradient which positions a head reads, and `install` compares outputs and gradients on a probe batch
before the piece is used. The modules whose forward pass is taken over (block, attention) must be transformers'
own; all others are called as they are, so LoRA, adapters, prefixes and swapped feed-forwards stay in place. Where queries,
keys and values are one matrix (ModernBERT) all of it is still computed.
"""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from engine.fast.packing import Packing, Plan, asks_for_more
from engine.fast.proof import TOLERANCE, Proof, answers, weighed
from engine.freeze import layout
from engine.layers.disentangled import DisentangledAttention
from engine.models import eval_mode


class Reads:
    """Which positions are read: the first of each row, or of packed texts the first of each example.

    What comes in is the block's input, (B, T, H), or the line of packed texts, (1, N, H), of which attention sees R rows of C.
    """

    def __init__(self, plan: Plan | None):
        self.plan = plan

    def rows(self, x: Tensor) -> Tensor:
        """What attention looks at: (B, T, H), or (1, N, H) -> (R, C, H)."""
        return x if self.plan is None else self.plan.rows(x)

    def at(self, x: Tensor) -> Tensor:
        """The read positions: (B, T, H) -> (B, 1, H), or (1, N, H) -> (R, M, H)."""
        if self.plan is None:
            return x[:, :1]
        return x[0].index_select(0, self.plan.spread[self.plan.firsts]).view(self.plan.shape[1], -1, *x.shape[2:])

    def of_rows(self, x: Tensor) -> Tensor:
        """The read positions of what stands in rows already: (R, C, ...) -> (R, M, ...)."""
        if self.plan is None:
            return x[:, :1]
        return x.flatten(0, 1).index_select(0, self.plan.firsts).view(len(x), -1, *x.shape[2:])

    def each(self, x: Tensor) -> Tensor:
        """One position a row, a row an example: (R, M, H) -> (B, 1, H)."""
        return x if self.plan is None else x.flatten(0, 1).index_select(0, self.plan.seats)[:, None]

    def looks(self, mask: Any) -> Any:
        """An attention mask's rows of the read positions: (R, 1, C, C) -> (R, 1, M, C)."""
        return None if mask is None else self.of_rows(mask.transpose(1, 2)).transpose(1, 2)

    def distances(self, relative: Tensor | None) -> Tensor | None:
        """Relative positions from the read ones: (1, C, C) -> (1 or R, M, C)."""
        if relative is None or self.plan is None:
            return relative if relative is None else relative[:, :1]
        at = self.plan.firsts % relative.shape[-1]
        return relative[0].index_select(0, at).view(self.plan.shape[1], -1, relative.shape[-1])


def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, scaling: float) -> Tensor:
    """Attention by the model's own function: q (R, heads, M, D), k and v (R, heads, C, D) -> (R, M, H)."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    function = ALL_ATTENTION_FUNCTIONS[module.config._attn_implementation]
    out, _ = function(module, q, k, v, mask, dropout=dropout if module.training else 0.0, scaling=scaling)  # (R, M, heads, D)
    return out.flatten(2)  # type: ignore[no-any-return]


def _heads(x: Tensor, size: int) -> Tensor:
    return x.unflatten(-1, (-1, size)).transpose(1, 2)  # (R, heads, C, D)


def bert(block: Any, reads: Reads, hidden: Tensor, mask: Tensor | None, **more: Any) -> Tensor:
    """BERT, RoBERTa, ELECTRA: hidden (B, T, H) or (1, N, H) -> (B, 1, H)."""
    a, x = block.attention.self, reads.at(hidden)
    q, k, v = (_heads(y, a.attention_head_size) for y in (a.query(x), reads.rows(a.key(hidden)), reads.rows(a.value(hidden))))
    context = attend(a, q, k, v, reads.looks(mask), a.dropout.p, a.scaling)
    y = block.attention.output(reads.each(context), reads.each(x))
    return block.output(block.intermediate(y), y)  # type: ignore[no-any-return]


def distilbert(block: Any, reads: Reads, hidden: Tensor, mask: Tensor | None, **more: Any) -> Tensor:
    """hidden (B, T, H) or (1, N, H) -> (B, 1, H)."""
    a, x = block.attention, reads.at(hidden)
    q, k, v = (_heads(y, a.attention_head_size) for y in (a.q_lin(x), reads.rows(a.k_lin(hidden)), reads.rows(a.v_lin(hidden))))
    context = attend(a, q, k, v, reads.looks(mask), a.dropout.p, a.scaling)
    y = block.sa_layer_norm(a.out_lin(reads.each(context)) + reads.each(x))
    return block.output_layer_norm(block.ffn(y) + y)  # type: ignore[no-any-return]


def modernbert(
    block: Any, reads: Reads, hidden: Tensor, mask: Tensor | None, *, position_embeddings: tuple[Tensor, Tensor], **more: Any
) -> Tensor:
    """Norms stand before the sublayers, positions are rotations: hidden (B, T, H) or (1, N, H) -> (B, 1, H)."""
    from transformers.models.modernbert.modeling_modernbert import apply_rotary_pos_emb

    a = block.attn
    qkv = a.Wqkv(block.attn_norm(hidden)).unflatten(-1, (3, -1, a.head_dim))  # (B, T, 3, heads, D)
    q, k, v = (y.transpose(1, 2) for y in qkv.unbind(2))
    q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
    q = reads.at(q.transpose(1, 2)).transpose(1, 2)  # (R, heads, M, D)
    k, v = (reads.rows(y.transpose(1, 2)).transpose(1, 2) for y in (k, v))  # (R, heads, C, D)
    context = attend(a, q, k, v, reads.looks(mask), a.attention_dropout, a.head_dim**-0.5)
    y = reads.each(reads.at(hidden)) + a.out_drop(a.Wo(reads.each(context)))
    return y + block.mlp(block.mlp_norm(y))  # type: ignore[no-any-return]


def deberta(
    block: Any, reads: Reads, hidden: Tensor, mask: Tensor, *, relative_pos: Tensor | None = None,
    rel_embeddings: Tensor | None = None, **more: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """DeBERTa-v2, by our form of its attention, over the very same parameters: hidden (B, T, H) or (1, N, H) -> (B, 1, H)."""
    old, x = block.attention.self, reads.at(hidden)
    a = old if isinstance(old, DisentangledAttention) else DisentangledAttention(old)
    a.training = old.training
    context, _ = a.forward(  # not the hooks: they are the packing's own
        reads.rows(hidden), reads.looks(mask), query_states=x, relative_pos=reads.distances(relative_pos), rel_embeddings=rel_embeddings
    )
    y = block.attention.output(reads.each(context), reads.each(x))
    return block.output(block.intermediate(y), y), None


BERT = (bert, ("attention", "attention.self"))
FAMILIES: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {  # how it is computed, and whose forward that takes over
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), BERT),
    "distilbert": (distilbert, ("attention",)), "modernbert": (modernbert, ("attn",)),
    "deberta-v2": (deberta, ("attention", "attention.self")),
}  # fmt: skip


class LastLayer:
    """Stands in the place of the last block's forward. `active` turns it off and on."""

    def __init__(self, model: Any, packing: Packing | None):
        self.active, self.packing = True, packing
        self.block: Any = last_block(model)
        self.compute = FAMILIES[model.config.model_type][0]
        self.inner = self.block.forward
        self.block.forward = self._forward
        self.wanted = True  # whether the caller wants the last hidden states alone
        body = getattr(model, model.base_model_prefix)
        self.hook = body.register_forward_pre_hook(self._before, with_kwargs=True)

    def _before(self, body: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.wanted = not asks_for_more(body.config, kwargs | {"use_cache": None})  # an encoder has no cache

    def _forward(self, hidden: Tensor, mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """hidden (B, T, H), or packed (1, N, H) -> (B, 1, H)."""
        if mask is None:
            mask = kwargs.pop("attention_mask", None)
        if not (self.active and self.wanted):
            return self.inner(hidden, mask, *args, **kwargs)
        plan = self.packing.plan if self.packing else None
        if self.packing:
            self.packing.unpacked = plan is not None
        run = partial(self.compute, self.block, Reads(plan), **kwargs)  # it holds this pass's plan, also when computed again
        if self.block.gradient_checkpointing and self.block.training:
            return self.block._gradient_checkpointing_func(run, hidden, mask)
        return run(hidden, mask)

    def remove(self) -> None:
        self.hook.remove()
        del self.block.forward


def last_block(model: Any) -> nn.Module:
    """The uppermost block of the stack."""
    return model.get_submodule(layout(model, []).blocks[-1])  # type: ignore[no-any-return]


def refusal(model: Any) -> str:
    """Why the last layer cannot be computed at some positions alone; empty if it can be tried."""
    kind = model.config.model_type
    if kind not in FAMILIES:
        return f"{kind} is not one of {', '.join(sorted(FAMILIES))}"
    if kind != "deberta-v2" and not str(model.config._attn_implementation).endswith("sdpa"):
        return f"attention is not computed by sdpa but by {model.config._attn_implementation}"
    if getattr(model.config, "is_decoder", False):
        return f"this {kind} is a decoder"
    if not layout(model, []).blocks:
        return f"{kind} has no stack of blocks here"
    block = last_block(model)
    for path in ("", *FAMILIES[kind][1]):
        module: Any = block
        for name in path.split(".") if path else ():
            module = getattr(module, name, None)
        own = type(module).__module__.startswith("transformers.models.") or isinstance(module, DisentangledAttention)
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()] if own else []
        foreign = [hook for hook in hooks if not isinstance(getattr(hook, "__self__", None), Packing)]
        hooked = own and (foreign or "forward" in vars(module))
        if not own or hooked:
            return f"its {path or 'block'} is {'hooked' if own else 'a ' + type(module).__name__}, not transformers' own"
    return ""


def reads_first(model: Any, probe: dict[str, Tensor]) -> bool:
    """Whether the answer depends on position 0 of each example alone: the gradient of the last block's output tells."""
    cut: list[Tensor] = []

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        leaf = (output[0] if isinstance(output, tuple) else output).detach().requires_grad_()
        cut.append(leaf)
        return (leaf, *output[1:]) if isinstance(output, tuple) else leaf

    handle = last_block(model).register_forward_hook(hook)
    try:
        with eval_mode(model), torch.enable_grad():
            found = torch.autograd.grad(weighed(answers(model, probe)), cut, allow_unused=True)  # of each head, if there are several
    finally:
        handle.remove()
    return all(one is not None and not bool(one[:, 1:].any()) for one in found)


def install(
    model: Any, probe: dict[str, Tensor], packing: Packing | None = None, proof: Proof | None = None
) -> tuple[LastLayer | None, str]:
    """Compute the last layer where the head reads if a probe batch agrees; (the piece, what was found).

    `packing` is the piece that packs this model's rows, if it is in; `proof` holds what the model computed before that.
    """
    why = refusal(model)
    if not why:
        with packing.paused() if packing else contextlib.nullcontext():
            why = "" if reads_first(model, probe) else "the head reads more than the first position"
    if why:
        return None, f"the last layer is whole: {why}"
    if proof is None:
        with packing.paused() if packing else contextlib.nullcontext():
            proof = Proof(model, probe)
    piece = LastLayer(model, packing)
    distance, found = proof.distance()
    if packing and distance <= TOLERANCE:
        with packing.paused():
            distance, found = max((distance, found), proof.distance())
    if distance > TOLERANCE:
        piece.remove()
        return None, f"the last layer is whole: the probe batch {found}"
    return piece, f"the last layer computes what the head reads (probe batch: {distance:.0e} apart)"
