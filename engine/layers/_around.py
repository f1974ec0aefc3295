"""What the methods that wrap a linear layer share: the wrapper's shape, taking it out again, filling it by name."""

import torch
from torch import Tensor, nn

from engine.errors import InputError
from engine.layers.quantized import QuantizedLinear


def shape_of(layer: nn.Module, path: str = "") -> tuple[int, int, bool]:
    """(out, in, transposed) of an nn.Linear, or of GPT-2's Conv1D, which holds its weight as (in, out)."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features, False
    if type(layer).__name__ == "Conv1D":
        d_in, d_out = layer.weight.shape  # type: ignore[misc]
        return int(d_out), int(d_in), True
    if isinstance(layer, QuantizedLinear):
        if path:  # nobody's but the method's own can be made plain again for model/
            raise InputError(f"tune.at: {path} is quantised by swap; take it out there and set tune.quantize (lora)")
        return layer.out_features, layer.in_features, False
    raise InputError(f"tune.at: {path} is a {type(layer).__name__}; this method adapts linear layers")


class Wrapped(nn.Module):
    """A module that stands where `base` stood, and shows its weight and bias: some architectures look at their layers' dtype."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base

    @property
    def weight(self) -> Tensor:
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias  # type: ignore[return-value]


class Around(Wrapped):
    """A frozen linear layer `base` with something that trains around it."""

    def __init__(self, base: nn.Module):
        super().__init__(base)
        self.transposed = shape_of(base)[2]

    def plain_base(self) -> nn.Module:
        """The base with float weights, to fold something into; a quantised one is made plain for good."""
        return self.base.plain() if isinstance(self.base, QuantizedLinear) else self.base


def replaced(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at `path`."""
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def load_named(mapping: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    """Copy `tensors` over the parameters in `mapping`, both by peft's names; every one must have its match."""
    odd = sorted(mapping.keys() ^ tensors.keys())
    if odd:
        raise InputError(f"{len(odd)} tensors have no match, such as {odd[0]}")
    with torch.no_grad():
        for name, parameter in mapping.items():
            if parameter.numel() != tensors[name].numel():
                raise InputError(f"{name} is {tuple(tensors[name].shape)}, where {tuple(parameter.shape)} is needed")
            parameter.copy_(tensors[name].view_as(parameter))
