"""SwiGLU: a feed-forward whose activation is a learned gate (Shazeer 2020, arXiv:2002.05202).

    before:  act(W x)                    (B, T, H) -> (B, T, F)
    SwiGLU:  silu(G x) * (W x)           G (F, H) is new, W is carried over

    swap: [{at: "**.intermediate", with: "engine.layers.swiglu:SwiGLU"}]         # BERT, RoBERTa, ELECTRA

It takes the place of the module that expands H to F; the projection back stays as it is.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class SwiGLU(nn.Module):
    """silu(gate(x)) * value(x)."""

    def __init__(self, value: nn.Linear):
        super().__init__()
        self.value = value  # (H -> F), the old weights
        self.gate = nn.Linear(value.in_features, value.out_features, bias=value.bias is not None)  # (H -> F), fresh

    @classmethod
    def from_old(cls, old: nn.Module) -> "SwiGLU":
        """Around the one linear layer of the module it replaces."""
        linear = [m for m in old.modules() if isinstance(m, nn.Linear)]
        if len(linear) != 1:
            raise TypeError(f"SwiGLU replaces a module with one linear layer; {type(old).__name__} has {len(linear)}")
        return cls(linear[0])

    def forward(self, x: Tensor) -> Tensor:
        """(..., H) -> (..., F)."""
        return F.silu(self.gate(x)) * self.value(x)  # type: ignore[no-any-return]
