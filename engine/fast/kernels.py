"""Float32 products through oneDNN on CPUs where MKL takes its slow path (AMD), if they are still true float32 there.

`torch.backends.mkldnn.matmul.fp32_precision = "bf16"` sends float32 products to oneDNN and *permits* it to round to
bfloat16. A CPU with AMX does round; one without computes in float32 all the same, only faster than MKL does on AMD. So
one product is compared with float64 before the switch is used: true float32 is off by about 1e-4 on this probe,
bfloat16 by more than 1e-1. Nothing is timed: a choice that depends on the clock could differ between two equal runs.
"""

import contextlib
import platform
from collections.abc import Iterator
from pathlib import Path

import torch

LARGEST_ERROR = 1e-3  # of products of standard normal numbers over K = 1536
_active = False


def amd() -> bool:
    """Whether this is an AMD CPU, as the kernel names it."""
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text("utf-8", "replace")[:4000]
    except OSError:
        return "AMD" in platform.processor()


def error() -> float:
    """The largest error of a float32 product (256, 1536) x (1536, 384) against float64, as products are set up now."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(256, 1536, generator=generator), torch.randn(1536, 384, generator=generator)
    return float((a @ b - (a.double() @ b.double())).abs().max())


def active() -> bool:
    """Whether the fast kernels are asked for: within `fast_kernels`."""
    return _active


@contextlib.contextmanager
def fast_kernels(device: torch.device, wanted: bool = True) -> Iterator[str]:
    """Within the block attention is ours on a CPU, and float32 products take the faster true path; yields what was found."""
    global _active
    if device.type != "cpu" or not wanted:
        yield ""
        return
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    _active, found = True, "attention a few rows at a time"
    before = getattr(matmul, "fp32_precision", None)
    try:
        if before is not None and amd():
            matmul.fp32_precision = "bf16"  # type: ignore[union-attr]
            off = error()
            if off > LARGEST_ERROR:
                matmul.fp32_precision = before  # type: ignore[union-attr]
            else:
                found += f"; float32 products by oneDNN ({off:.0e} from float64)"
        yield found
    finally:
        _active = False
        if before is not None:
            matmul.fp32_precision = before  # type: ignore[union-attr]


@contextlib.contextmanager
def plain_products() -> Iterator[None]:
    """Within the block float32 products are torch's own again: oneDNN is slow at many small ones."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    before = getattr(matmul, "fp32_precision", "none")
    if before in ("none", "ieee"):
        yield
        return
    matmul.fp32_precision = "none"  # type: ignore[union-attr]
    try:
        yield
    finally:
        matmul.fp32_precision = before  # type: ignore[union-attr]
