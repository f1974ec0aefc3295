"""swap: patterns, checks and what it says; a recipe's own layer from file to prediction."""

import json
from pathlib import Path

import pytest
import torch
from conftest import MakeRecipe
from torch import nn

from engine import finetune, swap
from engine.errors import InputError

QUIET = {"say": lambda line: None}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.layer = nn.ModuleList(Block() for _ in range(3))
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.embed.weight


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("layer.*.query", ["layer.0.query", "layer.1.query", "layer.2.query"]), ("**.query", ["layer.0.query", "layer.1.query", "layer.2.query"]),
        ("layer.[01].{query,norm}", ["layer.0.query", "layer.0.norm", "layer.1.query", "layer.1.norm"]), ("out", ["out"]), ("**.out", ["out"]),
        ("layer.2.*", ["layer.2.query", "layer.2.value", "layer.2.norm"]), ("*", ["embed", "layer", "out"]),
    ],
)  # fmt: skip
def test_patterns(pattern: str, found: list[str]) -> None:
    assert swap.find(Net(), [pattern]) == found


def test_a_star_does_not_cross_a_dot() -> None:
    with pytest.raises(InputError):
        swap.find(Net(), ["*.query"])


def test_a_pattern_that_matches_nothing_is_an_error_even_beside_one_that_does() -> None:
    with pytest.raises(InputError, match=r"'\*\*.qurey' matches no module.*nearest are: layer.\*.query"):
        swap.find(Net(), ["**.value", "**.qurey"])


def test_nothing_changes_when_one_layer_cannot_be_built() -> None:
    net = Net()
    before = next(iter(net.layer)).query

    def build(old: nn.Module, path: str) -> nn.Module:
        if path == "layer.2.query":
            raise ValueError("no")
        return nn.Linear(4, 4)

    with pytest.raises(InputError, match=r"building the layer for layer.2.query .* failed: ValueError: no"):
        swap.swap(net, ["**.query"], build)
    assert net.layer[0].query is before


def test_modes_dtypes_and_accounts() -> None:
    net = Net().double()
    net.layer[1].eval()
    done = swap.swap(net, ["**.query"], lambda old, path: nn.Linear(4, 4, bias=False), weights="keep")
    assert [(s.path, s.kept, s.fresh, s.dropped) for s in done] == [
        (f"layer.{i}.query", ["weight"], [], ["bias"]) for i in range(3)
    ]
    assert [b.query.training for b in net.layer] == [True, False, True]
    assert {b.query.weight.dtype for b in net.layer} == {torch.float64}


@pytest.mark.parametrize(
    ("patterns", "build", "said"),
    [
        (["out"], lambda old, path: nn.Linear(4, 7), "shares its weight with embed.weight"),
        (["layer.0", "**.query"], lambda old, path: nn.Identity(), "layer.0.query lies inside layer.0"),
        (["**.query"], lambda old, path: "x", "which is no torch.nn.Module"),
    ],
)
def test_refusals(patterns: list[str], build: swap.Build, said: str) -> None:
    with pytest.raises(InputError, match=said):
        swap.swap(Net(), patterns, build)


def test_a_count_that_was_not_expected() -> None:
    with pytest.raises(InputError, match="3 modules match where 2 are expected"):
        swap.swap(Net(), ["**.query"], lambda old, path: nn.Linear(4, 4), expect=2)


LAYER = '''
import torch
from torch import nn


class Scaled(nn.Module):
    """The old layer times a learned number that begins at 1."""

    def __init__(self, old, start=1.0):
        super().__init__()
        self.old = old
        self.gain = nn.Parameter(torch.tensor(start))

    @classmethod
    def from_old(cls, old, start=1.0):
        return cls(old, start)

    def forward(self, x):
        return self.gain * self.old(x)


class Wide(nn.Linear):
    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features + 1)


class Bare:
    pass
'''


@pytest.fixture
def layer_file(files: Path) -> Path:
    (files / "mine.py").write_text(LAYER)
    return files / "mine.py"


