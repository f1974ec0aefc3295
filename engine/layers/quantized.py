"""A frozen linear layer in 4 or 8 bits a weight (QLoRA: Dettmers et al. 2023, arXiv:2305.14314).

    W (out, in) float  --once-->  codes + scales  --at every use-->  W' ~ W  -->  y = W' x + b  -->  W' is thrown away

    int8   one scale a row: its largest |w| (the row-wise part of LLM.int8, Dettmers et al. 2022, arXiv:2208.07339)

               code = round(127 w / scale)         w' = scale * code / 127         |w - w'| <= scale / 254

    nf4    one scale for each `block` of neighbours: their largest |w|. w / scale lies in [-1, 1] and becomes the index of
           the nearest of 16 values; two indices share a byte, first in the high half.

               -1         -.70    -.53 -.39 -.28 -.18 -.09  0  .08 .16 .25 .34 .44   .56     .72         1
                |           |       |    |    |    |    |   |   |   |   |   |   |     |       |          |

Trained weights look drawn from a normal distribution, so the 16 values are its quantiles: each is used about equally
often, and they lie densest where weights are. Zero is one of them, so what was pruned stays pruned: 8 values for [-1, 0]
and 9 for [0, 1] share it.

Double quantisation: a float32 scale for 64 weights costs half a bit a weight. So the scales, less their mean, are int8
codes themselves, with one float32 for 256 of them. Bytes a weight, measured by the tests:

    float32 4      int8 1 + 4 / in      nf4 0.5625      nf4 with double quantisation 0.516 in a large layer

Only the codes stay in memory: the backward pass needs W' again, for grad_x = grad_y W', and makes it again rather than
keep it. W itself never trains, so it needs no gradient.
"""

import importlib.util
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from engine.swap import swap

Code = Literal["nf4", "int8"]
SCALES = 256  # so many scales share one float32 where scales are quantised too
BITSANDBYTES_BLOCKS = (64, 128, 256, 512, 1024, 2048, 4096)


def nf4_values() -> Tensor:
    """The 16 values of NF4, ascending, float32 (paper, appendix E).

    Quantiles of the normal distribution at evenly spaced probabilities, divided by the largest: 8 from d to 1/2 for
    [-1, 0], 9 from 1/2 to 1 - d for [0, 1]. The outermost quantile would be infinite, so d is the mean of half a step of
    15 and half a step of 16.
    """
    d = (1 / 30 + 1 / 32) / 2
    below = torch.special.ndtri(torch.linspace(d, 0.5, 8, dtype=torch.float64))
    above = torch.special.ndtri(torch.linspace(0.5, 1 - d, 9, dtype=torch.float64))
    values = torch.cat([below, above[1:]])  # both hold the zero
    values[7] = 0.0
    return (values / values.abs().max()).float()


NF4 = nf4_values()


@cache
def _pairs(device: torch.device) -> Tensor:
    """byte -> the two float32 values that it stands for, as one int64: both come with one look-up. (256,)"""
    both = torch.stack([NF4[:, None].expand(16, 16), NF4.expand(16, 16)], -1)  # (high, low, 2)
    return both.reshape(256, 2).contiguous().view(torch.int64).view(256).to(device)


def pack(indices: Tensor) -> Tensor:
    """(n,) numbers below 16, n even -> (n / 2,) bytes."""
    return (indices[0::2] << 4 | indices[1::2]).to(torch.uint8)


