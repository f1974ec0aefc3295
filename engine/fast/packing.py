"""Packing: a batch becomes one line of tokens, so that no padding is computed.

    padded, 4 rows of 9            the line, (1, N): embeddings, projections, feed-forwards, norms see these tokens alone
    a a a a a a a a a
    b b b b b - - - -     ->       a a a a a a a a a b b b b b c c c d d
    c c c - - - - - -
    d d - - - - - - -              rows of 9 for attention alone          what b, c and empty places see in the second row
                                   a a a a a a a a a                      b    b b b b b . . . .
                                   b b b b b c c c -                      c    . . . . . c c c .
                                   d d - - - - - - -                      -    . . . . . . . . -

A transformer treats every token alike but in attention, and tells tokens apart by their positions. So everything but
attention works on the line, with positions that begin anew with each example. Attention spreads the line into rows, filled
first-fit-decreasing, under a mask that is block-diagonal, and computes for each example what it computes for it alone.
Relative positions (DeBERTa, rotary) need no more: a distance within an example does not change when the example moves. A
decoder's mask is causal besides; ModernBERT's local layers look no further than their window.

One seam serves all architectures of the list. A hook before the body (`model.bert`, `model.transformer`, ...) packs its
inputs, whether ids or embeddings, and gives it a mask that carries the plan; a function in transformers' registry finds the
plan on the mask and rearranges around the attention that the model had (DeBERTa, which has no registry, gets two hooks). A hook
after the body brings the hidden states back to one example a row, (B, T, H), and the head never knows. States that were made
earlier (a cache of what is frozen) may take the embeddings' place, padded as they are. Calls that ask for more (keys and
values, all hidden states, attentions) and masks that are not padded on the right go through as they came. Outputs are equal to
float32's rounding; with dropout other masks are drawn, since there are fewer places to draw them for.

The line's length is a multiple of GRAIN and rows are a multiple of ROW long, the rest filled with copies of token 0 that nobody
reads: kernels that are built for one shape (oneDNN's: a millisecond and half a megabyte each) are then built a few times, not
anew for every batch. `install` proves the piece on a probe batch before it is used.
"""

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask, sliding_window_bidirectional_overlay
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from engine.fast.proof import TOLERANCE, Proof
from engine.freeze import layout
from engine.layers.disentangled import DisentangledAttention
from engine.models import positions

