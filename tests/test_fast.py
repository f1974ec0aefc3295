"""Every piece of speed can be taken away and changes nothing."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MakeRecipe, make_bert
from hypothesis import given
from hypothesis import strategies as st

from engine import finetune, prepare
from engine.data.windows import cut
from engine.fast import attention, kernels, packing

QUIET = {"say": lambda line: None}


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40))
def test_a_plan_puts_every_token_in_one_place(lengths: list[int]) -> None:
    t = max(lengths)
    mask = (torch.arange(t) < torch.tensor(lengths)[:, None]).long()
    made = packing.plan(mask)
    capacity = -(-t // packing.ROW) * packing.ROW
    rows = packing.first_fit_decreasing(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= capacity for row in rows)
    if made is None:
        assert len(set(lengths)) == 1
        return
    real, n = mask.flatten().bool(), sum(lengths)
    tokens = torch.arange(1, mask.numel() + 1).view(len(lengths), t, 1).double()
    line = made.pack(tokens)
    assert line.shape[1] % packing.GRAIN == 0
    assert line.shape[1] - n == len(made.fill) < packing.GRAIN
    assert torch.equal(made.unpack(line).flatten()[real], tokens.flatten()[real])
    assert made.back[real].unique().numel() == n
    spread = made.rows(line)
    assert spread.shape == (len(rows), capacity, 1)
    assert torch.equal(made.line(spread)[0, :n], line[0, :n])
    owner = torch.full((len(rows) * capacity,), -1)
    owner[made.gather[:n]] = (line[0, :n, 0].long() - 1) // t
    assert torch.equal(made.empty, (owner == -1).nonzero()[:, 0])
    owner = owner.view(len(rows), capacity)
    assert torch.equal(made.mask[:, 0], owner[:, :, None] == owner[:, None, :])


@given(st.lists(st.integers(1, 30), min_size=2, max_size=20))
def test_rearranging_gives_back_the_gradient_of_each_token_and_zero_elsewhere(lengths: list[int]) -> None:
    t = max(lengths)
    made = packing.plan((torch.arange(t) < torch.tensor(lengths)[:, None]).long())
    if made is None:
        return
    n = sum(lengths)
    x = torch.randn(1, made.positions.shape[1], 2, dtype=torch.float64, requires_grad=True)
    there = made.line(made.rows(x))
    (got,) = torch.autograd.grad((there * torch.arange(1.0, there.numel() + 1).view_as(there)).sum(), x)
    expected = torch.arange(1.0, there.numel() + 1).view_as(there).double()
    expected[:, n:] = 0
    assert torch.equal(got, expected)
    rows = torch.randn(*made.shape[1:], 2, dtype=torch.float64, requires_grad=True)
    (got,) = torch.autograd.grad(made.line(rows).sum(), rows)
    assert torch.equal(got.flatten(0, 1)[made.empty], torch.zeros(len(made.empty), 2))
    assert torch.equal(got.flatten(0, 1)[made.gather[:n]], torch.ones(n, 2))


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(30, 200))
def test_a_packed_cut_holds_at_most_the_budget(lengths: list[int], budget: int) -> None:
    sizes = np.asarray(lengths)
    parts = cut(np.arange(len(sizes)), sizes, budget, packed=True)
    assert sorted(np.concatenate(parts)) == list(range(len(sizes)))
    assert all(sizes[p].sum() <= budget or len(p) == 1 for p in parts)


def architectures(folder: Path) -> dict[str, torch.nn.Module]:
    import transformers

    small = {
        "vocab_size": 70,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "pad_token_id": 0,
    }
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    made = {
        "Bert": {**small, **still}, "Roberta": {**small, **still}, "Electra": {**small, **still, "embedding_size": 32},
        "DistilBert": {"vocab_size": 70, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "dropout": 0.0, "attention_dropout": 0.0, "pad_token_id": 0},
    }  # fmt: skip
    torch.manual_seed(0)
    return {
        name: transformers.AutoModelForSequenceClassification.from_config(getattr(transformers, f"{name}Config")(**options))
        for name, options in made.items()
    }


def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    lengths = torch.tensor([19, 3, 7, 5, 2, 11, 4])
    mask = (torch.arange(19) < lengths[:, None]).long()
    return {"input_ids": torch.randint(5, 70, mask.shape) * mask, "attention_mask": mask}


@pytest.mark.parametrize("name", ["Bert", "Roberta", "Electra", "DistilBert"])
def test_packed_equals_padded_forward_and_backward(tmp_path: Path, name: str) -> None:
    model = architectures(tmp_path)[name].train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    results = []
    installed, said = packing.install(model, batch())
    assert installed, said
    for active in (False, True):
        installed.active = active
        model.zero_grad()
        logits = model(**batch()).logits
        assert (installed.plan is not None) == active
        logits.logsumexp(1).sum().backward()
        results.append((logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-6)
    assert results[0][1].keys() == results[1][1].keys()
    for n, gradient in results[0][1].items():
        assert torch.allclose(gradient, results[1][1][n], atol=1e-5), n
    keys = set(model.state_dict())
    installed.remove()
    assert set(model.state_dict()) == keys
    assert torch.allclose(model(**batch()).logits, results[0][0], atol=1e-6)


def test_a_layer_that_looks_across_tokens_is_noticed_and_not_packed(recipe: MakeRecipe) -> None:
    Path("across.py").write_text(
        "import torch\nfrom torch import nn\n\n\nclass Across(nn.Module):\n    def __init__(self, old):\n        super().__init__()\n        self.old = old\n\n"
        "    from_old = classmethod(lambda cls, old: cls(old))\n\n    def forward(self, x):\n        return self.old(x) + x.cumsum(1)[..., :1]\n"
    )
    ready = prepare.prepare(recipe("swap=[{at: '**.intermediate.dense', with: 'across.py:Across'}]"), **QUIET)
    assert "rows are not packed: the probe batch differs" in ready.packed
    assert not ready.windows.packed


def test_packing_changes_speed_alone(recipe: MakeRecipe, still_bert: Path) -> None:
    losses = []
    for packed in ("true", "false"):
        result = finetune.finetune(recipe(f"train.packing={packed}", "train.epochs=3", model=still_bert), f"r-{packed}", **QUIET)
        losses.append([e["loss"] for e in result.progress.evaluations])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_architectures_without_the_seam_fall_back_and_say_so(tmp_path: Path) -> None:
    import transformers

    config = transformers.T5Config(vocab_size=70, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, pad_token_id=0)
    installed, said = packing.install(transformers.AutoModelForSequenceClassification.from_config(config), batch())
    assert installed is None
    assert "t5 is not one of" in said
    model = make_bert(tmp_path / "eager")
    eager = transformers.AutoModelForSequenceClassification.from_pretrained(model, attn_implementation="eager")
    installed, said = packing.install(eager, batch())
    assert installed is None
    assert "by eager, not by sdpa" in said


def test_float32_stays_true_float32_and_is_restored() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    with kernels.fast_kernels(torch.device("cpu")):
        assert kernels.error() < kernels.LARGEST_ERROR
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    a = torch.randn(256, 1536)
    rounded = (a.bfloat16().float() @ torch.ones(1536, 4) - a @ torch.ones(1536, 4)).abs().max()
    assert rounded > kernels.LARGEST_ERROR, "the probe would notice bfloat16"


# -- attention a few rows at a time -----------------------------------------------------------------------------------


def heads(rows: int, m: int, c: int) -> list[torch.Tensor]:
    """Queries (rows, 2, m, 3), keys and values (rows, 2, c, 3) in float64."""
    torch.manual_seed(0)
    return [torch.randn(rows, 2, t, 3, dtype=torch.float64, requires_grad=True) for t in (m, c, c)]


@pytest.mark.parametrize("cache", [1, 1 << 19])  # a row at a time, and all of them
@pytest.mark.parametrize(("m", "masked"), [(5, False), (5, True), (2, True)])
def test_attention_is_torchs_and_its_gradient_is_autograds(
    monkeypatch: pytest.MonkeyPatch, m: int, masked: bool, cache: int
) -> None:
    monkeypatch.setattr(attention, "CACHE", cache)
    qkv, mask = heads(4, m, 5), torch.rand(4, 1, m, 5) > 0.4
    mask[..., 0] = True
    expected = torch.nn.functional.scaled_dot_product_attention(*qkv, mask if masked else None, scale=0.3)
    weight = torch.randn_like(expected)
    gradients = torch.autograd.grad((expected * weight).sum(), qkv)
    bias = attention.bias_of(mask, torch.float64) if masked else None
    found = attention.Attention.apply(*qkv, bias, 0.3, None)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad((found * weight).sum(), qkv), gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda q, k, v: attention.Attention.apply(q, k, v, bias, 0.3, None), qkv)


def test_attention_drops_what_its_mask_says_forwards_and_backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "CACHE", 60)
    qkv, drawn = heads(4, 5, 5), []

    def draw(p: torch.Tensor) -> torch.Tensor:
        drawn.append(attention.fresh(p, 0.3))
        return drawn[-1]

    found = attention.Attention.apply(*qkv, None, 0.3, draw)
    q, k, v = qkv
    mask = torch.cat(drawn).view(4, 2, 5, 5)
    assert mask.unique().tolist() == pytest.approx([0.0, 1 / 0.7], rel=2e-5)
    expected = ((0.3 * q @ k.transpose(2, 3)).softmax(-1) * mask) @ v
    weight = torch.randn_like(expected)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad((found * weight).sum(), qkv), torch.autograd.grad((expected * weight).sum(), qkv), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_what_is_unusual_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared keys, a bias by position, causality without a mask; and everything where the kernels are not asked for."""
    seen: list[str] = []
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda *a, **k: seen.append("torch"))
    module, (q, k, v) = torch.nn.Identity(), heads(2, 5, 5)
    plain, mask = {"is_causal": False}, torch.ones(2, 1, 5, 5, dtype=torch.bool)
    attention.attention(module, q, k, v, mask, **plain)
    with kernels.fast_kernels(torch.device("cpu")):
        attention.attention(module, q, k[:, :1], v[:, :1], mask, **plain)
        attention.attention(module, q, k, v, mask, position_bias=mask, **plain)
        attention.attention(module, q, k, v, None)
        assert seen == ["torch"] * 4
        attention.attention(module, q, k, v, None, **plain)
    with kernels.fast_kernels(torch.device("cpu"), wanted=False):
        attention.attention(module, q, k, v, mask, **plain)
    assert seen == ["torch"] * 5


def test_products_are_torchs_own_inside_attention_and_afterwards() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    with kernels.fast_kernels(torch.device("cpu")):
        within = torch.backends.mkldnn.matmul.fp32_precision
        with kernels.plain_products():
            assert torch.backends.mkldnn.matmul.fp32_precision in ("none", "ieee")
        assert torch.backends.mkldnn.matmul.fp32_precision == within
    assert torch.backends.mkldnn.matmul.fp32_precision == before
