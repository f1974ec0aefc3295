"""Train the last n blocks, what comes after them, and the head; freeze the embeddings and the lower blocks.

    embeddings - block 0 - block 1 - ... - block L-n - ... - block L-1 - pooler - head
    [------------- frozen -------------] [----------------- trains ----------------]

Lower layers hold general features and upper ones the task's (Yosinski et al. 2014, arXiv:1411.1792). Nothing is
computed backwards below the lowest block that trains, so a step is cheaper as well.
"""

from pydantic import Field
from torch import nn

from engine.errors import InputError
from engine.freeze import layout, train_only
from engine.schema import Tune


class Options(Tune):
    """n = 0 trains the head alone, on a frozen body."""

    n: int = Field(2, ge=0, description="How many of the upper blocks train.")


def apply(model: nn.Module, options: Options, head: list[str]) -> str:
    """Freeze by path; returns the line that says what trains."""
    parts = layout(model, head)
    if options.n > len(parts.blocks):
        raise InputError(f"tune.n: {options.n} is more than this model's {len(parts.blocks)} blocks")
    upper = parts.blocks[len(parts.blocks) - options.n :] if options.n else []
    train_only(model, [*upper, *(parts.after if options.n else []), *parts.head])
    return f"last_n: {options.n} of {len(parts.blocks)} blocks train, with {', '.join(parts.head)}"
