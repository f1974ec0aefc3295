"""BitFit: train the biases alone, and the head (Ben Zaken et al. 2022, arXiv:2106.10199).

    y = W x + b        W frozen, b trains

Biases are about 0.1 % of a transformer, yet moving them shifts what every layer reacts to.
"""

from torch import nn

from engine.errors import InputError
from engine.freeze import train_only
from engine.schema import Tune


class Options(Tune):
    """No options."""


def apply(model: nn.Module, options: Options, head: list[str]) -> str:
    """Freeze all but biases and head; returns the line that says what trains."""
    train_only(model, head)
    biases = 0
    for name, parameter in model.named_parameters():
        if name.endswith(".bias") and not parameter.requires_grad:
            parameter.requires_grad_(True)
            biases += 1
    if not biases:
        raise InputError("tune.method: bitfit needs biases, and this architecture has none; lora or last_n fit it")
    return f"bitfit: {biases} biases train, with {', '.join(head)}"
