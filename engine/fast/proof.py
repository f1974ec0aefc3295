"""The proof that a piece of speed changes nothing: outputs and gradients of a probe batch, without it and with it.

    plain    outputs y,  gradients g = d (sum w y) / d theta  of everything that trains, in eval mode, so without dropout
    now      the same with the piece in its place

    distance = max |now - plain| / max |plain|,  once for the outputs, once over all gradients; the larger of the two counts

The weights w are fixed and unlike each other, so that no two outputs can stand in for one another. What stands on padding
is left out: nobody reads it. Of a gradient its sums over rows and over columns are kept, as soon as it is there: whole, twice
over, they would be the largest thing in memory before the first step.
"""

import math
from typing import Any

import torch
from torch import Tensor

from engine.models import eval_mode

TOLERANCE = 1e-4  # of the distance, in float32


def answers(model: Any, probe: dict[str, Tensor]) -> Tensor:
    """Everything that the model says of the probe batch, on padding nothing, as one vector of float32."""
    mask = probe["attention_mask"].bool()
    said = [t for t in model(**probe).values() if isinstance(t, Tensor) and t.is_floating_point()]
    return torch.cat([(t[mask] if t.shape[:2] == mask.shape else t).flatten().float() for t in said])


def weighed(y: Tensor) -> Tensor:
    """A scalar on which every output has another influence."""
    return (y * torch.arange(1, len(y) + 1, device=y.device).cos()).sum()


class Proof:
    """What a model computes on `probe` before anything is put in, to compare with."""

    def __init__(self, model: Any, probe: dict[str, Tensor], gradients: bool = True):
        self.model, self.probe = model, probe
        self.trains = [p for p in model.parameters() if p.requires_grad] if gradients else []
        self.plain = self._compute()

    def _compute(self) -> tuple[Tensor, list[Tensor | None]]:
        sums: dict[Tensor, Tensor] = {}

        def take(p: Tensor) -> None:
            assert p.grad is not None, "the hook runs after the gradient is there"
            sums[p], p.grad = margins(p.grad), None

        held = [p.grad for p in self.trains]  # a caller's own; added to, they would count as the probe's
        for p in self.trains:
            p.grad = None
        hooks = [p.register_post_accumulate_grad_hook(take) for p in self.trains]
        try:
            with eval_mode(self.model), torch.set_grad_enabled(bool(self.trains)), torch.backends.cudnn.flags(enabled=False):
                y = answers(self.model, self.probe)
                if self.trains:
                    weighed(y).backward()  # type: ignore[no-untyped-call]
        finally:
            for hook in hooks:
                hook.remove()
            for p, grad in zip(self.trains, held, strict=True):
                p.grad = grad
        return y.detach(), [sums.get(p) for p in self.trains]

    def distance(self) -> tuple[float, str]:
        """(how far the model's answers and gradients are from those before, and in words). Infinitely far where it fails."""
        try:
            y, gradients = self._compute()
        except (RuntimeError, ValueError, TypeError, IndexError) as error:  # a layer that needs what is no longer there
            return math.inf, f"fails: {str(error).strip().splitlines()[0][:120]}"
        outputs = _apart([self.plain[0]], [y])
        apart = max(outputs, _apart(self.plain[1], gradients))
        return apart, f"differs by {apart:.1e}" + ("" if outputs > TOLERANCE else " in its gradients")


def margins(g: Tensor) -> Tensor:
    """A gradient's sums over its rows and over its columns, in one vector; a vector as it is."""
    return torch.cat([g.flatten(1).sum(0), g.flatten(1).sum(1)]) if g.ndim > 1 else g.clone()


def _apart(before: list[Tensor | None] | list[Tensor], now: list[Tensor | None] | list[Tensor]) -> float:
    """max |now - before| / max |before| over pairs of tensors; a gradient that is there on one side alone counts as far."""
    pairs = [(b, n) for b, n in zip(before, now, strict=True) if b is not None and n is not None and b.shape == n.shape]
    if len(pairs) < sum(b is not None or n is not None for b, n in zip(before, now, strict=True)):
        return math.inf
    largest = max((float(b.abs().max()) for b, _ in pairs), default=0.0)
    furthest = [float((n - b).abs().max()) for b, n in pairs]
    if not all(map(math.isfinite, furthest)):
        return math.inf
    return max(furthest, default=0.0) / max(largest, 1e-30)
