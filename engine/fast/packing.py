"""Row packing: short examples share a row, so that padding is hardly computed.

    padded, 4 rows of 9            packed, rows of 9            what b, c and padding see in the second row
    a a a a a a a a a              a a a a a a a a a                b    b b b b b . . . .
    b b b b b - - - -     ->       b b b b b c c c -                c    . . . . . c c c .
    c c c - - - - - -                                               -    . . . . . . . . -
    d d - - - - - - -              (d, two tokens, opens a third)

A transformer treats every token alike but in attention, and tells tokens apart by their positions. So a body that is given
packed rows, positions that begin anew with each example and a mask that is block-diagonal computes for each example what it
computes for it alone. Relative positions (DeBERTa, rotary) need no more: a distance within an example does not change when
the example moves. A decoder's mask is causal besides; ModernBERT's local layers look no further than their window.

One seam serves all architectures of the list. A hook before the body (`model.bert`, `model.transformer`, ...) packs its
inputs, whether ids or embeddings; a hook after it brings the hidden states back to one example a row, (B, T, H), and the head
never knows. States that were made earlier (a cache of what is frozen) may take the embeddings' place, padded as they are.
Calls that ask for more (keys and values, all hidden states, attentions) and masks that are not padded on the right go through
as they came. Outputs are equal to float32's rounding; with dropout
other masks are drawn, since there are fewer places to draw them for.

Rows are filled first-fit-decreasing, each as long as the longest example. On SST-2 a batch of 32 is 33 % useful when
padded and 93 % when packed. `install` proves the piece on a probe batch before it is used.
"""

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.masking_utils import causal_mask_function, sliding_window_bidirectional_overlay

from engine.fast.proof import TOLERANCE, Proof
from engine.freeze import layout
from engine.models import positions