def to_nf4(weight: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """(out, in) -> bytes (blocks * block / 2,) and scales (blocks,); blocks run over the rows' ends, the last is padded."""
    flat = weight.detach().float().reshape(-1)
    flat = F.pad(flat, (0, -flat.numel() % block)).view(-1, block)  # (blocks, block)
    scales = flat.abs().amax(1)
    unit = flat / scales.where(scales > 0, 1.0)[:, None]  # a block of zeros stays zeros
    nearest = torch.bucketize(unit, ((NF4[1:] + NF4[:-1]) / 2).to(unit.device))
    return pack(nearest.view(-1)), scales


def from_nf4(codes: Tensor, scales: Tensor, shape: tuple[int, int]) -> Tensor:
    """The (out, in) float32 weight that codes and scales stand for."""
    units = _pairs(codes.device).index_select(0, codes.int()).view(torch.float32)  # (blocks * block,)
    whole = units.view(len(scales), -1).mul_(scales[:, None]).view(-1)
    return whole[: shape[0] * shape[1]].view(shape)


def to_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(n, m) -> int8 codes (n, m) and the row's largest absolute value (n,)."""
    rows = rows.detach().float()
    largest = rows.abs().amax(1)
    return (rows * (127 / largest.where(largest > 0, 1.0))[:, None]).round().to(torch.int8), largest


def from_int8(codes: Tensor, largest: Tensor) -> Tensor:
    """The (n, m) float32 rows that the codes stand for."""
    return codes * (largest / 127)[:, None]


class QuantizedLinear(nn.Module):
    """In the place of an nn.Linear, or of GPT-2's Conv1D, with a frozen weight of few bits.

    `weight` (out, in) is made anew at each look, in the type that .to(dtype) last set; codes and scales keep theirs.
    """

    def __init__(
        self, weight: Tensor, bias: nn.Parameter | None, quantize: Code = "nf4", block: int = 64, double_quant: bool = True
    ):
        super().__init__()
        if not torch.isfinite(weight).all():
            raise ValueError("its weight holds numbers that are not finite, which have no code")
        self.out_features, self.in_features = weight.shape
        self.quantize, self.block = quantize, block
        self.conv1d = False
        self.register_buffer("like", weight.new_empty(0), persistent=False)  # device and dtype of `weight`
        self.bias = bias
        codes, scales = to_nf4(weight, block) if quantize == "nf4" else to_int8(weight)
        self.register_buffer("codes", codes)
        self.double_quant = double_quant and quantize == "nf4"
        if self.double_quant:
            mean = scales.double().mean().float()  # in float32 it would depend on the number of threads
            groups = F.pad(scales - mean, (0, -len(scales) % SCALES)).view(-1, SCALES)
            codes, largest = to_int8(groups)
            self.register_buffer("scale_codes", codes.view(-1)[: len(scales)].clone())  # (blocks,) int8
            self.register_buffer("scale_scales", largest)  # (blocks / 256,)
            self.register_buffer("scale_mean", mean)
        else:
            self.register_buffer("scales", scales)

    @classmethod
    def from_old(cls, old: nn.Module, quantize: Code = "nf4", block: int = 64, double_quant: bool = True) -> "QuantizedLinear":
        """In the place of a linear layer; its bias stays as it is."""
        conv1d = type(old).__name__ == "Conv1D"
        if not conv1d and not isinstance(old, nn.Linear):
            raise TypeError(f"QuantizedLinear replaces a linear layer, not a {type(old).__name__}")
        if quantize not in ("nf4", "int8") or block < 2 or block % 2:
            raise ValueError(f"quantize: {quantize}, block: {block}; it takes nf4 or int8, and an even block")
        weight: Tensor = old.weight  # type: ignore[assignment]
        new = cls(weight.T if conv1d else weight, old.bias, quantize, block, double_quant)  # type: ignore[arg-type]
        new.conv1d = conv1d
        return new

    def scale(self) -> Tensor:
        """float32 scales: of blocks (nf4) or rows (int8)."""
        if not self.double_quant:
            return self.scales  # type: ignore[return-value]
        n = len(self.scale_codes)  # type: ignore[arg-type]
        each = self.scale_scales.repeat_interleave(SCALES)[:n]  # type: ignore[operator,union-attr]
        return self.scale_codes * (each / 127) + self.scale_mean  # type: ignore[operator,no-any-return]

    def rows(self, dtype: torch.dtype) -> Tensor:
        """The weight that the codes stand for, (out, in)."""
        codes: Tensor = self.codes  # type: ignore[assignment]
        if self.quantize == "int8":
            return from_int8(codes, self.scale()).to(dtype)
        return from_nf4(codes, self.scale(), (self.out_features, self.in_features)).to(dtype)

    @property
    def weight(self) -> Tensor:
        """(out, in); some architectures look at their layers' weight."""
        return self.rows(self.like.dtype)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if product(self.quantize, self.block, x.device.type) == "bitsandbytes":
            y = bitsandbytes_product(self, x)
            return y if bias is None else y + bias
        return _Product.apply(x, bias, self)  # type: ignore[no-any-return]

    @torch.no_grad()
    def plain(self) -> nn.Module:
        """The layer that it stands for, with float weights: nn.Linear, or Conv1D where that was replaced."""
        weight = self.weight
        if self.conv1d:
            from transformers.pytorch_utils import Conv1D

            new: nn.Module = Conv1D(self.out_features, self.in_features)
        else:
            new = nn.utils.skip_init(nn.Linear, self.in_features, self.out_features, bias=self.bias is not None)
        new.weight = nn.Parameter(weight.T.contiguous() if self.conv1d else weight, requires_grad=False)
        new.bias = self.bias  # type: ignore[assignment]
        return new.train(self.training)

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantizedLinear":
        # scales of another type would be another weight: they move to a device, and never take a dtype
        before = {name: t for name, t in self._buffers.items() if name != "like" and t is not None}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.quantize}, bias={self.bias is not None}"


