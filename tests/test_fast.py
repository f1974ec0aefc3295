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
from engine.fast import kernels, packing

QUIET = {"say": lambda line: None}


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40))
def test_a_plan_puts_every_token_in_one_place(lengths: list[int]) -> None:
    t = max(lengths)
    mask = (torch.arange(t) < torch.tensor(lengths)[:, None]).long()
    made = packing.plan(mask)
    rows = packing.first_fit_decreasing(lengths, t)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= t for row in rows)
    if made is None:
        assert len(rows) == len(lengths)
        return
    tokens = torch.arange(mask.numel())
    packed = tokens[made.gather]
    real = mask.flatten().bool()
    assert torch.equal(packed[made.back][real], tokens[real])
    assert made.back[real].unique().numel() == sum(lengths)
    owner = torch.full((made.rows * t,), -1)
    owner[made.back[real]] = (tokens // t)[real]
    owner = owner.view(made.rows, t)
    assert torch.equal(made.mask[:, 0], owner[:, :, None] == owner[:, None, :])


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
    with kernels.fast_float32(torch.device("cpu")):
        assert kernels.error() < kernels.LARGEST_ERROR
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    a = torch.randn(256, 1536)
    rounded = (a.bfloat16().float() @ torch.ones(1536, 4) - a @ torch.ones(1536, 4)).abs().max()
    assert rounded > kernels.LARGEST_ERROR, "the probe would notice bfloat16"
