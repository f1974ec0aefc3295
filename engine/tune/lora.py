"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv:2106.09685).

    y = W x + b  +  scaling * B A dropout(x)          scaling = alpha / r

            x (.., in) -------------> W (out, in) frozen ------> + --> y (.., out)
                 \\                                              /
                  `--> A (r, in) --> (.., r) --> B (out, r) --'

Only A and B train: r * (in + out) numbers instead of in * out. B starts at zero, so at the first step the model is
the pretrained one; A starts as a linear layer's weight does. Afterwards W + scaling * B A is a plain weight again.

    rslora   scaling = alpha / sqrt(r): a high rank no longer learns slower (Kalajdzievski 2023, arXiv:2312.03732)
    dora     the direction is adapted by LoRA and its length by a vector m of its own, for each output
             (Liu et al. 2024, arXiv:2402.09353):   W' = m * (W + scaling * B A) / |W + scaling * B A|
    quantize QLoRA: the frozen weights are held in 4 bits (nf4) or 8 (int8), see engine/layers/quantized.py; what is
             merged and saved is the quantised weight plus the update, as plain floats (arXiv:2305.14314)
    b_rate   LoRA+: B learns this many times faster than A (Hayou et al. 2024, arXiv:2402.12354)
"""

import math
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from engine.errors import InputError
from engine.freeze import train_only
from engine.layers import quantized
from engine.schema import Patterns, Tune
from engine.swap import matches, swap
from engine.tune._around import Around, replaced, shape_of, write_peft

# the query and value projections under the names that transformers' architectures give them
ATTENTION = "**.{query,value,q_proj,v_proj,q_lin,v_lin,query_proj,value_proj,q,v,c_attn,Wqkv}"


class Options(Tune):
    """Low-rank updates beside frozen linear layers."""

    at: Patterns = Field([ATTENTION], description="Paths of the linear layers to adapt; query and value by default.")
    r: int = Field(8, ge=1, description="Rank of the update.")
    alpha: float = Field(16, gt=0, description="The update is scaled by alpha / r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the update's input.")
    rslora: bool = Field(False, description="Scale by alpha / sqrt(r) instead.")
    dora: bool = Field(False, description="Learn length and direction of each weight row apart.")
    b_rate: float = Field(1.0, gt=0, description="LoRA+: the learning rate of B over that of A.")
    r_pattern: dict[str, int] = Field(default_factory=dict, description="Path pattern -> rank of the layers it matches.")
    alpha_pattern: dict[str, float] = Field(default_factory=dict, description="Path pattern -> alpha of the layers it matches.")
    quantize: Literal["nf4", "int8"] | None = Field(None, description="QLoRA: hold frozen weights of the blocks in 4 or 8 bits.")
    block: int = Field(64, ge=2, multiple_of=2, description="nf4: so many weights share a scale.")
    double_quant: bool = Field(True, description="nf4: quantise the scales too.")


class LoRALinear(Around):
    """A frozen nn.Linear (or Conv1D) with a trainable low-rank update beside it."""

    def __init__(self, base: nn.Module, r: int, alpha: float, dropout: float = 0.0, rslora: bool = False, dora: bool = False):
        super().__init__(base)
        d_out, d_in, _ = shape_of(base)
        self.r, self.alpha = r, alpha
        self.scaling = alpha / math.sqrt(r) if rslora else alpha / r
        self.lora_A = nn.Parameter(torch.empty(r, d_in))  # (r, in)
        self.lora_B = nn.Parameter(torch.zeros(d_out, r))  # (out, r)
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.dropout = nn.Dropout(dropout)
        self.magnitude = nn.Parameter(self.rows().norm(dim=1).detach().clone()) if dora else None  # (out,)

    def rows(self) -> Tensor:
        """The base weight as (out, in)."""
        weight: Tensor = self.base.weight  # type: ignore[assignment]
        return weight.T if self.transposed else weight

    def length(self) -> Tensor:
        """m / |W + scaling * B A| for each output, (out, 1); the norm counts as a constant, as the paper has it."""
        assert self.magnitude is not None
        directions = self.rows() + self.scaling * (self.lora_B @ self.lora_A)  # (out, in)
        return (self.magnitude / directions.norm(dim=1).detach())[:, None]

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        update = self.scaling * (self.dropout(x) @ self.lora_A.T @ self.lora_B.T)  # (..., out)
        y = self.base(x)  # (..., out)
        if self.magnitude is None:
            return y + update  # type: ignore[no-any-return]
        bias = 0.0 if self.bias is None else self.bias
        return self.length()[:, 0] * (y - bias + update) + bias  # type: ignore[no-any-return]

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The plain layer that computes the same. Changes the base in place."""
        base = self.plain_base()
        rows = self.rows() + self.scaling * (self.lora_B @ self.lora_A)
        if self.magnitude is not None:
            rows = self.length() * rows
        conv1d = type(base).__name__ == "Conv1D"
        base.weight.copy_(rows.T if conv1d else rows)  # type: ignore[operator]
        return base


def apply(model: nn.Module, options: Options, head: list[str]) -> str:
    """Wrap the matched layers, freeze the rest but the head; returns the coverage line."""
    linear = sum(isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D" for m in model.modules())
    used: set[str] = set()
    how: Any = (options.quantize, options.block, options.double_quant)

    def chosen(patterns: dict[str, Any], path: str, default: Any) -> Any:
        hit = [p for p in patterns if matches(p, path)]
        used.update(hit)
        return patterns[hit[-1]] if hit else default

    def build(old: nn.Module, path: str) -> nn.Module:
        shape_of(old, path)
        r, alpha = chosen(options.r_pattern, path, options.r), chosen(options.alpha_pattern, path, options.alpha)
        base = quantized.QuantizedLinear.from_old(old, *how) if options.quantize else old
        return LoRALinear(base, r, alpha, options.dropout, options.rslora, options.dora)

    done = swap(model, options.at, build, where="tune.at")
    unused = [p for p in (*options.r_pattern, *options.alpha_pattern) if p not in used]
    if unused:
        raise InputError(f"tune.r_pattern, tune.alpha_pattern: '{unused[0]}' matches none of the {len(done)} adapted layers")
    train_only(model, [f"{s.path}.{name}" for s in done for name in ("lora_A", "lora_B", "magnitude")] + head)
    if options.quantize:
        quantized.quantize_blocks(model, *how)
    kind = "dora" if options.dora else "rslora" if options.rslora else "lora"
    held = f"; {quantized.said(model)}" if options.quantize else ""
    return f"{kind}: {len(done)} of {linear} linear layers, r = {options.r}{held}"


def rates(model: nn.Module, options: Options) -> dict[str, float]:
    """Parameter name -> factor of the learning rate, where it is not 1."""
    if options.b_rate == 1.0:
        return {}
    return {f"{path}.lora_B": options.b_rate for path in adapted(model)}


def adapted(model: nn.Module) -> dict[str, LoRALinear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, LoRALinear)}


def merge(model: nn.Module) -> None:
    """Fold every update into its base weight, in place: the model is plain again and computes the same."""
    for path, module in adapted(model).items():
        replaced(model, path, module.merged())
    for path, layer in quantized.quantized(model).items():
        replaced(model, path, layer.plain())


def save(model: Any, folder: Path, options: Options, head: list[str], base: dict[str, Any]) -> None:
    """Write adapter/ as the peft package reads it; `base` holds name, revision and task_type."""
    layers = adapted(model)
    tensors: dict[str, Tensor] = {}
    for path, m in layers.items():
        tensors |= {f"{path}.lora_A.weight": m.lora_A, f"{path}.lora_B.weight": m.lora_B}
        if m.magnitude is not None:
            tensors[f"{path}.lora_magnitude_vector"] = m.magnitude
    config = {
        "peft_type": "LORA", "r": options.r, "lora_alpha": options.alpha, "lora_dropout": options.dropout,
        "target_modules": sorted(layers), "bias": "none", "init_lora_weights": True,
        "rank_pattern": {path: m.r for path, m in layers.items() if m.r != options.r},
        "alpha_pattern": {path: m.alpha for path, m in layers.items() if m.alpha != options.alpha},
        "use_rslora": options.rslora, "use_dora": options.dora,
        "fan_in_fan_out": any(m.transposed or getattr(m.base, "conv1d", False) for m in layers.values()),
    }  # fmt: skip
    write_peft(folder, model, head, tensors, base, config)
