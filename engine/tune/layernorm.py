"""LayerNorm tuning: train the norms' scales and shifts, and the head (Zhao et al. 2024, arXiv:2312.11420).

    y = scale * (x - mean) / std + shift        scale and shift train, everything else is frozen

A few thousand numbers steer how strongly each feature speaks in every layer.
"""

from torch import nn

from engine.errors import InputError
from engine.freeze import is_norm, train_only
from engine.schema import Tune


class Options(Tune):
    """No options."""


def apply(model: nn.Module, options: Options, head: list[str]) -> str:
    """Freeze all but norms and head; returns the line that says what trains."""
    norms = [path for path, module in model.named_modules() if is_norm(module)]
    if not norms:
        raise InputError("tune.method: layernorm finds no norm in this architecture")
    train_only(model, norms + head)
    return f"layernorm: {len(norms)} norms train, with {', '.join(head)}"
