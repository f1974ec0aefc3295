"""Quantised layers: the codes are the nearest, errors stay in their bounds, gradients are exact, nothing dear is kept."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import MakeRecipe
from safetensors.torch import load_file
from torch import nn

from engine import finetune, models, prepare
from engine.errors import InputError
from engine.layers import quantized
from engine.layers.quantized import NF4, QuantizedLinear
from engine.tune import lora

QUIET = {"say": lambda line: None}
SHAPES = [(8, 64), (7, 5), (1, 1), (33, 17), (48, 100)]
CODES = [("nf4", 64, False), ("nf4", 64, True), ("nf4", 2, True), ("nf4", 10, False), ("int8", 64, True)]

# the 16 values as the paper prints them (QLoRA, appendix E)
PUBLISHED = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def layer_of(shape: tuple[int, int], code: tuple[str, int, bool], bias: bool = True) -> tuple[nn.Linear, QuantizedLinear]:
    old = nn.Linear(shape[1], shape[0], bias=bias)
    return old, QuantizedLinear.from_old(old, *code)


def test_the_sixteen_values_are_the_published_ones_and_quantiles() -> None:
    assert torch.allclose(NF4, torch.tensor(PUBLISHED), rtol=0, atol=2e-7)
    from scipy.stats import norm

    d = (1 / 30 + 1 / 32) / 2
    quantiles = np.concatenate([norm.ppf(np.linspace(d, 0.5, 8)[:-1]), [0.0], norm.ppf(np.linspace(0.5, 1 - d, 9)[1:])])
    assert np.allclose(NF4.numpy(), quantiles / norm.ppf(1 - d), rtol=0, atol=1e-7)
    assert NF4[7] == 0.0
    assert (NF4[0], NF4[-1]) == (-1.0, 1.0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", [2, 10, 64])
def test_nf4_takes_the_nearest_value_of_its_block(shape: tuple[int, int], block: int) -> None:
    """By brute force over all 16, in float64, block by block."""
    weight = torch.randn(shape) * torch.rand(shape[0], 1)
    made = QuantizedLinear(weight, None, "nf4", block, double_quant=False).weight
    for one, got in zip(weight.view(-1).split(block), made.view(-1).split(block), strict=True):
        scale = one.abs().max().double()
        distances = (one.double()[:, None] - scale * NF4.double()).abs()  # (block, 16)
        assert torch.allclose((got.double() - one).abs(), distances.amin(1), rtol=0, atol=float(scale) * 1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("code", CODES)
def test_the_error_stays_within_the_codes_bound(shape: tuple[int, int], code: tuple[str, int, bool]) -> None:
    old, new = layer_of(shape, code)
    weight, error = old.weight.detach(), (old.weight - new.weight).abs().detach()
    assert new.weight.shape == weight.shape
    if code[0] == "int8":
        bound = weight.abs().amax(1, keepdim=True) / 254
    else:
        flat = F.pad(weight.reshape(-1), (0, -weight.numel() % code[1])).view(-1, code[1])
        scales = flat.abs().amax(1)  # (blocks,)
        spread = (scales - scales.mean()).abs().amax() / 254 if code[2] else torch.zeros(())
        each = scales * (NF4.diff().max() / 2) + spread  # half the widest gap, and what the scale itself is off
        bound = each.repeat_interleave(code[1])[: weight.numel()].view(shape)
    assert (error <= bound * 1.0001 + 1e-7).all()
    if code[0] == "nf4" and code[1] > 2 and weight.numel() > 1:
        assert error.max() > bound.max() / 20, "a bound so wide would hold for anything"


@pytest.mark.parametrize("code", CODES)
def test_zeros_stay_zeros(code: tuple[str, int, bool]) -> None:
    weight = torch.randn(6, 64)
    weight[1], weight[:, ::3] = 0.0, 0.0
    made = QuantizedLinear(weight, None, *code).weight
    assert (made[weight == 0] == 0).all()
    assert torch.isfinite(made).all()
    assert made.abs().sum() > 0


def test_double_quantised_scales_over_more_than_one_group() -> None:
    weight = torch.randn(70, 64 * 8) * torch.logspace(-2, 1, 70)[:, None]  # 560 scales, three groups of 256
    one, two = (QuantizedLinear(weight, None, "nf4", 64, double) for double in (False, True))
    assert len(two.scale_scales) == 3
    scales = one.scale()
    off = (two.scale() - scales).abs()
    for group in range(3):
        part = slice(256 * group, 256 * group + 256)
        assert off[part].max() <= (scales - scales.mean())[part].abs().max() / 254 * 1.001
    assert off.max() > 0


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (("nf4", 64, False), 0.5 + 4 / 64),
        (("nf4", 64, True), 0.5 + 1 / 64 + 4 / (64 * 256) + 4 / 2**18),
        (("int8", 64, True), 1 + 4 / 512),
    ],
)
def test_bytes_a_weight(code: tuple[str, int, bool], expected: float) -> None:
    assert quantized.bytes_a_weight(layer_of((512, 512), code)[1]) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_gradient_are_those_of_the_dequantised_weight(code: tuple[str, int, bool], bias: bool) -> None:
    _, new = layer_of((33, 17), code, bias)
    x = torch.randn(2, 5, 17, requires_grad=True)
    y, reference = new(x), F.linear(x, new.weight, new.bias)
    assert torch.equal(y, reference)
    seed = torch.randn_like(y)
    trained = [x, new.bias] if bias else [x]
    for a, b in zip(torch.autograd.grad(y, trained, seed), torch.autograd.grad(reference, trained, seed), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-6)
    assert new(x[0, 0]).shape == (33,)


@pytest.mark.parametrize("code", CODES)
def test_the_backward_pass_keeps_no_weight(code: tuple[str, int, bool]) -> None:
    """Everything that autograd saves, counted; F.linear saves the whole weight."""
    _, new = layer_of((48, 32), code)
    adapted = lora.LoRALinear(new, r=2, alpha=4)
    x = torch.randn(3, 32, requires_grad=True)

    def saved(layer: object) -> set[tuple[int, ...]]:
        shapes: set[tuple[int, ...]] = set()

        def pack(t: torch.Tensor) -> torch.Tensor:
            shapes.add(tuple(t.shape))
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            layer(x)  # type: ignore[operator]
        return shapes

    big = {(48, 32), (32, 48)}
    assert saved(lambda x: F.linear(x, new.weight, new.bias)) & big
    assert not saved(new)
    assert not saved(adapted) & big


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("options", [{}, {"rslora": True}, {"dora": True}])
@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
def test_lora_on_it_is_lora_on_the_dequantised_layer(code: tuple[str, int, bool], options: dict[str, bool], kind: str) -> None:
    from transformers.pytorch_utils import Conv1D

    old = nn.Linear(10, 12) if kind == "Linear" else Conv1D(12, 10)
    nn.init.normal_(old.bias)
    ours = lora.LoRALinear(QuantizedLinear.from_old(old, *code), r=3, alpha=6, **options)
    nn.init.normal_(ours.lora_B)
    plain = lora.LoRALinear(ours.base.plain(), r=3, alpha=6, **options)
    assert type(plain.base).__name__ == kind
    assert torch.equal(plain.base.bias, old.bias)
    missing, unexpected = ours.load_state_dict(plain.state_dict(), strict=False)
    assert {n.rpartition(".")[0] for n in missing} == {"base"}, "only the codes stay its own"
    assert unexpected == ["base.weight"]
    x = torch.randn(4, 10)
    trained = [n for n, p in plain.named_parameters() if n.startswith(("lora", "magnitude"))]
    for layer in (ours, plain):
        (layer(x) ** 2).sum().backward()
    assert torch.allclose(ours(x), plain(x), atol=1e-5)
    for name in trained:
        assert torch.allclose(ours.get_parameter(name).grad, plain.get_parameter(name).grad, rtol=1e-4, atol=1e-4), name
    expected = ours(x)
    merged = ours.merged()
    assert type(merged).__name__ == kind
    assert torch.allclose(merged(x), expected, atol=1e-5)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_change_of_type_changes_no_code_and_no_scale(code: tuple[str, int, bool], dtype: torch.dtype) -> None:
    _, new = layer_of((33, 20), code)
    before = {name: b.clone() for name, b in new.state_dict().items() if name != "bias"}
    weight = new.weight
    new.to(dtype)
    assert new.weight.dtype == new.bias.dtype == new(torch.randn(2, 20, dtype=dtype)).dtype == dtype
    assert torch.equal(new.weight, weight.to(dtype))
    new.float()
    assert torch.equal(new.weight, weight)
    after = new.state_dict()
    assert all(torch.equal(after[name], before[name]) and after[name].dtype == before[name].dtype for name in before)


def test_autocast_multiplies_in_its_own_type() -> None:
    _, new = layer_of((16, 64), ("nf4", 64, True))
    x = torch.randn(3, 64, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = new(x)
        assert torch.equal(y, F.linear(x, new.weight, new.bias))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    assert torch.allclose(x.grad, new.weight.sum(0).expand(3, 64), atol=0.1)


def test_what_has_no_code_is_an_error() -> None:
    broken = nn.Linear(4, 4)
    broken.weight.data[1, 2] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        QuantizedLinear.from_old(broken)
    with pytest.raises(TypeError, match="not a LayerNorm"):
        QuantizedLinear.from_old(nn.LayerNorm(4))
    for options in ({"block": 3}, {"quantize": "nf5"}):
        with pytest.raises(ValueError, match="even block"):
            QuantizedLinear.from_old(nn.Linear(4, 4), **options)


# -- bitsandbytes, where it is installed ------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(48, 64), (33, 17), (384, 384)])
def test_codes_scales_and_products_are_those_of_bitsandbytes(shape: tuple[int, int]) -> None:
    rival = pytest.importorskip("bitsandbytes", reason="bitsandbytes is used where it is present, and is no dependency")
    weight = torch.randn(shape)
    theirs, state = rival.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    ours = QuantizedLinear(weight, None, "nf4", 64, double_quant=False)
    assert torch.equal(ours.codes[: theirs.numel()], theirs.view(-1))
    assert torch.equal(ours.scale(), state.absmax)
    assert torch.allclose(ours.weight, rival.functional.dequantize_4bit(theirs, state), rtol=0, atol=1e-6)
    for double in (False, True):
        layer = QuantizedLinear(weight, None, "nf4", 64, double)
        x = torch.randn(5, shape[1], requires_grad=True)
        y, own = quantized.bitsandbytes_product(layer, x), layer(x)
        assert torch.allclose(y, own, rtol=1e-4, atol=1e-4)
        seed = torch.randn_like(own)
        assert torch.allclose(torch.autograd.grad(y, x, seed)[0], torch.autograd.grad(own, x, seed)[0], rtol=1e-4, atol=1e-4)
    rows, largest, _ = rival.functional.int8_vectorwise_quant(weight)
    eight = QuantizedLinear(weight, None, "int8")
    assert torch.equal(eight.scale(), largest)
    assert (eight.codes.int() - rows.int()).abs().max() <= 1  # a tie may round the other way
    assert (eight.codes == rows).float().mean() > 0.99


def test_who_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    for present in (True, False):
        monkeypatch.setattr(quantized.importlib.util, "find_spec", lambda name, p=present: object() if p else None)
        quantized.product.cache_clear()
        assert quantized.product("nf4", 64, "cuda") == ("bitsandbytes" if present else "own")
        assert {quantized.product(*c) for c in (("nf4", 64, "cpu"), ("nf4", 10, "cuda"), ("int8", 64, "cuda"))} == {"own"}
    quantized.product.cache_clear()


# -- in a run ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["nf4", "int8"])
def test_the_blocks_are_quantised_and_nothing_else_and_all_weights_count(recipe: MakeRecipe, code: str) -> None:
    lines: list[str] = []
    model = prepare.prepare(recipe(f"tune={{method: lora, quantize: {code}}}"), say=lines.append).loaded.model
    plain = prepare.prepare(recipe(), **QUIET).loaded.model
    expected = {n for n, m in plain.named_modules() if isinstance(m, nn.Linear) and ".layer." in n}
    assert len(expected) == 12
    assert {n.removesuffix(".base") for n in quantized.quantized(model)} == expected
    assert {n for n, m in model.named_modules() if isinstance(m, nn.Linear)} == {"bert.pooler.dense", "classifier"}
    trains, total = models.count(model)
    updates = sum(p.numel() for n, p in model.named_parameters() if "lora" in n)
    assert total == models.count(plain)[1] + updates
    assert trains == updates + sum(p.numel() for p in plain.classifier.parameters())
    per = {"nf4": 0.52, "int8": 1.12}[code]
    said = next(line for line in lines if line.startswith("tune"))
    assert f"12 in {code} by own kernels, " in said
    assert abs(float(said.partition(" bytes a weight")[0].rpartition(" ")[2]) - per) < 0.02
    assert f"of {total:,} parameters" in said


@pytest.mark.parametrize("code", ["nf4", "int8"])
def test_a_run_from_start_to_prediction(recipe: MakeRecipe, bert: Path, code: str) -> None:
    peft = pytest.importorskip("peft", reason="peft is a rival to compare with, not a dependency")
    from laws import logits
    from transformers import AutoModelForSequenceClassification

    from engine.predict import evaluate_run

    made = recipe(f"tune={{method: lora, quantize: {code}, at: ['**.query', '**.dense']}}", "train.learning_rate=3e-2")
    result = finetune.finetune(made, "r", **QUIET)
    newest = sorted(Path("r/checkpoints").glob("step-*"))[-1]
    names = load_file(newest / "weights.safetensors").keys()
    assert not [n for n in names if "scale" in n or "codes" in n], "what the base makes again is not saved"
    again = evaluate_run("r", "test.jsonl", [], as_json=True)
    assert again["scores"]["accuracy"] == result.metrics["test"]["accuracy"]
    assert again["scores"]["loss"] == pytest.approx(result.metrics["test"]["loss"], rel=1e-4)
    assert f"base in {code}" in Path("r/model/README.md").read_text()

    # model/ is plain; adapter/ computes the same in peft on the base that it was trained on, and nearly so on the float one
    merged = AutoModelForSequenceClassification.from_pretrained("r/model")

    def theirs(rounded: bool) -> torch.Tensor:
        base = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)
        for path, module in list(base.named_modules()):
            if rounded and isinstance(module, nn.Linear) and (".layer." in path or path.endswith("pooler.dense")):
                module.weight.data.copy_(QuantizedLinear.from_old(module, code).weight)
        return logits(peft.PeftModel.from_pretrained(base, "r/adapter"))

    assert torch.allclose(theirs(rounded=True), logits(merged), atol=1e-5)
    assert not torch.allclose(theirs(rounded=False), logits(merged), atol=1e-4)
    config = json.loads(Path("r/adapter/adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"


def test_check_and_layers_show_it(recipe: MakeRecipe, capsys: pytest.CaptureFixture[str]) -> None:
    from engine import preflight

    def megabytes(options: str) -> int:
        return preflight._memory(prepare.prepare(recipe(options), **QUIET).loaded.model)

    plain, four = megabytes("tune.method=lora"), megabytes("tune={method: lora, quantize: nf4}")
    weights = 2 * (4 * 32 * 32 + 2 * 32 * 64)
    assert plain - four == pytest.approx(weights * (4 - 0.52), rel=0.01)
    preflight.check(recipe("tune={method: lora, quantize: nf4}"))
    assert "nothing looks wrong" in capsys.readouterr().out
    preflight.layers(recipe("tune={method: lora, quantize: nf4}"))
    row = next(line for line in capsys.readouterr().out.splitlines() if "layer.0.attention.self.query.base" in line)
    assert row.split() == ["bert.encoder.layer.0.attention.self.query.base", "QuantizedLinear", "weight", "as", "nf4", "(32,", "32)",
                           "bias(32,)", "1,056", "frozen"]  # fmt: skip


def test_swapped_in_by_a_recipe_it_is_saved_and_opened_again(recipe: MakeRecipe) -> None:
    from engine.predict import evaluate_run

    swapped = "swap=[{at: '**.intermediate.dense', with: 'engine.layers.quantized:QuantizedLinear', options: {quantize: int8}}]"
    result = finetune.finetune(recipe(swapped), "r", **QUIET)
    again = evaluate_run("r", "test.jsonl", [], as_json=True)
    assert again["scores"]["loss"] == pytest.approx(result.metrics["test"]["loss"], rel=1e-5)
    stored = load_file("r/model/model.safetensors")
    assert stored["bert.encoder.layer.0.intermediate.dense.codes"].dtype == torch.int8
    with pytest.raises(InputError, match="is quantised by swap; .* tune.quantize"):
        finetune.finetune(recipe(swapped, "tune={method: lora, at: '**.intermediate.dense'}"), "s", **QUIET)


@pytest.mark.parametrize("options", ["quantize: nf5", "quantize: nf4, block: 7"])
def test_wrong_options_are_errors(recipe: MakeRecipe, options: str) -> None:
    with pytest.raises(InputError, match=r"tune.(quantize|block)"):
        recipe(f"tune={{method: lora, {options}}}")
