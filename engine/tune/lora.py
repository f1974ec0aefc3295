"""LoRA as a method: which layers get a low-rank update, what trains, how it is merged and exchanged with peft.

The layer, its formula and its drawing are in engine/layers/lora.py. Variants: rslora, dora, b_rate (LoRA+), init: pissa, quantize (QLoRA).
"""

import math
import re
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor, nn

from engine.errors import InputError
from engine.freeze import train_only
from engine.layers import quantized
from engine.layers._around import load_named, replaced, shape_of
from engine.layers.lora import LoRAEmbedding, LoRALinear
from engine.schema import Pattern, Patterns, Tune
from engine.swap import matches, swap

PEFT_TYPE = "LORA"
# the query and value projections under the names that transformers' architectures give them
ATTENTION = "**.{query,value,q_proj,v_proj,q_lin,v_lin,query_proj,value_proj,q,v,c_attn,Wqkv}"

Rank = Annotated[int, Field(ge=1)]
Alpha = Annotated[float, Field(gt=0, le=1e6)]


class Options(Tune):
    """Low-rank updates beside frozen linear layers."""

    at: Patterns = Field([ATTENTION], description="Paths of linear layers or embeddings to adapt; query and value by default.")
    r: Rank = Field(8, description="Rank of the update.")
    alpha: Alpha = Field(16, description="The update is scaled by alpha / r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the update's input.")
    rslora: bool = Field(False, description="Scale by alpha / sqrt(r) instead.")
    dora: bool = Field(False, description="Learn length and direction of each weight row apart.")
    b_rate: float = Field(1.0, gt=0, le=1e6, description="LoRA+: the learning rate of B over that of A.")
    init: Literal["zero", "pissa"] = Field("zero", description="B from zero, or both from the weight's principal part (PiSSA).")
    r_pattern: dict[Pattern, Rank] = Field(default_factory=dict, description="Path pattern -> rank of the layers it matches.")
    alpha_pattern: dict[Pattern, Alpha] = Field(default_factory=dict, description="Path pattern -> alpha of the layers it matches.")
    quantize: Literal["nf4", "int8"] | None = Field(None, description="QLoRA: hold frozen weights of the blocks in 4 or 8 bits.")
    block: int = Field(64, ge=2, le=4096, multiple_of=2, description="nf4: so many weights share a scale.")
    double_quant: bool = Field(True, description="nf4: quantise the scales too.")


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
        r, alpha = chosen(options.r_pattern, path, options.r), chosen(options.alpha_pattern, path, options.alpha)
        if type(old) is nn.Embedding:
            _check_embedding(model, old, path, options)
            return LoRAEmbedding(old, r, alpha, options.rslora)
        out, wide, _ = shape_of(old, path)
        if r > max(out, wide) and not options.start:  # what another trained, PiSSA's twice the rank for instance, may be higher
            key = "tune.r_pattern" if any(matches(p, path) for p in options.r_pattern) else "tune.r"
            raise InputError(f"{key}: {r} is more than {path} is wide ({out} x {wide}); a rank is far smaller, such as 8")
        fresh = any(path == part or path.startswith(part + ".") for part in head)  # the head trains whole: it stays in float
        base = quantized.QuantizedLinear.from_old(old, *how) if options.quantize and not fresh else old
        return LoRALinear(base, r, alpha, options.dropout, options.rslora, options.dora, options.init == "pissa")

    done = swap(model, options.at, build, where="tune.at")
    unused = [p for p in (*options.r_pattern, *options.alpha_pattern) if p not in used]
    if unused:
        raise InputError(f"tune.r_pattern, tune.alpha_pattern: '{unused[0]}' matches none of the {len(done)} adapted layers")
    train_only(model, [f"{s.path}.{name}" for s in done for name in ("lora_A", "lora_B", "magnitude")] + head)
    kind = "dora" if options.dora else "rslora" if options.rslora else "pissa" if options.init == "pissa" else "lora"
    if options.quantize:
        quantized.quantize_blocks(model, *how)
    tables = sum(s.old.startswith("Embedding") for s in done)
    layers = f"{len(done) - tables} of {linear} linear layers" + (f" and {tables} embeddings" if tables else "")
    return f"{kind}: {layers}, r = {options.r}" + (f"; {quantized.said(model)}" if options.quantize else "")