def test_a_layer_of_ones_own_trains_predicts_and_is_guarded(recipe: MakeRecipe, layer_file: Path) -> None:
    from engine.predict import evaluate_run
    from engine.runs import open_run

    made = recipe("swap=[{at: '**.intermediate.dense', with: 'mine.py:Scaled', expect: 2}]", "train.epochs=4")
    result = finetune.finetune(made, "r", **QUIET)
    assert result.metrics["test"]["accuracy"] > 0.6
    run = open_run("r")
    gains = [p.item() for n, p in run.model.named_parameters() if n.endswith("gain")]
    assert len(gains) == 2
    assert all(g != 1.0 for g in gains)
    again = evaluate_run("r", "test.jsonl", [], as_json=True)
    assert again["scores"]["accuracy"] == result.metrics["test"]["accuracy"]
    assert json.loads(Path("r/layers/swap.json").read_text())["code"]["mine.py:Scaled"]["file"] == "mine.py"
    layer_file.write_text(LAYER + "\n# another file now\n")  # no longer the code that is stored with the run
    with pytest.raises(InputError, match="would execute the code of r/layers/mine.py"):
        open_run("r")
    assert open_run("r", allow_code=True)
    Path("r/layers/mine.py").write_text("raise SystemExit")
    with pytest.raises(InputError, match="the file was changed"):
        open_run("r", allow_code=True)


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("{at: '**.intermedate.dense', with: 'mine.py:Scaled'}", r"matches no module.*nearest are: .*intermediate.*"),
        ("{at: '**.dense', with: 'mine.py:Scald'}", "no class 'Scald'; did you mean 'Scaled'"),
        ("{at: '**.dense', with: 'mien.py:Scaled'}", "no file mien.py"),
        ("{at: '**.dense', with: 'mine.py:Bare'}", "no torch.nn.Module"),
        ("{at: '**.dense', with: 'mine.py:Scaled', options: {strat: 2}}", "takes no 'strat'; did you mean 'start'"),
    ],
)
def test_wrong_rules_are_errors_that_show_the_fix(recipe: MakeRecipe, layer_file: Path, rule: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        finetune.finetune(recipe(f"swap=[{rule}]"), "r", **QUIET)
    assert "swap.0" in str(error.value)
    assert not Path("r").exists()


FILLED = """
from torch import nn


class Ffn(nn.Module):
    def __init__(self, hidden_size, intermediate_size=7, hidden_act='gelu', hidden_dropout_prob=0.25, *, gain=1.0, **more):
        super().__init__()
        assert not more
        self.dense, self.rest = nn.Linear(hidden_size, intermediate_size), (hidden_act, hidden_dropout_prob, gain)

    def forward(self, x):
        return self.dense(x).relu()


class Around(nn.Module):
    def __init__(self, old, in_features, out_features, config):
        super().__init__()
        self.old, self.sizes = old, (in_features, out_features, config.hidden_size)

    def forward(self, x):
        return self.old(x)


class Needy(nn.Module):
    def __init__(self, hidden_size, width):
        super().__init__()


class Old(nn.Module):
    @classmethod
    def from_old(cls, old, width):
        return cls()


class Plain(nn.Module):
    def from_old(self, old):
        return self
"""


def filled(recipe: MakeRecipe, files: Path, layer: str, options: str = "{}") -> nn.Module:
    from engine import prepare

    (files / "fill.py").write_text(FILLED)
    rule = f"swap=[{{at: '**.intermediate', with: 'fill.py:{layer}', options: {options}}}]"
    return prepare.prepare(recipe(rule), **QUIET).loaded.model.bert.encoder.layer[1].intermediate


def test_arguments_come_from_the_old_module_and_the_models_config(recipe: MakeRecipe, files: Path) -> None:
    """By their names; a size even where the class has a default, anything else only where it has none; options before all."""
    made = filled(recipe, files, "Ffn")
    assert made.dense.weight.shape == (64, 32)
    assert made.rest == ("gelu", 0.25, 1.0)
    assert filled(recipe, files, "Ffn", "{gain: 2.0, hidden_act: silu}").rest == ("silu", 0.25, 2.0)
    assert filled(recipe, files, "Around").sizes == (32, 64, 32)


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        ("Needy", r"swap.0.options: Needy needs 'width': neither bert.encoder.layer.0.intermediate \(a BertIntermediate\) nor the"
         r" model's config has one of that name; give it in the recipe: options: {width: ...}; or give Needy a classmethod from_old"),
        ("Old", r"swap.0.options: Old.from_old needs 'width'; give it in the recipe: options: {width: ...}"),
        ("Plain", r"swap.0.with: Plain.from_old is called on the class: write @classmethod above its def"),
    ],
)  # fmt: skip
def test_an_argument_that_is_lacking_is_named_with_the_fix(recipe: MakeRecipe, files: Path, layer: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        filled(recipe, files, layer)


BAD = """
import torch
from torch import nn

class Narrow(nn.Module):
    def __init__(self, in_features, out_features):
        super().__init__()
        self.linear = nn.Linear(in_features, out_features // 2)

    def forward(self, x):
        return self.linear(x)

class Broken(Narrow):
    def forward(self, x):
        return self.linear(x[..., :3])

class Endless(Narrow):
    def forward(self, x):
        return torch.cat([self.linear(x)] * 2, -1) / 0.0
"""


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        ("Narrow", r"layer.0.output.dense failed on a probe batch: .*shapes cannot be multiplied.* Before it, bert.encoder.layer.0."
         r"intermediate.dense \(Narrow.*\) gave \(3, \d+, 32\); a layer in its place must give the shape that Linear\[64, 32\] gave"),
        ("Broken", "intermediate.dense.linear failed on a probe batch: RuntimeError"),
        ("Endless", "outputs are not all finite numbers"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("packing", ["true", "false"])
def test_a_layer_of_the_wrong_shape_is_named(recipe: MakeRecipe, files: Path, layer: str, said: str, packing: str) -> None:
    (files / "bad.py").write_text(BAD)
    made = recipe(f"swap=[{{at: '**.intermediate.dense', with: 'bad.py:{layer}'}}]", f"train.packing={packing}")
    with pytest.raises(InputError, match=said) as error:
        finetune.finetune(made, "r", **QUIET)
    assert "swap" in str(error.value)
    assert not Path("r").exists()


def test_a_fresh_layer_that_would_stay_frozen_is_an_error(recipe: MakeRecipe, layer_file: Path) -> None:
    made = recipe("swap=[{at: '**.intermediate.dense', with: 'mine.py:Scaled'}]", "tune={method: last_n, n: 0}")
    with pytest.raises(InputError, match="fresh parameters are frozen and would stay random"):
        finetune.finetune(made, "r", **QUIET)


def test_shipped_layers_follow_their_formulas() -> None:
    from engine.layers.rmsnorm import RMSNorm
    from engine.layers.swiglu import SwiGLU

    x = torch.randn(2, 5, 8, dtype=torch.float64).float()
    old = nn.LayerNorm(8)
    nn.init.normal_(old.weight)
    net = nn.ModuleDict({"norm": old})
    done = swap.swap(net, ["norm"], lambda o, path: RMSNorm.from_old(o), weights="keep")
    assert (done[0].kept, done[0].dropped) == (["weight"], ["bias"])
    assert torch.allclose(net["norm"](x), nn.functional.rms_norm(x, (8,), old.weight, old.eps), atol=1e-6)
    centred = x - x.mean(-1, keepdim=True)
    assert torch.allclose(net["norm"](centred), old(centred), atol=1e-5)
    block = nn.Sequential(nn.Linear(8, 12), nn.GELU())
    made = SwiGLU.from_old(block)
    assert made.value is block[0]
    gate = x @ made.gate.weight.T + made.gate.bias
    assert torch.allclose(made(x), gate * torch.sigmoid(gate) * block[0](x), atol=1e-6)
    with pytest.raises(TypeError, match="replaces a LayerNorm"):
        RMSNorm.from_old(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("rule", "count"),
    [
        ("{at: '**.LayerNorm', with: 'engine.layers.rmsnorm:RMSNorm'}", 5),
        ("{at: '**.intermediate', with: 'engine.layers.swiglu:SwiGLU'}", 2),
    ],
)
def test_shipped_layers_train_and_open_again_without_asking(recipe: MakeRecipe, rule: str, count: int) -> None:
    from engine.predict import evaluate_run

    lines: list[str] = []
    result = finetune.finetune(recipe(f"swap=[{rule}]"), "r", say=lines.append)
    assert any(line.startswith(f"swap    {count} x ") for line in lines)
    again = evaluate_run("r", "test.jsonl", [], as_json=True)  # the code is the installed one, byte for byte: no --allow-code
    assert again["scores"]["accuracy"] == result.metrics["test"]["accuracy"]


FEED_FORWARD = '''
import torch
from torch import nn


class Mixture(nn.Module):
    """Two expansions of the hidden state, mixed by a gate: what the old one computes, and a fresh one."""

    def __init__(self, old, width):
        super().__init__()
        self.old = old
        self.fresh = nn.Sequential(nn.Linear(old.dense.in_features, width), nn.GELU(), nn.Linear(width, old.dense.out_features))
        self.gate = nn.Parameter(torch.zeros(()))

    @classmethod
    def from_old(cls, old, width=32):
        return cls(old, width)

    def forward(self, x):
        return self.old(x) + self.gate * self.fresh(x)
'''


def test_a_users_layer_replaces_every_feed_forward_of_minilm(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One recipe entry on the real model: it trains, goes on after a stop bit for bit, evaluates and predicts."""
    from conftest import StopAt

    from engine import models
    from engine.predict import evaluate_run, predict_run
    from engine.recipe import load

    if not models._embedded("test"):
        pytest.skip(f"the wheel {models.EMBEDDED_WHEEL} is not installed")
    (files / "mine.py").write_text(FEED_FORWARD)
    options = [
        "swap=[{at: '**.intermediate', with: 'mine.py:Mixture', options: {width: 16}, expect: 6}]", "data.train_limit=96",
        "train.epochs=1", "train.batch_size=16", "evaluate.every=2", "checkpoint.every=1", "data.cache=cache",
        "data.validation=0.2", "data.test=test.jsonl",
    ]  # fmt: skip
    made = load("bert_sentiment", options)
    straight = finetune.finetune(made, "straight", **QUIET)
    stopped = finetune.finetune(made, "stopped", interrupted=StopAt("stopped", 2), **QUIET)
    assert stopped.code == 130
    resumed = finetune.finetune(made, "stopped", resume=True, **QUIET)
    assert resumed.metrics == straight.metrics
    assert Path("stopped/model/model.safetensors").read_bytes() == Path("straight/model/model.safetensors").read_bytes()
    again = evaluate_run("stopped", "test.jsonl", [], as_json=True)
    assert again["scores"]["loss"] == pytest.approx(straight.metrics["test"]["loss"], rel=1e-5)
    capsys.readouterr()
    predict_run("stopped", ["not a dull minute in it"], None, None, [])
    assert json.loads(capsys.readouterr().out)["label"] in ("negative", "positive")


def test_pooling_follows_its_formula_and_needs_no_padding() -> None:
    """The mean of the text's hidden states, whatever the padding; attention pooling begins as the mean and learns."""
    import laws

    from engine.layers.pooling import AttentionPooling, MeanPooling
    from engine.schema import SwapRule

    for architecture, at in (
        ("Bert", "bert.pooler"),
        ("Roberta", "classifier"),
        ("Electra", "classifier"),
        ("DebertaV2", "pooler"),
    ):
        out = {}
        for kind in ("MeanPooling", "AttentionPooling"):
            model = laws.build(architecture)
            rule = SwapRule.model_validate({"at": [at], "with": f"engine.layers.pooling:{kind}"})
            swap.apply_rules(model, [rule], lambda key: key)
            out[kind] = laws.logits(model)
            alone = {k: v[1:2, :4] for k, v in laws.batch().items()}
            assert torch.allclose(laws.logits(model, alone), out[kind][1:2], atol=1e-5)
            gradients = laws.gradients(laws.still(model))
            assert all(
                g is not None and g.abs().max() > 0 for n, g in gradients.items() if n.endswith("query") and "self" not in n
            )
        assert torch.allclose(out["MeanPooling"], out["AttentionPooling"], atol=1e-6)
        assert not torch.allclose(out["MeanPooling"], laws.logits(laws.build(architecture)), atol=1e-4)
    head = nn.Sequential(nn.Flatten(), nn.Linear(3, 2))
    hidden, mask = torch.randn(2, 4, 3), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    pooling = MeanPooling(head)
    pooling.attention_mask = mask
    assert torch.allclose(pooling(hidden), head(torch.stack([hidden[0].mean(0), hidden[1, :2].mean(0)])), atol=1e-6)
    attention = AttentionPooling(head)
    attention.attention_mask = mask
    nn.init.normal_(attention.query)
    weights = [(hidden[0] @ attention.query).softmax(0), (hidden[1, :2] @ attention.query).softmax(0)]
    expected = torch.stack([weights[0] @ hidden[0], weights[1] @ hidden[1, :2]])
    assert torch.allclose(attention(hidden), head(expected), atol=1e-6)


def test_pooling_is_one_line_of_a_recipe(recipe: MakeRecipe) -> None:
    from engine.predict import evaluate_run

    result = finetune.finetune(recipe("swap=[{at: '**.pooler', with: 'engine.layers.pooling:AttentionPooling'}]"), "r", **QUIET)
    again = evaluate_run("r", "test.jsonl", [], as_json=True)
    assert again["scores"]["loss"] == pytest.approx(result.metrics["test"]["loss"], rel=1e-5)