ENCODERS = {"bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "deberta-v2", "modernbert"}
DECODERS = {"gpt2", "llama"}
ARCHITECTURES = ENCODERS | DECODERS
MORE = ("past_key_values", "use_cache", "output_hidden_states", "output_attentions", "encoder_hidden_states")


@dataclass
class Plan:
    """Where each token goes. B examples padded to T; R rows of C = T tokens; at most M examples in a row."""

    rows: int
    gather: Tensor  # (R * C,) index into the padded layout; padding takes token 0
    back: Tensor  # (B * T,) index into the packed layout
    positions: Tensor  # (R, C) from 0 on in each example
    real: Tensor  # (R, C) True where a token is
    mask: Tensor  # (R, 1, C, C) True where attention may look; padding looks at padding, so that no softmax is empty
    firsts: Tensor  # (R * M,) index into the packed layout: each row's examples begin there; where there are fewer, its token 0
    seats: Tensor  # (B,) index into `firsts`

    def pack(self, x: Tensor) -> Tensor:
        """(B, T, ...) -> (R, C, ...)."""
        return x.flatten(0, 1).index_select(0, self.gather).view(self.rows, -1, *x.shape[2:])

    def unpack(self, x: Tensor) -> Tensor:
        """(R, C, H) -> (B, T, H)."""
        return x.flatten(0, 1).index_select(0, self.back).view(len(self.seats), -1, *x.shape[2:])


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
    if lengths.sum() > (b - 1) * t or not np.array_equal(inside, np.arange(t) < lengths[:, None]):
        return None
    rows = first_fit_decreasing(lengths.tolist(), t)
    if len(rows) >= b:
        return None
    members = np.concatenate([np.asarray(row) for row in rows])  # examples, row by row
    counts = np.asarray([len(row) for row in rows])
    row = np.repeat(np.arange(len(rows)), counts)  # the row of each
    number = np.arange(b) - np.repeat(np.cumsum(counts) - counts, counts)  # which one in its row
    sizes = lengths[members]
    ends = np.cumsum(sizes)
    offset = ends - sizes - np.repeat((ends - sizes)[number == 0], counts)  # where it begins in its row
    within = np.arange(ends[-1]) - np.repeat(ends - sizes, sizes)  # (tokens,) place in the example
    packed, padded = np.repeat(row * t + offset, sizes) + within, np.repeat(members * t, sizes) + within
    gather, place, segment = (np.zeros(len(rows) * t, dtype=np.int64) for _ in range(3))
    back = np.zeros(b * t, dtype=np.int64)
    gather[packed], back[padded], place[packed] = padded, packed, within
    segment[packed] = np.repeat(number + 1, sizes)  # 0: padding
    firsts, seats = np.repeat(np.arange(len(rows)) * t, counts.max()), np.zeros(b, dtype=np.int64)
    seats[members] = row * counts.max() + number
    firsts[seats[members]] = row * t + offset
    segments = segment.reshape(len(rows), t)
    arrays = (
        gather,
        back,
        place.reshape(-1, t),
        segments > 0,
        segments[:, None, :, None] == segments[:, None, None, :],
        firsts,
        seats,
    )
    return Plan(len(rows), *(torch.from_numpy(a).to(attention_mask.device, non_blocking=True) for a in arrays))


class Packing:
    """Stands before and after a model's body. `active` turns it off and on; `plan` is that of the latest forward pass."""

    def __init__(self, model: Any):
        self.active = True
        self.plan: Plan | None = None
        self.unpacked = False  # whether the last layer has left one position an example already (engine/fast/last_layer.py)
        body = getattr(model, model.base_model_prefix)
        self.config = body.config
        self.embeddings: Any = getattr(body, "embeddings", None)
        self.names = list(inspect.signature(body.forward).parameters)
        self.first = positions(model)[1]
        # a pooler is within the body and reads what the encoder returns; what else a body returns goes to the head
        leaves = body.encoder if getattr(body, "pooler", None) is not None else body
        self.hooks = [
            body.register_forward_pre_hook(self._before, with_kwargs=True),
            leaves.register_forward_hook(
                self._after, prepend=True
            ),  # before what else looks at the output, such as a prompt's hook
        ]
        blocks = layout(model, []).blocks
        if blocks:
            self.hooks.append(model.get_submodule(blocks[0]).register_forward_pre_hook(self._enter))
        if self.config.model_type == "deberta-v2":
            self.hooks.append(body.embeddings.register_forward_pre_hook(self._embed, with_kwargs=True))

    def _before(self, body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The body's inputs, (B, T) and (B, T, E), packed to (R, C) and (R, C, E)."""
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
        """Position ids of the packed rows, (R, C): the caller's, or the architecture's own, or counted from its first one on."""
        mask, ids = given["attention_mask"], given.get("input_ids")
        if given.get("position_ids") is not None:
            return p.pack(given["position_ids"].expand(mask.shape))
        if ids is not None and hasattr(
            self.embeddings, "create_position_ids_from_input_ids"
        ):  # RoBERTa skips padding inside a text
            return p.pack(self.embeddings.create_position_ids_from_input_ids(ids, self.embeddings.padding_idx))
        return p.positions + self.first

    def masks(self, p: Plan) -> Any:
        """The attention mask, (R, 1, C, C); a dict of two where layers look only so far."""
        at = torch.arange(p.mask.shape[-1], device=p.mask.device)
        q, k = at[:, None], at[None, :]
        if self.config.model_type in DECODERS:
            return p.mask & causal_mask_function(0, 0, q, k)  # type: ignore[arg-type]
        if self.config.model_type == "modernbert":
            near = sliding_window_bidirectional_overlay(self.config.sliding_window)(0, 0, q, k)
            return {"full_attention": p.mask, "sliding_attention": p.mask & near}
        return p.mask

    def _enter(self, block: nn.Module, args: tuple[Any, ...]) -> Any:
        """What enters the first block is packed, unless someone (a cache of frozen states) put padded states in its place."""
        p = self.plan
        if p is None or len(args[0]) == p.rows:
            return None
        return p.pack(args[0]), *args[1:]

    def _embed(self, embeddings: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """DeBERTa's embeddings multiply by the mask of the tokens, (R, C), not by that of attention."""
        return None if self.plan is None else (args, kwargs | {"mask": self.plan.real})

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """last_hidden_state (R, C, H) -> (B, T, H)."""
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
        for hook in self.hooks:
            hook.remove()


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
    """Pack this model's rows if its architecture allows and a probe batch agrees; (packing, what was found)."""
    why = refusal(model)
    if why:
        return None, f"rows are not packed: {why}"
    if plan(probe["attention_mask"]) is None:
        return None, "rows are not packed: no two examples are short enough to share one"
    proof = proof or Proof(model, probe)
    packing = Packing(model)
    distance, found = proof.distance()
    if distance > TOLERANCE or packing.plan is None:
        packing.remove()
        return None, f"rows are not packed: the probe batch {found} (a layer looks across examples?)"
    return packing, f"rows are packed (probe batch: {distance:.0e} apart)"