def _check_embedding(model: nn.Module, old: nn.Embedding, path: str, options: Options) -> None:
    if options.dora or options.init == "pissa" or options.dropout:
        raise InputError(f"tune.at: {path} is an embedding; dora, pissa and dropout are for linear layers")
    shared = [name for name, p in model.named_parameters(remove_duplicate=False) if p is old.weight]
    if len(shared) > 1:
        other = next(name for name in shared if not name.startswith(path + "."))
        raise InputError(f"tune.at: {path} is tied to {other}; an update on one of them could never be merged")


def rates(model: nn.Module, options: Options) -> dict[str, float]:
    """Parameter name -> factor of the learning rate, where it is not 1."""
    if options.b_rate == 1.0:
        return {}
    return {f"{path}.lora_B": options.b_rate for path in adapted(model)}


def adapted(model: nn.Module) -> dict[str, LoRALinear | LoRAEmbedding]:
    return {path: module for path, module in model.named_modules() if isinstance(module, LoRALinear | LoRAEmbedding)}


def merge(model: nn.Module) -> None:
    """Fold every update into its base weight, in place: the model is plain again and computes the same."""
    for path, module in adapted(model).items():
        replaced(model, path, module.merged())
    for path, layer in quantized.quantized(model).items():
        replaced(model, path, layer.plain())


def peft(model: nn.Module, options: Options) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The peft package's config and tensors."""
    layers = adapted(model)
    tensors = {f"{path}.{name}": t for path, m in layers.items() for name, t in m.for_peft().items()}
    double = 2 if options.init == "pissa" else 1  # PiSSA is written as plain LoRA of twice the rank and the same scaling
    grown = math.sqrt(double) if options.rslora else double
    config = {
        "peft_type": PEFT_TYPE, "r": double * options.r, "lora_alpha": grown * options.alpha, "lora_dropout": options.dropout,
        "target_modules": sorted(layers), "bias": "none", "init_lora_weights": True,
        "rank_pattern": {path: double * m.r for path, m in layers.items() if m.r != options.r},
        "alpha_pattern": {path: grown * m.alpha for path, m in layers.items() if m.alpha != options.alpha},
        "use_rslora": options.rslora, "use_dora": options.dora,
        "fan_in_fan_out": any(getattr(m, "transposed", False) or getattr(m.base, "conv1d", False) for m in layers.values()),
    }  # fmt: skip
    return config, tensors


def from_peft(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The options of an adapter that peft trained. Layers and ranks are read from the tensors, so no pattern is guessed."""
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        raise InputError("bias: peft trained biases besides; merge it there, or train without")
    ranks = {name.rpartition(".lora_A.weight")[0]: len(t) for name, t in tensors.items() if name.endswith(".lora_A.weight")}
    ranks |= {
        name.rpartition(".lora_embedding_A")[0]: len(t) for name, t in tensors.items() if name.endswith(".lora_embedding_A")
    }
    alphas = {path: pattern_of(path, config.get("alpha_pattern") or {}, config["lora_alpha"]) for path in ranks}
    return {
        "method": "lora", "at": list(ranks), "r": config["r"], "alpha": config["lora_alpha"], "dropout": config.get("lora_dropout", 0.0),
        "rslora": bool(config.get("use_rslora")), "dora": bool(config.get("use_dora")),
        "r_pattern": {path: r for path, r in ranks.items() if r != config["r"]},
        "alpha_pattern": {path: alpha for path, alpha in alphas.items() if alpha != config["lora_alpha"]},
    }  # fmt: skip


def pattern_of(path: str, patterns: dict[str, Any], default: Any) -> Any:
    """What peft's pattern table gives for a path: its keys are regular expressions for the end of the path."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), default)


def load_peft(model: nn.Module, options: Options, tensors: dict[str, Tensor]) -> None:
    """Put peft's tensors in."""
    layers = adapted(model)
    made = {path: m.for_peft() for path, m in layers.items()}
    load_named({f"{path}.{name}": t for path, of_layer in made.items() for name, t in of_layer.items()}, tensors)
    for path, m in layers.items():
        m.take_back(made[path])
