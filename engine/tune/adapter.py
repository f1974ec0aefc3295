"""Bottleneck adapters: a small network after a frozen sublayer (Houlsby et al. 2019, arXiv:1902.00751).

    h = sublayer(x)                     x -> [ frozen projection ] -> h ----------------------> + -> y
    y = h + up(act(down(h)))                                          \\                        /
                                                                       `-> down -> act -> up -'

`down` takes H to a bottleneck H / reduction, `up` back. `up` starts at zero, so the model starts as the pretrained one.
`houlsby` puts one after the attention and one after the feed-forward of every block; `pfeiffer` (Pfeiffer et al. 2021,
arXiv:2005.00247) only after the feed-forward, for half the parameters.
"""

from typing import Literal

from pydantic import Field
from torch import Tensor, nn
from transformers.activations import ACT2FN

from engine.errors import InputError, nearest
from engine.freeze import train_only
from engine.layers._around import Around, shape_of
from engine.schema import Patterns, Tune
from engine.swap import swap

# the projections that end an attention, and a feed-forward, under the names of transformers' architectures
AFTER_ATTENTION = (
    "**.{attention.output.dense,attention.out_lin,attn.Wo,attn.c_proj,self_attn.o_proj,SelfAttention.o,EncDecAttention.o}"
)
AFTER_FEED_FORWARD = "**.{layer.*.output.dense,lin2,mlp.Wo,mlp.c_proj,down_proj,wo}"


STAYS = True  # a bottleneck does not fold into a plain weight: the saved model keeps its layers


class Options(Tune):
    """Placement and size."""

    placement: Literal["houlsby", "pfeiffer"] = Field(
        "houlsby", description="After attention and feed-forward, or feed-forward alone."
    )
    at: Patterns | None = Field(None, description="Paths of the projections to follow; by default those of the placement.")
    reduction: int = Field(16, ge=1, description="The bottleneck is the hidden size divided by this.")
    activation: str = Field("relu", description="The non-linearity between down and up.")


class Adapter(Around):
    """A frozen projection, followed by a trainable bottleneck around which its output is carried on."""

    def __init__(self, base: nn.Module, width: int, reduction: int, activation: str):
        super().__init__(base)
        self.down = nn.Linear(width, max(1, width // reduction))
        self.up = nn.Linear(max(1, width // reduction), width)
        self.act = ACT2FN[activation]
        nn.init.normal_(self.down.weight, std=1e-2)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., H)."""
        h = self.base(x)
        return h + self.up(self.act(self.down(h)))  # type: ignore[no-any-return]


def apply(model: nn.Module, options: Options, head: list[str]) -> str:
    """Put the adapters in, freeze the rest but the head; returns the coverage line."""
    if options.activation not in ACT2FN:
        raise InputError(f"tune.activation: no activation '{options.activation}'{nearest(options.activation, ACT2FN)}")
    places = options.at or ([AFTER_FEED_FORWARD] if options.placement == "pfeiffer" else [AFTER_ATTENTION, AFTER_FEED_FORWARD])

    def build(old: nn.Module, path: str) -> nn.Module:
        d_out, _, _ = shape_of(old, path)
        return Adapter(old, d_out, options.reduction, options.activation)

    done = swap(model, places, build, where="tune.at")
    train_only(model, [f"{s.path}.{part}" for s in done for part in ("down", "up")] + head)
    return f"adapter: {len(done)} bottlenecks ({options.placement}, H / {options.reduction})"
