"""What the methods that wrap a linear layer share: the wrapper's shape, taking it out again, the peft package's files."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
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


class Around(nn.Module):
    """A frozen linear layer `base` with something that trains around it."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        self.transposed = shape_of(base)[2]

    def plain_base(self) -> nn.Module:
        """The base with float weights, to fold something into; a quantised one is made plain for good."""
        return self.base.plain() if isinstance(self.base, QuantizedLinear) else self.base

    @property
    def weight(self) -> Tensor:  # some architectures look at their layers' weight and dtype
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias  # type: ignore[return-value]


def replaced(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at `path`."""
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def write_peft(
    folder: Path, model: Any, head: list[str], tensors: dict[str, Tensor], base: dict[str, Any], config: dict[str, Any]
) -> None:
    """adapter_config.json and adapter_model.safetensors as the peft package reads them.

    `tensors` are named by their path in the model; `base` holds name, revision and task_type; `config` the method's keys.
    """
    folder.mkdir(parents=True, exist_ok=True)
    heads = {f"{path}.{name}": p for path in head for name, p in model.get_submodule(path).named_parameters()}
    common = {
        "task_type": base["task_type"], "base_model_name_or_path": base["name"], "revision": base["revision"],
        "modules_to_save": head, "inference_mode": True,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps({**config, **common}, indent=2) + "\n", "utf-8")
    plain = {f"base_model.model.{name}": t.detach().cpu().contiguous() for name, t in {**tensors, **heads}.items()}
    save_file(plain, folder / "adapter_model.safetensors", {"format": "pt"})
