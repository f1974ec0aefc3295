"""Pooling heads: what the head reads is a mean over the text, or an attention over it, instead of the first token.

    hidden states (B, T, H) --- first token ----------------------> old head -> logits
                            \\-- mean / attention pooling (B, H) -->

    MeanPooling:       p = sum_t m_t h_t / sum_t m_t                     m: the attention mask
    AttentionPooling:  p = sum_t a_t h_t,   a = softmax over the text of  w . h_t      (w is learnt, fresh, from zero)

    swap: [{at: "**.pooler", with: "engine.layers.pooling:MeanPooling"}]         # BERT, DeBERTa-v2
    swap: [{at: classifier, with: "engine.layers.pooling:MeanPooling"}]          # RoBERTa, ELECTRA

It takes the place of a module that reads the first position of (B, T, H), and hands it the pooled vector as the only
position. Sentence encoders pool by the mean (Reimers & Gurevych 2019, arXiv:1908.10084); attention pooling after Yang
et al. 2016 (NAACL, N16-1174), which begins as the mean since w = 0.
"""

import torch
from torch import Tensor, nn


class MeanPooling(nn.Module):
    """The old head, on the mean of the text's hidden states."""

    READS = "attention_mask"  # swap hands it over: the model's attention mask (B, T) before each forward pass
    attention_mask: Tensor | None = None

    def __init__(self, old: nn.Module):
        super().__init__()
        self.old = old

    @classmethod
    def from_old(cls, old: nn.Module) -> "MeanPooling":
        """Around a module that takes (B, T, H) and reads position 0."""
        return cls(old)

    def weights(self, hidden: Tensor) -> Tensor:
        """(B, T, H) -> (B, T), which sum to one over each text and are zero on padding."""
        mask = self._mask(hidden).to(hidden.dtype)
        return mask / mask.sum(1, keepdim=True).clamp_min(1)

    def _mask(self, hidden: Tensor) -> Tensor:
        if self.attention_mask is None:
            return torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        return self.attention_mask.bool()

    def forward(self, hidden: Tensor, *args: object, **kwargs: object) -> Tensor:
        """(B, T, H) -> what the old head makes of (B, 1, H)."""
        pooled = (self.weights(hidden)[..., None] * hidden).sum(1, keepdim=True)  # (B, 1, H)
        return self.old(pooled, *args, **kwargs)  # type: ignore[no-any-return]


class AttentionPooling(MeanPooling):
    """The old head, on a learnt weighting of the text's hidden states."""

    def __init__(self, old: nn.Module):
        super().__init__(old)
        width = next(m for m in old.modules() if isinstance(m, nn.Linear)).in_features
        self.query = nn.Parameter(torch.zeros(width))  # (H,)

    def weights(self, hidden: Tensor) -> Tensor:
        """(B, T, H) -> (B, T): softmax in float32."""
        scores = (hidden.float() @ self.query.float()).masked_fill(~self._mask(hidden), float("-inf"))
        return scores.softmax(1).to(hidden.dtype)
