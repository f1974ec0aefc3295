"""Where a bottleneck goes: the sites that adapters, compacters and fusions share.

A site wraps a frozen module `base` and adds what `update` computes. It keeps nothing between calls, so gradient
checkpointing, nested calls and torch.compile need no care. Four forms:

    projection   h = base(x);  h + update(h)              after the linear layer that ends a sublayer
    norm         base(s + update(base(s)))                at the norm of a residual sum s = h + x, where it follows the sum
    parallel     base(x) + update(x)                      beside a whole feed-forward: DistilBERT's, Llama's, GPT-2's, T5's
    parallel     base(h, x + update(x))                   the same in BERT's family, see below

BERT spreads its feed-forward over two modules, and the second is handed the feed-forward's input x beside the wide
intermediate h, for the residual sum: output(h, x) = norm(dense(h) + x). Adding the update to x puts it into that sum.

    x --+--> intermediate --> h --> [ dense ] --> + --> norm --> y
        |                                         ^
        `----> + update(x) -----------------------'
"""

import inspect
from abc import ABC, abstractmethod
from typing import Literal

from torch import Tensor, nn
from transformers.activations import ACT2FN

from engine.errors import InputError, nearest
from engine.freeze import is_norm
from engine.layers._around import Wrapped, shape_of

Form = Literal["projection", "norm", "parallel"]

# the module that a form wraps in an attention and in a feed-forward, under the names of transformers' architectures
AFTER_ATTENTION: dict[str, str] = {
    "projection": "**.{attention.output.dense,attention.out_lin,attn.Wo,attn.c_proj,self_attn.o_proj,SelfAttention.o,"
    "EncDecAttention.o}",
    "norm": "**.{attention.output.LayerNorm,sa_layer_norm}",
}
AFTER_FEED_FORWARD: dict[str, str] = {
    "projection": "**.{layer.*.output.dense,lin2,mlp.Wo,mlp.c_proj,down_proj,wo}",
    "norm": "**.{layer.*.output.LayerNorm,output_layer_norm}",
    "parallel": "**.{layer.*.output,ffn,mlp,DenseReluDense}",
}


class Site(Wrapped, ABC):
    """A frozen module with an update of its output, in one of the four forms."""

    def __init__(self, base: nn.Module, form: Form):
        super().__init__(base)
        self.form = form

    @abstractmethod
    def update(self, x: Tensor) -> Tensor:
        """What is added: (..., H) -> (..., H)."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """`x` is what the base takes, `residual` the second input of BERT's output modules, (..., H)."""
        if self.form == "projection":
            h = self.base(x)
            return h + self.update(h)  # type: ignore[no-any-return]
        if self.form == "norm":
            return self.base(x + self.update(self.base(x)))  # type: ignore[no-any-return]
        if residual is None:
            return self.base(x) + self.update(x)  # type: ignore[no-any-return]
        return self.base(x, residual + self.update(residual))  # type: ignore[no-any-return]


def places(placement: str, form: Form) -> list[str]:
    """The patterns of a placement: `houlsby` both sublayers, `pfeiffer` and `parallel` the feed-forward."""
    return [AFTER_ATTENTION[form], AFTER_FEED_FORWARD[form]] if placement == "houlsby" else [AFTER_FEED_FORWARD[form]]


def width_of(base: nn.Module, path: str, form: Form) -> int:
    """H at the module that a form wraps; a module of another kind is an InputError."""
    if form == "projection":
        return shape_of(base, path)[0]
    if form == "norm":
        if not is_norm(base):
            raise InputError(f"tune.at: {path} is a {type(base).__name__}; after: norm wraps a norm")
        return next(base.parameters()).numel()
    linear = [m for name, m in base.named_modules() if name and (isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D")]
    takes = [p for p in inspect.signature(base.forward).parameters.values() if p.default is p.empty]
    if not linear or len(takes) > 2:
        raise InputError(f"tune.at: {path} is a {type(base).__name__}; a parallel adapter stands beside a whole feed-forward")
    return shape_of(linear[-1], path)[0]


def narrowed(width: int, reduction: int) -> int:
    """The bottleneck's size; nothing left of the hidden size is an InputError."""
    if reduction > width:
        raise InputError(f"tune.reduction: {reduction} leaves nothing of the hidden size {width}; write at most {width}")
    return width // reduction


def check_activation(name: str) -> None:
    """An activation that transformers does not know is an InputError."""
    if name not in ACT2FN:
        raise InputError(f"tune.activation: no activation '{name}'{nearest(name, ACT2FN)}")
