"""RMSNorm: LayerNorm without the mean and the shift (Zhang & Sennrich 2019, arXiv:1910.07467).

    LayerNorm:  y = w * (x - mean(x)) / sqrt(var(x) + eps) + b
    RMSNorm:    y = w * x / sqrt(mean(x^2) + eps)

    swap: [{at: "**.LayerNorm", with: "engine.layers.rmsnorm:RMSNorm"}]

The scale w is carried over from the LayerNorm it replaces, the shift b is dropped; on inputs whose mean is zero the two
differ by b alone.
"""

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Normalise the last axis by its root mean square."""

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))  # (C,)
        self.eps = eps

    @classmethod
    def from_old(cls, old: nn.LayerNorm, eps: float | None = None) -> "RMSNorm":
        """In the place of a LayerNorm over the last axis."""
        if not isinstance(old, nn.LayerNorm) or len(old.normalized_shape) != 1:
            raise TypeError(f"RMSNorm replaces a LayerNorm over one axis, not a {type(old).__name__}")
        return cls(old.normalized_shape[0], old.eps if eps is None else eps)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C); the mean is taken in float32."""
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)  # (..., 1)
        return (x.float() * scale).to(x.dtype) * self.weight
