"""Bottleneck adapters: a small network at a frozen sublayer (Houlsby et al. 2019, arXiv:1902.00751).

    u(h) = up(act(down(h)))             x -> [ frozen projection ] -> h ----------------------> + -> y
    y = h + u(h)                                                      \\                        /
                                                                       `-> down -> act -> up -'

`down` takes H to a bottleneck H / reduction, `up` back. `up` starts at zero, so the model starts as the pretrained one.

    houlsby    one after the attention and one after the feed-forward of every block
    pfeiffer   only after the feed-forward, for half the parameters (Pfeiffer et al. 2021, arXiv:2005.00247)
    parallel   beside the feed-forward, from its input: y = FFN(x) + scaling * u(x), scaling = 4
               (He et al. 2022, arXiv:2110.04366)

Where a block ends in norm(h + x), as BERT's do, `after: norm` gives the bottleneck the normalised sum and adds what it
makes of it before the norm: y = norm(h + x + u(norm(h + x))). That is what adapter-hub computes under the name Pfeiffer.
"""

import math
from typing import Literal

from pydantic import Field
from torch import Tensor, nn
from transformers.activations import ACT2FN

from engine.errors import InputError
from engine.freeze import train_only
from engine.schema import Patterns, Tune
from engine.swap import swap
from engine.tune._bottleneck import Form, Site, check_activation, narrowed, places, width_of

STAYS = True  # a bottleneck does not fold into a plain weight: the saved model keeps its layers


class Options(Tune):
    """Placement and size."""

    placement: Literal["houlsby", "pfeiffer", "parallel"] = Field(
        "houlsby", description="After attention and feed-forward, after feed-forward alone, or beside feed-forward."
    )
    after: Literal["projection", "norm"] = Field(
        "projection", description="What houlsby and pfeiffer follow: the sublayer's last projection, or the norm after its sum."
    )
    at: Patterns | None = Field(None, description="Paths of the modules to wrap; by default those of the placement.")
    reduction: int = Field(16, ge=1, description="The bottleneck is the hidden size divided by this.")
    activation: str = Field("relu", description="The non-linearity between down and up.")
    scaling: float | None = Field(None, gt=0, description="Factor of what is added; by default 4 for parallel, else 1.")


class Adapter(Site):
    """A frozen module with a trainable bottleneck."""

    def __init__(self, base: nn.Module, form: Form, width: int, reduction: int, activation: str, scaling: float):
        super().__init__(base, form)
        self.scaling = scaling
        self.down = nn.Linear(width, max(1, width // reduction))
        self.up = nn.Linear(max(1, width // reduction), width)
        self.act = ACT2FN[activation]
        if form == "parallel":
            nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))  # as LoRA's A, the paper's choice
        else:
            nn.init.normal_(self.down.weight, std=1e-2)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def update(self, x: Tensor) -> Tensor:
        """(..., H) -> (..., H)."""
        u: Tensor = self.up(self.act(self.down(x)))
        return u if self.scaling == 1 else self.scaling * u


def form_of(options: Options) -> Form:
    """The form of the sites that these options ask for."""
    if options.placement != "parallel":
        return options.after
    if options.after == "norm":
        raise InputError("tune.after: norm has no meaning for the placement parallel; leave it out")
    return "parallel"


def scaling_of(options: Options) -> float:
    """The factor of what is added."""
    return options.scaling or (4.0 if options.placement == "parallel" else 1.0)


def apply(model: nn.Module, options: Options, head: list[str]) -> str:
    """Put the adapters in, freeze the rest but the head; returns the coverage line."""
    check_activation(options.activation)
    form, scaling = form_of(options), scaling_of(options)

    def build(old: nn.Module, path: str) -> nn.Module:
        width = width_of(old, path, form)
        narrowed(width, options.reduction)
        return Adapter(old, form, width, options.reduction, options.activation, scaling)

    where = "tune.after: norm" if form == "norm" and not options.at else "tune.at"
    done = swap(model, options.at or places(options.placement, form), build, where=where)
    train_only(model, [f"{s.path}.{part}" for s in done for part in ("down", "up")] + head)
    return f"adapter: {len(done)} bottlenecks ({options.placement}, H / {options.reduction})"
