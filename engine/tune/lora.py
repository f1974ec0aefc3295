"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv:2106.09685).

    y = W x + b  +  scaling * B A dropout(x)          scaling = alpha / r

            x (.., in) -------------> W (out, in) frozen ------> + --> y (.., out)
                 \\                                              /
                  `--> A (r, in) --> (.., r) --> B (out, r) --'

Only A and B train: r * (in + out) numbers instead of in * out. B starts at zero, so at the first step the model is
the pretrained one; A starts as a linear layer's weight does. Afterwards W + scaling * B A is a plain weight again.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn

from engine.errors import InputError
from engine.freeze import train_only
from engine.schema import Patterns, Tune
from engine.swap import swap

# the query and value projections under the names that transformers' architectures give them
ATTENTION = "**.{query,value,q_proj,v_proj,q_lin,v_lin,query_proj,value_proj,q,v,c_attn,Wqkv}"


class Options(Tune):
    """Low-rank updates beside frozen linear layers."""

    at: Patterns = Field([ATTENTION], description="Paths of the linear layers to adapt; query and value by default.")
    r: int = Field(8, ge=1, description="Rank of the update.")
    alpha: float = Field(16, gt=0, description="The update is scaled by alpha / r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the update's input.")


class LoRALinear(nn.Module):
    """A frozen nn.Linear (or GPT-2's Conv1D, its transpose) with a trainable low-rank update beside it."""

    def __init__(self, base: nn.Module, r: int, alpha: float, dropout: float = 0.0):
        super().__init__()
        self.transposed = type(base).__name__ == "Conv1D"  # holds its weight as (in, out)
        rows, columns = base.weight.shape  # type: ignore[misc]
        d_out, d_in = (columns, rows) if self.transposed else (rows, columns)
        self.base, self.r, self.alpha, self.scaling = base, r, alpha, alpha / r
        self.lora_A = nn.Parameter(torch.empty(r, d_in))  # (r, in)
        self.lora_B = nn.Parameter(torch.zeros(d_out, r))  # (out, r)
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        update = self.dropout(x) @ self.lora_A.T @ self.lora_B.T  # (..., out)
        return self.base(x) + self.scaling * update  # type: ignore[no-any-return]

    @property
    def weight(self) -> Tensor:  # some architectures look at their layers' dtype
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias  # type: ignore[return-value]

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The plain layer that computes the same: W + scaling * B A. Changes the base in place."""
        update = self.scaling * (self.lora_B @ self.lora_A)  # (out, in)
        self.base.weight += update.T if self.transposed else update  # type: ignore[operator]
        return self.base


def apply(model: nn.Module, options: Options, head: list[str]) -> str:
    """Wrap the matched layers, freeze the rest but the head; returns the coverage line."""

    def build(old: nn.Module, path: str) -> nn.Module:
        if not isinstance(old, nn.Linear) and type(old).__name__ != "Conv1D":
            raise InputError(f"tune.at: {path} is a {type(old).__name__}; lora adapts linear layers")
        return LoRALinear(old, options.r, options.alpha, options.dropout)

    linear = sum(isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D" for m in model.modules())
    done = swap(model, options.at, build, where="tune.at")
    train_only(model, [f"{s.path}.{name}" for s in done for name in ("lora_A", "lora_B")] + head)
    return f"lora: {len(done)} of {linear} linear layers, r = {options.r}"


def adapted(model: nn.Module) -> dict[str, LoRALinear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, LoRALinear)}


def merge(model: nn.Module) -> None:
    """Fold every update into its base weight, in place: the model is plain again and computes the same."""
    for path, module in adapted(model).items():
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module.merged())


def save(model: Any, folder: Path, options: Options, head: list[str], base: dict[str, Any]) -> None:
    """Write the layout that the peft package reads: adapter_config.json and adapter_model.safetensors.

    `base` holds name, revision and task_type for the config.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for path, module in adapted(model).items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = module.lora_A
        tensors[f"base_model.model.{path}.lora_B.weight"] = module.lora_B
    for path in head:
        for name, parameter in model.get_submodule(path).named_parameters():
            tensors[f"base_model.model.{path}.{name}"] = parameter
    layers = adapted(model)
    config = {
        "peft_type": "LORA",
        "task_type": base["task_type"],
        "base_model_name_or_path": base["name"],
        "revision": base["revision"],
        "r": options.r,
        "lora_alpha": options.alpha,
        "lora_dropout": options.dropout,
        "target_modules": sorted(layers),
        "modules_to_save": head,
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": any(m.transposed for m in layers.values()),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    save_file(
        {k: t.detach().cpu().contiguous() for k, t in tensors.items()}, folder / "adapter_model.safetensors", {"format": "pt"}
    )
