"""Prefix tuning: trained keys and values that every token may look at (Li & Liang 2021, arXiv:2101.00190).

    attention(Q, [P_k ; K], [P_v ; V])          P_k, P_v (prefix length, H) for each attention; all else frozen

    queries   q1 q2 q3 ...
                |  |  |        look at
    keys      [p1 p2 | k1 k2 k3 ...]            the prefix belongs to no text and has no position

transformers sends the attention of its architectures through one registry of functions. A function registered there puts
the prefix before keys and values and widens the mask; it works on encoders and decoders alike, in T5 on the encoder's
self-attention, the decoder's and its attention to the encoder. It takes no positions away from the text, and comes after
the cache, so generating step by step adds it once a step and never to the cache. DeBERTa-v2 does not go through the
registry; its attention is swapped for one of ours that takes a prefix (engine/layers/disentangled.py). Relative positions
(T5, DeBERTa) give a prefix no bias: it has no distance to the text.

With `reparametrize` the prefix comes out of a small network while it trains, which the paper found steadier:
P = W2 tanh(W1 E).

The peft package holds a prefix as a cache, one tensor (P, layers * 2 * heads * D), the network folded away. Its cache makes
the text's positions begin at P, ours begin at 0: on architectures with learned positions the two compute the same where
peft is given position_ids - P.
"""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from engine.errors import InputError
from engine.fast.attention import attention as plain_attention
from engine.freeze import train_only
from engine.layers.disentangled import DisentangledAttention
from engine.models import eval_mode
from engine.schema import Tune
from engine.swap import swap

STAYS = True  # the saved model keeps its prefixes
PEFT_TYPE = "PREFIX_TUNING"
NAME = "prefix_sdpa"


class Options(Tune):
    """Length and reparametrisation."""

    length: int = Field(16, ge=1, le=4096, description="Trained positions before the keys and values of each attention.")
    reparametrize: bool = Field(False, description="Make the prefix by a small network while it trains.")
    bottleneck: int = Field(512, ge=1, description="Width of that network.")


class Prefix(nn.Module):
    """The keys and values of one attention's prefix: P positions, heads of size D."""

    def __init__(self, length: int, heads: int, d_key: int, d_value: int, bottleneck: int | None):
        super().__init__()
        self.heads, self.d_key, self.d_value = heads, d_key, d_value
        width = heads * (d_key + d_value)
        self.embedding = nn.Parameter(torch.randn(length, width) * 0.02)  # (P, heads * (Dk + Dv))
        self.network = (
            nn.Sequential(nn.Linear(width, bottleneck), nn.Tanh(), nn.Linear(bottleneck, width)) if bottleneck else None
        )

    def forward(self) -> tuple[Tensor, Tensor]:
        """Keys (1, heads, P, Dk) and values (1, heads, P, Dv)."""
        both = self.embedding if self.network is None else self.network(self.embedding)
        keys, values = both.split([self.heads * self.d_key, self.heads * self.d_value], dim=1)
        p = len(both)
        return keys.view(1, p, self.heads, self.d_key).transpose(1, 2), values.view(1, p, self.heads, self.d_value).transpose(
            1, 2
        )


_seen: list[tuple[nn.Module, tuple[int, int, int]]] | None = None  # filled while `shapes` runs its probe


def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any) -> Any:
    """Scaled dot-product attention with the module's prefix, if it has one, before keys (B, heads, T, Dk) and values."""
    if _seen is not None:
        _seen.append((module, (key.shape[1], key.shape[3], value.shape[3])))
    prefix = getattr(module, "prefix", None)
    if prefix is None:
        return plain_attention(module, query, key, value, attention_mask, **more)
    p_key, p_value = prefix()
    p, b = p_key.shape[2], len(key)
    causal = more.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if attention_mask is None and causal and query.shape[2] > 1:  # sdpa's own causal mask would count the prefix as text
        shape = (query.shape[2], key.shape[2])
        attention_mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril(shape[1] - shape[0])[None, None]
    if attention_mask is not None:
        attention_mask = F.pad(attention_mask, (p, 0), value=True if attention_mask.dtype == torch.bool else 0.0)
    if more.get("position_bias") is not None:
        more["position_bias"] = F.pad(more["position_bias"], (p, 0))
    key = torch.cat([p_key.to(key.dtype).expand(b, -1, -1, -1), key], dim=2)
    value = torch.cat([p_value.to(value.dtype).expand(b, -1, -1, -1), value], dim=2)
    return plain_attention(module, query, key, value, attention_mask, **{**more, "is_causal": False})


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def shapes(model: Any) -> list[tuple[nn.Module, tuple[int, int, int]]]:
    """Every attention of the model with (heads, Dk, Dv) of its keys and values, found by running one forward pass."""
    global _seen
    fill = model.config.eos_token_id if isinstance(model.config.eos_token_id, int) else 0
    ids = torch.full((1, 2), fill, device=next(model.parameters()).device)
    names = [n for n in ("input_ids", "decoder_input_ids") if n in inspect.signature(model.forward).parameters]
    _seen = []
    try:
        with eval_mode(model), torch.inference_mode():
            model(**dict.fromkeys(names, ids))
        return list({id(m): (m, s) for m, s in _seen}.values())
    finally:
        _seen = None


