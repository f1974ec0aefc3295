"""Full fine-tuning: every parameter of the model trains.

The strongest method where the data are many and memory allows: weights, gradients and AdamW's two averages take
16 bytes a parameter in float32.
"""

from torch import nn

from engine.schema import Tune


class Options(Tune):
    """No options."""


def apply(model: nn.Module, options: Options, head: list[str]) -> str:
    """Let everything train; returns the line that says so."""
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return "full: every parameter trains"
