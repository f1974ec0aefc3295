"""DeBERTa's attention, which may take a prefix (He et al. 2021, arXiv:2006.03654; transformers 5's DebertaV2).

Content and position are kept apart: a score is the sum of three products, of which two look up the distance
d = bucket(i - j) between query i and key j in a table of R = 2 * span relative embeddings.

    score(i, j) = ( Q_i . K_j   +   Q_i . Kr_d   +   K_j . Qr_d ) / sqrt(3 D)
                    content          c2p             p2c             (3: as many as `pos_att_type` asks for, plus one)

    Q, K, V (B, heads, T, D) of the text         Kr, Qr (heads, R, D) = projections of the relative embeddings

A prefix is P trained keys and values in front of the text's. It stands nowhere, so it has no distance to any query: its
scores are the content product alone, by the same scale, and no padding hides it. Without a prefix this is DeBERTa's own
attention, to float32's rounding.

transformers' class does not go through its registry of attention functions, where a prefix is put in for the other
architectures. This one takes its place and keeps its parameters, under the same names.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DisentangledAttention(nn.Module):
    """In the place of transformers' DisentangledSelfAttention, over the very same parameters."""

    query_proj: nn.Linear
    key_proj: nn.Linear
    value_proj: nn.Linear
    pos_key_proj: nn.Linear
    pos_query_proj: nn.Linear

    def __init__(self, old: Any):
        super().__init__()
        for name in ("query_proj", "key_proj", "value_proj", "pos_key_proj", "pos_query_proj"):
            if hasattr(old, name):
                setattr(self, name, getattr(old, name))
        self.heads, self.size = old.num_attention_heads, old.attention_head_size
        self.dropout = old.dropout
        self.relative, self.kinds = old.relative_attention, list(old.pos_att_type) if old.relative_attention else []
        self.shared = old.share_att_key  # the relative embeddings go through the text's own projections
        if self.relative:
            self.pos_dropout, self.span = old.pos_dropout, old.pos_ebd_size
        self.scale = (self.size * (1 + len({"c2p", "p2c"} & set(old.pos_att_type)))) ** -0.5
        self.prefix: nn.Module | None = None  # () -> keys (1, heads, P, D), values (1, heads, P, D)

    def split(self, x: Tensor) -> Tensor:
        """(B, T, H) -> (B, heads, T, D)."""
        return x.unflatten(-1, (self.heads, self.size)).transpose(1, 2)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor, output_attentions: bool = False, query_states: Tensor | None = None,
        relative_pos: Tensor | None = None, rel_embeddings: Tensor | None = None,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """hidden_states (B, T, H), attention_mask (B, 1, S, T) with 1 where one may look, relative_pos (1 or B, S, T) the buckets,
        rel_embeddings (R, H). Returns (B, S, H) and, as sdpa does, no attention weights. S = T, or the length of query_states."""
        query = self.split(self.query_proj(hidden_states if query_states is None else query_states))  # (B, heads, T, D)
        key, value = self.split(self.key_proj(hidden_states)), self.split(self.value_proj(hidden_states))
        bias = query.new_zeros(1, 1, 1, 1)
        if self.relative:
            assert relative_pos is not None, "DeBERTa's encoder gives both"
            assert rel_embeddings is not None, "DeBERTa's encoder gives both"
            bias = self.distances(query, key, relative_pos, self.pos_dropout(rel_embeddings)) * self.scale  # (B, heads, T, T)
        bias = torch.where(attention_mask.bool(), bias, torch.finfo(query.dtype).min)
        if self.prefix is not None:
            p_key, p_value = (x.to(query.dtype).expand(len(key), -1, -1, -1) for x in self.prefix())  # (B, heads, P, D)
            key, value = torch.cat([p_key, key], dim=2), torch.cat([p_value, value], dim=2)
            bias = F.pad(bias, (p_key.shape[2], 0))
        rate = self.dropout.p if self.training else 0.0
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=rate, scale=self.scale)
        return out.transpose(1, 2).flatten(2), None

    def distances(self, query: Tensor, key: Tensor, relative_pos: Tensor, table: Tensor) -> Tensor:
        """c2p + p2c, unscaled: (B, heads, S, T). Both look up the distance d, one in the query's row, one in the key's."""
        table = table[None, : 2 * self.span]  # (1, R, H)
        d = relative_pos.to(query.device, torch.long)
        d = (d + self.span).clamp(0, 2 * self.span - 1).reshape(-1, 1, *d.shape[-2:])
        d = d.expand(*query.shape[:2], -1, -1)  # (B, heads, S, T)
        bias = torch.zeros((), dtype=query.dtype, device=query.device)
        if "c2p" in self.kinds:
            project = self.key_proj if self.shared else self.pos_key_proj
            scores = query @ self.split(project(table)).transpose(-1, -2)  # (B, heads, S, R)
            bias = bias + scores.gather(-1, d)
        if "p2c" in self.kinds:
            project = self.query_proj if self.shared else self.pos_query_proj
            scores = key @ self.split(project(table)).transpose(-1, -2)  # (B, heads, T, R)
            bias = bias + scores.gather(-1, d.transpose(-1, -2)).transpose(-1, -2)
        return bias