class _Product(torch.autograd.Function):
    """x W'^T + b. Autograd's own F.linear would keep W' until the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.rows(x.dtype), bias)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad_x = grad @ ctx.layer.rows(grad.dtype) if ctx.needs_input_grad[0] else None  # (..., in)
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None  # (out,)
        return grad_x, grad_bias, None


# -- whose product ----------------------------------------------------------------------------------------------------


@cache
def product(quantize: str, block: int, device: str) -> str:
    """Who multiplies: "bitsandbytes" for nf4 on a CUDA device where that package is installed, else "own".

    Its int8 product rounds the inputs too and so computes something else; torchao's NF4 is torch operations like these.
    """
    fits = quantize == "nf4" and block in BITSANDBYTES_BLOCKS and device == "cuda"
    return "bitsandbytes" if fits and importlib.util.find_spec("bitsandbytes") else "own"


def bitsandbytes_product(layer: QuantizedLinear, x: Tensor) -> Tensor:
    """x W'^T by the bitsandbytes package, from the same codes: its layout is this one."""
    import bitsandbytes

    shape = torch.Size((layer.out_features, layer.in_features))
    codes: Tensor = layer.codes[: (shape.numel() + 1) // 2, None]  # type: ignore[index,assignment]
    state = bitsandbytes.functional.QuantState(
        layer.scale(), shape=shape, code=NF4.to(x.device), blocksize=layer.block, quant_type="nf4", dtype=x.dtype
    )
    return bitsandbytes.matmul_4bit(x, codes.t(), quant_state=state)  # type: ignore[no-any-return]


# -- a whole model ----------------------------------------------------------------------------------------------------


def quantize_blocks(model: nn.Module, quantize: Code, block: int, double_quant: bool) -> None:
    """Quantise every linear layer inside a model's blocks that is frozen and not yet quantised."""
    stacks = [path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    paths = [
        path
        for path, module in model.named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
        and any(path.startswith(f"{stack}.") for stack in stacks)
        and not any(p.requires_grad for p in module.parameters())
    ]
    if paths:
        swap(model, paths, lambda old, _: QuantizedLinear.from_old(old, quantize, block, double_quant), where="tune.quantize")


def quantized(model: nn.Module) -> dict[str, QuantizedLinear]:
    """Path -> layer."""
    return {path: module for path, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def packed_weights(model: nn.Module) -> int:
    """How many weights the codes of a model stand for; they are no parameters and so in no count of those."""
    return sum(m.out_features * m.in_features for m in quantized(model).values())


def bytes_a_weight(model: nn.Module) -> float:
    """Bytes of codes and scales over the weights they stand for, measured."""
    held = sum(b.numel() * b.element_size() for m in quantized(model).values() for b in m.buffers())
    return held / packed_weights(model)


def said(model: nn.Module) -> str:
    """For the coverage line: `36 in nf4 by own kernels, 0.52 bytes a weight`."""
    layers = list(quantized(model).values())
    one = layers[0]
    who = product(one.quantize, one.block, "cuda" if torch.cuda.is_available() else "cpu")
    by = "own kernels" if who == "own" else f"{who}' on the GPU, own kernels elsewhere"
    return f"{len(layers)} in {one.quantize} by {by}, {bytes_a_weight(model):.2f} bytes a weight"
