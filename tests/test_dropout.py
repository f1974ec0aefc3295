"""Fresh masks: nn.Dropout's distribution by another generator, a function of torch's seed alone."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from engine.fast.dropout import Dropouts, FreshDropout, fresh


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_masks_are_independent_bernoulli_numbers_of_mean_one(p: float) -> None:
    """Within five standard errors: the share dropped, the share of pairs of neighbours dropped, and of rows and their successors."""
    torch.manual_seed(int(p * 100))
    count = 1 << 20
    first, second = fresh(torch.empty(1024, 1024), p), fresh(torch.empty(1024, 1024), p)
    assert first.unique().tolist() == pytest.approx([0.0, 1 / (1 - p)], rel=1e-3)
    dropped = (first == 0).double()
    assert float(dropped.mean()) == pytest.approx(p, abs=5 * (p * (1 - p) / count) ** 0.5 + 2**-17)
    for other in (dropped.roll(1, 1), dropped.roll(1, 0), dropped.roll(4, 1), (second == 0).double()):
        assert float((dropped * other).mean()) == pytest.approx(p * p, abs=5 * (p * p * (1 - p * p) / count) ** 0.5 + 2**-16)
    share, kept = round(p * 2**16) / 2**16, float(first.max())
    assert kept * (1 - share) == pytest.approx(1.0, rel=2e-7)  # the mean is one exactly, for the probability that is drawn


def test_masks_belong_to_torchs_seed() -> None:
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn += [fresh(torch.empty(50), 0.5), fresh(torch.empty(50), 0.5)]
    assert torch.equal(drawn[0], drawn[2])
    assert torch.equal(drawn[1], drawn[3])
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5), (2, 3, 7)])
def test_any_shape_and_type(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    layer = FreshDropout(0.5)
    y = layer(x)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert bool(((y == 0) | (y == 2 * x)).all())
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad * x, y)
    assert torch.equal(layer.eval()(x), x)
    assert not FreshDropout(1.0)(x).any()


def test_a_pass_that_is_computed_again_draws_the_same_masks() -> None:
    """As gradient checkpointing does: it sets torch's generator back."""
    layer, found = nn.Sequential(nn.Linear(9, 9), FreshDropout(0.5), nn.Linear(9, 9), FreshDropout(0.3)), []
    x = torch.randn(4, 9, requires_grad=True)
    for again in (False, True):
        torch.manual_seed(3)
        y = checkpoint(layer, x, use_reentrant=False) if again else layer(x)
        found.append((y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_a_model_gets_its_own_dropout_back() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.2), nn.Dropout(0.0), nn.Dropout1d(0.3))
    before = list(model)
    made = Dropouts(model, "exact", 100, fast=True)
    assert [type(m) for m in model] == [nn.Linear, FreshDropout, nn.Dropout, nn.Dropout1d]
    made.restore()
    assert all(a is b for a, b in zip(model, before, strict=True))
    assert not Dropouts(model, "exact", 100).old