def apply(model: nn.Module, options: Options, head: list[str]) -> str:
    """Give every attention a prefix, freeze the rest but the head; returns the coverage line."""
    found = _disentangled(model) or _registered(model)
    names = {id(m): name for name, m in model.named_modules()}
    bottleneck = options.bottleneck if options.reparametrize else None
    for module, (heads, d_key, d_value) in found:
        like = next(module.parameters())
        module.prefix = Prefix(options.length, heads, d_key, d_value, bottleneck).to(like.device, like.dtype)
    train_only(model, [f"{names[id(m)]}.prefix" for m, _ in found] + head)
    return f"prefix: {options.length} positions before each of {len(found)} attentions"


def _disentangled(model: nn.Module) -> list[tuple[nn.Module, tuple[int, int, int]]]:
    """DeBERTa-v2's attentions, swapped for ours, with (heads, Dk, Dv); none in other architectures."""
    from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention

    paths = [path for path, m in model.named_modules() if isinstance(m, DisentangledSelfAttention)]
    if paths:
        swap(model, paths, lambda old, path: DisentangledAttention(old), where="tune.method")
    ours = [m for m in model.modules() if isinstance(m, DisentangledAttention)]
    return [(m, (m.heads, m.size, m.size)) for m in ours]


def _registered(model: nn.Module) -> list[tuple[nn.Module, tuple[int, int, int]]]:
    """Every attention that goes through transformers' registry, sent through ours from now on."""
    configs: list[Any] = list({id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values())
    if any(c._attn_implementation != "sdpa" for c in configs):
        raise InputError("tune.method: prefix needs an architecture that computes its attention by sdpa")
    for config in configs:
        config._attn_implementation = NAME
    found = shapes(model)
    if not found:
        for config in configs:
            config._attn_implementation = "sdpa"
        raise InputError("tune.method: prefix finds no attention that goes through transformers' interface in this architecture")
    return found


# -- the peft package's layout ----------------------------------------------------------------------------------------


def peft(model: Any, options: Options) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """adapter_config.json's keys, and prompt_embeddings (P, layers * 2 * heads * D): k0, v0, k1, v1, ... of the layers."""
    prefixes = _for_peft(model)
    first = prefixes[0]
    rows = [both.transpose(1, 2).flatten(2)[0] for prefix in prefixes for both in prefix()]  # (P, heads * D) each
    config = {
        "peft_type": PEFT_TYPE, "num_virtual_tokens": len(first.embedding), "token_dim": first.heads * first.d_key,
        "num_layers": len(prefixes), "num_attention_heads": first.heads, "num_transformer_submodules": 1,
        "encoder_hidden_size": None, "prefix_projection": False,
    }  # fmt: skip
    return config, {"prompt_embeddings": torch.cat(rows, dim=1).detach()}


def from_peft(config: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> dict[str, Any]:
    """tune options for a peft adapter_config. Its network, if it had one, is folded away on disk."""
    return {"method": "prefix", "length": config["num_virtual_tokens"]}


@torch.no_grad()
def load_peft(model: Any, options: Options, tensors: dict[str, Tensor]) -> None:
    """Put peft's prefix into a model on which `apply` has run; a network is taken out, since the file holds what it made."""
    prefixes = _for_peft(model)
    given = tensors["prompt_embeddings"]
    expected = (options.length, sum(p.heads * (p.d_key + p.d_value) for p in prefixes))
    if tuple(given.shape) != expected:
        raise InputError(f"prompt_embeddings is {tuple(given.shape)}; this model and tune.length need {expected}")
    for prefix, both in zip(prefixes, given.chunk(len(prefixes), dim=1), strict=True):
        prefix.network = None
        prefix.embedding.copy_(both)


def _for_peft(model: Any) -> list[Prefix]:
    """The model's prefixes, lowest layer first, where peft can hold them: in a body that takes a cache, and has one stack."""
    body = getattr(model, model.base_model_prefix, model)
    takes = inspect.signature(body.forward).parameters
    if "past_key_values" not in takes or "decoder_input_ids" in takes:
        raise InputError(f"tune.method: prefix has no peft counterpart on {model.config.model_type}")
    return [m for m in model.modules() if isinstance(m, Prefix)]
