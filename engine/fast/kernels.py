"""What a CPU computes with, taken the fast way: attention of our own, float32 products by oneDNN, memory that stays.

Attention is in engine/fast/attention.py, which asks here whether it is wanted (`active`).

Products. MKL takes a slow path on AMD. `torch.backends.mkldnn.matmul.fp32_precision = "bf16"` sends float32 products to oneDNN
and *permits* it to round to bfloat16. A CPU with AMX does round; one without computes in float32 all the same, only faster
than MKL does on AMD (by 7 % on Zen 4, more than twice on Zen 5). So one product is compared with float64 before the switch is
used: true float32 is off by about 1e-4 on this probe, bfloat16 by more than 1e-1. Nothing is timed: a choice that depends on
the clock could differ between two equal runs.
"""

import contextlib
import ctypes
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
LARGEST_ERROR = 1e-3  # of products of standard normal numbers over K = 1536
_active = False

# oneDNN keeps the code that it generates, about 0.3 MB for each size of product that it meets, and packed rows have many: its own
# limit of 1,024 would come to 300 MB. It is read once, before the first product.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "192")


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


def give_back() -> None:
    """Return freed memory to the system, where glibc holds it; elsewhere nothing happens. It changes no number."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next step, for good; elsewhere nothing happens. It changes no number.

    By default blocks of a few megabytes, as gradients are, go back to the system and come again as fresh pages, each of which
    the system has to find and to clear: 6,000 times a step in bfloat16, 3 % of the time.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the most that it takes
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


@contextlib.contextmanager
def fast_kernels(device: torch.device, wanted: bool = True) -> Iterator[str]:
    """Within the block attention is ours on a CPU, and float32 products take the faster true path; yields what was found."""
    global _active
    if device.type != "cpu" or not wanted:
        yield ""
        return
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    give_back()  # what loading and preparing needed
    keep_freed_memory()
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
