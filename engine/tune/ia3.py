"""IA3: learned scalings of keys, values and feed-forward activations (Liu et al. 2022, arXiv:2205.05638).

    key:  k' = l_k * (W_k x)        value:  v' = l_v * (W_v x)        feed-forward:  y = W_out (l_ff * gelu(W_in x))

Three vectors a block, begun at one: the model starts as the pretrained one. A scaling folds into its weight's rows
(keys, values) or columns (feed-forward), so a trained model is plain again.
"""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from engine.errors import InputError
from engine.freeze import train_only
from engine.layers._around import Around, load_named, replaced, shape_of
from engine.schema import Patterns, Tune
from engine.swap import find, swap

KEYS_AND_VALUES = "**.{key,value,k_proj,v_proj,k_lin,v_lin,key_proj,value_proj,k,v,c_attn,Wqkv}"
PEFT_TYPE = "IA3"
FEED_FORWARD = "**.{layer.*.output.dense,lin2,mlp.Wo,mlp.c_proj,down_proj,wo}"


class Options(Tune):
    """Where the scalings sit."""

    at: Patterns = Field([KEYS_AND_VALUES], description="Linear layers whose output is scaled.")
    feed_forward: Patterns | None = Field([FEED_FORWARD], description="Linear layers whose input is scaled; null for none.")


class Scaled(Around):
    """A frozen linear layer with a trainable vector on its output, or on its input."""

    def __init__(self, base: nn.Module, on_input: bool):
        super().__init__(base)
        d_out, d_in, _ = shape_of(base)
        self.on_input = on_input
        self.ia3_l = nn.Parameter(torch.ones(d_in if on_input else d_out))  # (in,) or (out,)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out); the bias is scaled with the output."""
        if self.on_input:
            return self.base(x * self.ia3_l)  # type: ignore[no-any-return]
        return self.base(x) * self.ia3_l  # type: ignore[no-any-return]

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The plain layer that computes the same. Changes the base in place."""
        over_rows = self.on_input == self.transposed  # the weight's first axis is the scaled one
        self.base.weight *= self.ia3_l[:, None] if over_rows else self.ia3_l  # type: ignore[operator]
        if not self.on_input and self.base.bias is not None:
            self.base.bias *= self.ia3_l  # type: ignore[operator]
        return self.base


def apply(model: nn.Module, options: Options, head: list[str]) -> str:
    """Wrap the matched layers, freeze the rest but the head; returns the coverage line."""

    def build(on_input: bool) -> Any:
        def make(old: nn.Module, path: str) -> nn.Module:
            shape_of(old, path)
            return Scaled(old, on_input)

        return make

    feed_forward = options.feed_forward or []
    both = set(find(model, options.at, "tune.at")) & set(find(model, feed_forward, "tune.feed_forward"))
    if both:
        raise InputError(f"tune.feed_forward: {min(both)} is matched by tune.at too")
    done = swap(model, options.at, build(False), where="tune.at")
    inputs = swap(model, feed_forward, build(True), where="tune.feed_forward")
    train_only(model, [f"{s.path}.ia3_l" for s in [*done, *inputs]] + head)
    return f"ia3: {len(done)} outputs and {len(inputs)} feed-forward inputs are scaled"


def merge(model: nn.Module) -> None:
    """Fold every scaling into its weight, in place."""
    for path, module in _scaled(model).items():
        replaced(model, path, module.merged())


def _scaled(model: nn.Module) -> dict[str, Scaled]:
    return {path: m for path, m in model.named_modules() if isinstance(m, Scaled)}


def peft(model: nn.Module, options: Options) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The peft package's config and tensors: ia3_l (out, 1), or (1, in) at a feed-forward."""
    layers = _scaled(model)
    config = {
        "peft_type": PEFT_TYPE, "target_modules": sorted(layers), "feedforward_modules": sorted(p for p, m in layers.items() if m.on_input),
        "init_ia3_weights": True, "fan_in_fan_out": any(m.transposed for m in layers.values()),
    }  # fmt: skip
    return config, {f"{path}.ia3_l": m.ia3_l[None, :] if m.on_input else m.ia3_l[:, None] for path, m in layers.items()}


def from_peft(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The options of an adapter that peft trained: its layers by their paths, told apart by the tensors' shapes."""
    paths = {name.removesuffix(".ia3_l"): t for name, t in tensors.items() if name.endswith(".ia3_l")}
    at = [path for path, t in paths.items() if t.shape[1] == 1]
    return {"method": "ia3", "at": at, "feed_forward": [path for path in paths if path not in at] or None}


def load_peft(model: nn.Module, options: Options, tensors: dict[str, Tensor]) -> None:
    """Put peft's tensors in."""
    load_named({f"{path}.ia3_l": m.ia3_l for path, m in _scaled(model).items()}, tensors)