ENCODERS = {"bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "deberta-v2", "modernbert"}
DECODERS = {"gpt2", "llama"}
ARCHITECTURES = ENCODERS | DECODERS
MORE = ("past_key_values", "use_cache", "output_hidden_states", "output_attentions", "encoder_hidden_states")
GRAIN = 32  # the line's length is a multiple of it
ROW = 16  # so is a row's
NAME = "packed_"  # before the name of the attention that is packed, in transformers' registry


@dataclass
class Plan:
    """Where each token goes. B examples padded to T; a line of N tokens; R rows of C for attention, at most M examples in each."""

    tokens: Tensor  # (N,) index into the padded layout
    back: Tensor  # (B * T,) index into the line; padding takes token 0
    positions: Tensor  # (1, N) from 0 on in each example
    spread: Tensor  # (R * C,) index into the line; empty places take token 0
    gather: Tensor  # (N,) index into the rows
    mask: Tensor  # (R, 1, C, C) True where attention may look; empty places look at each other, so that no softmax is empty
    firsts: Tensor  # (R * M,) index into the rows: each row's examples begin there; where there are fewer, its place 0
    seats: Tensor  # (B,) index into `firsts`
    fill: Tensor  # the places in the line that are no token's, at its end
    empty: Tensor  # those in the rows
    shape: tuple[int, int, int]  # B, R, C

    def pack(self, x: Tensor) -> Tensor:
        """(B, T, ...) -> (1, N, ...)."""
        return x.flatten(0, 1).index_select(0, self.tokens)[None]

    def unpack(self, x: Tensor) -> Tensor:
        """(1, N, H) -> (B, T, H)."""
        return x[0].index_select(0, self.back).view(self.shape[0], -1, *x.shape[2:])

    def rows(self, x: Tensor) -> Tensor:
        """(1, N, H) -> (R, C, H)."""
        return Rearrange.apply(x[0], self.spread, self.gather, self.fill).view(*self.shape[1:], *x.shape[2:])  # type: ignore[no-any-return]

    def line(self, x: Tensor) -> Tensor:
        """(R, C, H) -> (1, N, H)."""
        return Rearrange.apply(x.flatten(0, 1), self.gather, self.spread, self.empty)[None]  # type: ignore[no-any-return]


class Rearrange(torch.autograd.Function):
    """x[there], whose gradient is g[back], and zero at the places `unread` of x: a copy each way.

    Indexing's own gradient would add into zeros, place by place, since it cannot know that every place is taken once.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Tensor, back: Tensor, unread: Tensor) -> Tensor:
        ctx.save_for_backward(back, unread)
        return x.index_select(0, there)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        back, unread = ctx.saved_tensors
        return g.index_select(0, back).index_fill_(0, unread, 0.0), None, None, None


def first_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    """Examples to rows: the longest first, each into the first row that has room."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for r, left in enumerate(room):
            if lengths[i] <= left:
                rows[r].append(i)
                room[r] -= lengths[i]
                break
        else:
            rows.append([i])
            room.append(capacity - lengths[i])
    return rows


def plan(attention_mask: Tensor) -> Plan | None:
    """The plan of a batch with mask (B, T); None where packing would save nothing or padding is not on the right."""
    inside = attention_mask.cpu().numpy().astype(bool)
    lengths = inside.sum(1)
    b, t = inside.shape
    n = -(-int(lengths.sum()) // GRAIN) * GRAIN
    if lengths.sum() == b * t or lengths.min() == 0 or not np.array_equal(inside, np.arange(t) < lengths[:, None]):
        return None
    c = -(-t // ROW) * ROW
    rows = first_fit_decreasing(lengths.tolist(), c)
    members = np.concatenate([np.asarray(row) for row in rows])  # examples, row by row: their order in the line
    counts = np.asarray([len(row) for row in rows])
    row = np.repeat(np.arange(len(rows)), counts)  # the row of each
    number = np.arange(b) - np.repeat(np.cumsum(counts) - counts, counts)  # which one in its row
    sizes = lengths[members]
    starts = np.cumsum(sizes) - sizes  # where each begins in the line
    offset = starts - np.repeat(starts[number == 0], counts)  # and in its row
    within = np.arange(sizes.sum()) - np.repeat(starts, sizes)  # (tokens,) place in the example
    in_rows, padded = np.repeat(row * c + offset, sizes) + within, np.repeat(members * t, sizes) + within
    tokens, place, gather = (np.zeros(n, dtype=np.int64) for _ in range(3))
    tokens[: len(within)], place[: len(within)], gather[: len(within)] = padded, within, in_rows
    back, spread, segment = (np.zeros(size, dtype=np.int64) for size in (b * t, len(rows) * c, len(rows) * c))
    back[padded] = spread[in_rows] = np.arange(len(within))
    segment[in_rows] = np.repeat(number + 1, sizes)  # 0: an empty place
    firsts, seats = np.repeat(np.arange(len(rows)) * c, counts.max()), np.zeros(b, dtype=np.int64)
    seats[members] = row * counts.max() + number
    firsts[seats[members]] = row * c + offset
    segments = segment.reshape(len(rows), c)
    mask = segments[:, None, :, None] == segments[:, None, None, :]
    fill, empty = np.arange(len(within), n), np.flatnonzero(segment == 0)
    arrays = (tokens, back, place[None], spread, gather, mask, firsts, seats, fill, empty)
    there = (torch.from_numpy(a).to(attention_mask.device, non_blocking=True) for a in arrays)
    return Plan(*there, (b, len(rows), c))  # type: ignore[call-arg,arg-type]


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, inner: str, **more: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention `inner` on rows: query, key, value (1, heads, N, D) of the line -> (1, N, heads, D).

    The mask (R, 1, C, C) carries its plan; one that carries none is of a call that is not packed.
    """
    compute, p = ALL_ATTENTION_FUNCTIONS[inner], getattr(attention_mask, "plan", None)
    if p is None:
        return compute(module, query, key, value, attention_mask, **more)  # type: ignore[no-any-return]
    q, k, v = (p.rows(x.transpose(1, 2)).transpose(1, 2) for x in (query, key, value))  # (R, heads, C, D)
    out, weights = compute(module, q, k, v, attention_mask, **more)  # (R, C, heads, D)
    return p.line(out), weights


class Packing:
    """Stands before and after a model's body, and around its attention. `active` turns it off and on; `plan` is of the latest call."""

    def __init__(self, model: Any):
        self.active = True
        self.plan: Plan | None = None
        self.unpacked = False  # whether the last layer has left one position an example already (engine/fast/last_layer.py)
        body = getattr(model, model.base_model_prefix)
        self.config = body.config
        self.inner = self.config._attn_implementation
        self.embeddings: Any = getattr(body, "embeddings", None)
        self.names = list(inspect.signature(body.forward).parameters)
        self.first = positions(model)[1]
        # a pooler is within the body and reads what the encoder returns; what else a body returns goes to the head
        leaves = body.encoder if getattr(body, "pooler", None) is not None else body
        self.hooks = [
            body.register_forward_pre_hook(self._before, with_kwargs=True),
            leaves.register_forward_hook(self._after, prepend=True),  # before what else looks at the output, a prompt's hook say
        ]
        blocks = layout(model, []).blocks
        if blocks:
            self.hooks.append(model.get_submodule(blocks[0]).register_forward_pre_hook(self._enter))
        if self.config.model_type == "deberta-v2":
            self._around_disentangled(body)
        else:
            name = NAME + self.inner
            AttentionInterface.register(name, _registered(self.inner))
            AttentionMaskInterface.register(name, sdpa_mask)
            self.config._attn_implementation = name

    def _around_disentangled(self, body: Any) -> None:
        """DeBERTa's attention does not go through the registry, and looks up distances between places of a row."""
        from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention

        self.hooks.append(body.embeddings.register_forward_pre_hook(self._embed, with_kwargs=True))
        self.hooks.append(body.encoder.register_forward_pre_hook(self._distances, with_kwargs=True))
        for module in body.modules():
            if isinstance(module, DisentangledSelfAttention | DisentangledAttention):
                self.hooks.append(module.register_forward_pre_hook(self._spread, with_kwargs=True))
                self.hooks.append(module.register_forward_hook(self._gather, with_kwargs=True))

    def _before(self, body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The body's inputs, (B, T) and (B, T, E), packed to (1, N) and (1, N, E)."""
        given = dict(zip(self.names, args, strict=False)) | kwargs
        mask = given.get("attention_mask")
        self.plan, self.unpacked = None, False
        if self.active and isinstance(mask, Tensor) and mask.ndim == 2 and not asks_for_more(self.config, given):
            self.plan = plan(mask)
        p = self.plan
        if p is None:
            return None
        given["position_ids"] = self.positions(p, given)
        for name in ("input_ids", "inputs_embeds", "token_type_ids"):
            if given.get(name) is not None:
                given[name] = p.pack(given[name])
        given["attention_mask"] = self.masks(p)
        if "use_cache" in self.names:
            given["use_cache"] = False  # what it would hold is packed, and of use to no one
        return (), given

    def positions(self, p: Plan, given: dict[str, Any]) -> Tensor:
        """Position ids of the line, (1, N): the caller's, or the architecture's own, or counted from its first one on."""
        mask, ids = given["attention_mask"], given.get("input_ids")
        if given.get("position_ids") is not None:
            return p.pack(given["position_ids"].expand(mask.shape))
        own = getattr(self.embeddings, "create_position_ids_from_input_ids", None)
        if ids is not None and own is not None:  # RoBERTa skips padding inside a text
            return p.pack(own(ids, self.embeddings.padding_idx))
        return p.positions + self.first

    def masks(self, p: Plan) -> Any:
        """The attention mask (R, 1, C, C), with the plan; a dict of two where layers look only so far."""
        at = torch.arange(p.mask.shape[-1], device=p.mask.device)
        q, k = at[:, None], at[None, :]
        if self.config.model_type in DECODERS:
            return carrying(p, p.mask & causal_mask_function(0, 0, q, k))  # type: ignore[arg-type]
        if self.config.model_type == "modernbert":
            near = sliding_window_bidirectional_overlay(self.config.sliding_window)(0, 0, q, k)
            return {"full_attention": carrying(p, p.mask), "sliding_attention": carrying(p, p.mask & near)}
        return carrying(p, p.mask)

    def _enter(self, block: nn.Module, args: tuple[Any, ...]) -> Any:
        """What enters the first block is the line, unless someone (a cache of frozen states) put padded states in its place."""
        p = self.plan
        if p is None or args[0].shape[:2] == (1, len(p.tokens)):
            return None
        return p.pack(args[0]), *args[1:]

    def _embed(self, embeddings: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """DeBERTa's embeddings multiply by the mask of the tokens, (1, N), not by that of attention."""
        return None if self.plan is None else (args, kwargs | {"mask": torch.ones_like(self.plan.positions)})

    def _distances(self, encoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """DeBERTa's encoder, told the distances within a row, (1, C, C), which it would count along the line."""
        if self.plan is None:
            return None
        row = torch.empty(1, self.plan.shape[2], 1, device=self.plan.mask.device)
        return args, kwargs | {"relative_pos": encoder.get_rel_pos(row)}

    def _spread(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        p = _plan_of(args, kwargs)
        return None if p is None else ((p.rows(args[0]), *args[1:]), kwargs)

    def _gather(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        p = _plan_of(args, kwargs)
        return None if p is None else (p.line(output[0]), *output[1:])

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """last_hidden_state (1, N, H) -> (B, T, H)."""
        if self.plan is None or self.unpacked:
            return None
        hidden = self.plan.unpack(output[0])
        if isinstance(output, tuple):
            return (hidden, *output[1:])
        output.last_hidden_state = hidden
        return output

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within the block nothing is packed."""
        before, self.active = self.active, False
        try:
            yield
        finally:
            self.active = before

    def remove(self) -> None:
        self.config._attn_implementation = self.inner
        for hook in self.hooks:
            hook.remove()


def _registered(inner: str) -> Any:
    """`attention` around the one that is registered as `inner`."""

    def packed(module: nn.Module, *args: Any, **more: Any) -> tuple[Tensor, Tensor | None]:
        return attention(module, *args, inner=inner, **more)

    return packed


def _plan_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Plan | None:
    """The plan that came with the mask, DeBERTa's second argument: its own pass's, also when that is computed again."""
    return getattr(args[1] if len(args) > 1 else kwargs["attention_mask"], "plan", None)


def carrying(p: Plan, mask: Tensor) -> Tensor:
    """The mask with its plan, which the attention function looks for."""
    mask.plan = p  # type: ignore[attr-defined]
    return mask


def asks_for_more(config: Any, given: dict[str, Any]) -> bool:
    """Whether a caller wants more than the last hidden states of texts: then nothing is rearranged."""
    wanted = any(given.get(name) is not None and given[name] is not False for name in MORE)
    return wanted or any(getattr(config, name, False) for name in ("output_hidden_states", "output_attentions"))


def refusal(model: Any) -> str:
    """Why this architecture cannot be packed; empty if it can be tried."""
    kind, body = model.config.model_type, getattr(model, getattr(model, "base_model_prefix", ""), model)
    computed = str(getattr(model.config, "_attn_implementation", ""))
    if kind not in ARCHITECTURES or body is model:
        return f"{kind} is not one of {', '.join(sorted(ARCHITECTURES))}"
    if not computed.endswith("sdpa") and kind != "deberta-v2":
        return f"{kind} computes its attention by {computed}, not by sdpa"
    if kind in ENCODERS and getattr(model.config, "is_decoder", False):
        return f"this {kind} is a decoder"
    if getattr(getattr(body, "encoder", None), "conv", None) is not None:
        return "its convolution looks across examples"
    return ""


def install(model: Any, probe: dict[str, Tensor], proof: Proof | None = None) -> tuple[Packing | None, str]:
    """Pack this model's batches if its architecture allows and a probe batch agrees; (packing, what was found)."""
    why = refusal(model)
    if why:
        return None, f"rows are not packed: {why}"
    if plan(probe["attention_mask"]) is None:
        return None, "rows are not packed: all examples are equally long"
    proof = proof or Proof(model, probe)
    packing = Packing(model)
    distance, found = proof.distance()
    if distance > TOLERANCE or packing.plan is None:
        packing.remove()
        return None, f"rows are not packed: the probe batch {found} (a layer looks across examples?)"
    return packing, f"rows are packed (probe batch: {distance:.0e} apart)"
