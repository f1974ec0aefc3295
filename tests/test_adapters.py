"""Bottleneck adapters: beside a feed-forward, of Kronecker products, mixed by fusion, read in adapter-hub's layout."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import laws
import pytest
import torch
from conftest import MakeRecipe, StopAt
from laws import ARCHITECTURES, CASES, batch, build, logits
from safetensors.torch import save_file
from test_loop import log_of, model_bytes
from torch import Tensor, nn

from engine import finetune, models, runs
from engine.errors import InputError
from engine.predict import evaluate_run, predict_run
from engine.tune import _hub_layout, adapter, compacter, fusion
from engine.tune._bottleneck import Site


def sites(model: nn.Module) -> dict[str, Any]:
    return {path: module for path, module in model.named_modules() if isinstance(module, Site)}


def shake(model: nn.Module) -> None:
    """Random bottlenecks, so that nothing is hidden by a zero."""
    with torch.no_grad():
        for site in sites(model).values():
            for name, parameter in site.named_parameters():
                if not name.startswith("base."):
                    parameter.copy_(torch.randn_like(parameter) * 0.3)


def bottleneck(tensors: dict[str, Tensor], site: str, act: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """x -> W_up act(W_down x + b_down) + b_up, by hand."""
    down, b_down, up, b_up = (tensors[f"{site}.{n}"] for n in ("down.weight", "down.bias", "up.weight", "up.bias"))
    return lambda x: act(x @ down.T + b_down) @ up.T + b_up


# -- placement: parallel ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_parallel_adapter_adds_its_update_of_the_feed_forwards_input(architecture: str) -> None:
    """FFN(x) + s * u(x), where x is caught on the plain model by hooks on modules that the engine does not touch."""
    plain = build(architecture)
    model = copy.deepcopy(plain)
    adapter.apply(model, adapter.Options(method="adapter", placement="parallel", reduction=4, scaling=0.5), [])
    shake(model)
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    caught: dict[str, Tensor] = {}
    for path in sites(model):
        update = bottleneck(own, path, torch.relu)
        if path.endswith(".output"):  # BERT's family: x enters `intermediate`, FFN(x) leaves `output.dense`

            def catch(module: nn.Module, inputs: Any, path: str = path) -> None:
                caught[path] = inputs[0]

            def add(module: nn.Module, inputs: Any, made: Tensor, path: str = path, update: Any = update) -> Tensor:
                return made + 0.5 * update(caught[path])

            plain.get_submodule(path.removesuffix("output") + "intermediate").register_forward_pre_hook(catch)
            plain.get_submodule(path + ".dense").register_forward_hook(add)
        else:
            plain.get_submodule(path).register_forward_hook(lambda m, i, made, u=update: made + 0.5 * u(i[0]))
    assert len(sites(model)) >= 2
    start = logits(build(architecture))
    assert torch.allclose(logits(model), logits(plain), atol=1e-5)
    assert not torch.allclose(logits(model), start, atol=1e-3)


def test_sites_keep_nothing_between_calls_and_compile() -> None:
    """Outputs of one model, called twice at once with other inputs; and the same through Dynamo."""
    for case in ("parallel", "compacter", "after norm"):
        model = build("Bert")
        laws.apply(model, case)
        shake(model)
        expected = logits(model)
        site = next(iter(sites(model).values()))
        before = set(site.__dict__)
        short = {k: v[:2, :3] for k, v in batch().items()}
        logits(model, short)
        assert torch.equal(logits(model), expected)
        assert set(site.__dict__) == before
        torch._dynamo.reset()
        compiled = torch.compile(model.bert.encoder.layer[0], backend="eager")
        x = torch.randn(2, 5, 32)
        assert torch.allclose(compiled(x), model.bert.encoder.layer[0](x), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"placement": "parallel", "after": "norm"}, "tune.after: norm has no meaning"),
        ({"placement": "parallel", "at": ["**.output.dense"]}, "stands beside a whole feed-forward"),
        ({"after": "norm", "at": ["**.output.dense"]}, "is a Linear; after: norm wraps a norm"),
    ],
)
def test_places_that_make_no_sense_are_errors(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        adapter.apply(build("Bert"), adapter.Options(method="adapter", **options), [])


# -- compacter --------------------------------------------------------------------------------------------------------


def compact(n: int = 4, rank: int = 2) -> Any:
    model = build("Bert")
    compacter.apply(model, compacter.Options(method="compacter", reduction=4, n=n, rank=rank), ["classifier"])
    return model


@pytest.mark.parametrize(("n", "rank"), [(1, 1), (2, 3), (4, 1), (8, 2)])
def test_a_compacters_weights_are_the_kronecker_sums(n: int, rank: int) -> None:
    model = compact(n, rank)
    shake(model)
    layers = [m for m in model.modules() if isinstance(m, compacter.Kronecker)]
    (rule,) = [m for m in model.modules() if isinstance(m, compacter.Rule)]
    assert len(layers) == 8
    for layer in layers:
        weight = torch.stack([torch.kron(rule.A[i], layer.s[i] @ layer.t[i]) for i in range(n)]).sum(0)
        assert torch.allclose(layer.weight(), weight, atol=1e-6)
        x = torch.randn(3, weight.shape[1])
        assert torch.allclose(layer(x), x @ weight.T + layer.bias, atol=1e-6)


def test_the_kronecker_matrices_are_one_tensor_and_stay_one() -> None:
    model = compact()
    shake(model)
    assert sum(name.endswith("rule.A") for name in model.state_dict()) == 1
    copied = copy.deepcopy(model)
    rules = [{id(m._rule[0]) for m in one.modules() if isinstance(m, compacter.Kronecker)} for one in (model, copied)]
    assert all(len(r) == 1 for r in rules)
    assert rules[0] != rules[1]
    expected = logits(model)
    with torch.no_grad():
        next(p for n, p in copied.named_parameters() if n.endswith("rule.A")).mul_(2.0)
    assert torch.equal(logits(model), expected)
    assert not torch.allclose(logits(copied), expected)
    model.train()
    model(**batch(), labels=torch.tensor([0, 1, 1, 0])).loss.backward()
    gradient = next(p.grad for n, p in model.named_parameters() if n.endswith("rule.A"))
    assert gradient is not None
    assert gradient.abs().sum() > 0


def test_a_bottleneck_that_n_does_not_divide_is_an_error() -> None:
    with pytest.raises(InputError, match="tune.n: 3 must divide the hidden size 32 and the bottleneck 8"):
        compact(n=3)


# -- fusion -----------------------------------------------------------------------------------------------------------


def write_adapter(folder: Path, model: Any, seed: int, base: str = "", **options: Any) -> Path:
    """A trained adapter's folder, as a run writes it, with random weights; `model` is left as it is."""
    model = copy.deepcopy(model)
    made = adapter.Options(method="adapter", **options)
    head = models.head_of(model, [])
    adapter.apply(model, made, head)
    torch.manual_seed(seed)
    shake(model)
    folder.mkdir(parents=True)
    given = {
        k: v
        for k, v in made.model_dump(mode="json").items()
        if k in ("placement", "after", "at", "reduction", "activation", "scaling")
    }
    config = {"engine_method": "adapter", "options": given, "base_model_name_or_path": base, "modules_to_save": head}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


FUSED: dict[str, list[dict[str, Any]]] = {
    "projection": [{"reduction": 4}, {"reduction": 2, "activation": "gelu"}],
    "norm": [{"placement": "pfeiffer", "after": "norm", "reduction": r} for r in (2, 4, 8)],
    "parallel": [{"placement": "parallel", "reduction": 8}, {"placement": "parallel", "scaling": 2.0}],
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fusion_obeys_the_laws(architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = build(architecture)
    folders = [str(write_adapter(tmp_path / str(i), base, i, **options)) for i, options in enumerate(FUSED["projection"])]
    monkeypatch.setitem(CASES, "fusion", {"method": "fusion", "adapters": folders})
    monkeypatch.setattr(laws, "CHANGES_AT_INIT", laws.CHANGES_AT_INIT | {"fusion"})  # the mean of two adapters
    one = laws.tuned("fusion", architecture)
    for law in laws.laws_of(architecture):
        law(one)
    if architecture == "Bert":
        laws.compiled(one)


@pytest.mark.parametrize("form", FUSED)
def test_fusion_mixes_by_attention(form: str, tmp_path: Path) -> None:
    model = build("Bert")
    folders = [str(write_adapter(tmp_path / str(i), model, i, **options)) for i, options in enumerate(FUSED[form])]
    fusion.apply(model, fusion.Options(method="fusion", adapters=folders), [])
    own = dict(model.double().named_parameters())
    for site in sites(model).values():
        assert torch.allclose(site.value.weight, torch.eye(32).double(), atol=1e-5)
        for layer in (site.query, site.key, site.value):
            nn.init.normal_(layer.weight, std=0.4)
    for path, site in sites(model).items():
        h = torch.randn(3, 5, 32).double()
        expected = torch.zeros_like(h)
        acts = [torch.relu if o.get("activation") is None else nn.functional.gelu for o in FUSED[form]]
        scalings = [o.get("scaling", 4.0 if form == "parallel" else 1.0) for o in FUSED[form]]
        z = [s * bottleneck(own, f"{path}.adapters.{i}", a)(h) for i, (a, s) in enumerate(zip(acts, scalings, strict=True))]
        for b in range(3):
            for t in range(5):
                q = site.query.weight @ h[b, t] + site.query.bias
                scores = torch.stack([q @ (site.key.weight @ one[b, t] + site.key.bias) for one in z])
                p = torch.exp(scores) / torch.exp(scores).sum()
                expected[b, t] = sum(p[i] * (site.value.weight @ one[b, t]) for i, one in enumerate(z))
        assert torch.allclose(site.update(h), expected, atol=1e-6)


def test_fusing_one_adapter_with_itself_is_that_adapter(tmp_path: Path) -> None:
    """Softmax weights sum to one, so while V is the identity the mix of equals is each of them."""
    model, alone = build("Bert"), build("Bert")
    folder = write_adapter(tmp_path / "run" / "adapter", model, 1, reduction=4)
    options = adapter.Options(method="adapter", reduction=4)
    adapter.apply(alone, options, [])
    torch.manual_seed(1)
    shake(alone)
    fusion.apply(model, fusion.Options(method="fusion", adapters=[str(folder.parent), str(folder)]), [])
    assert torch.allclose(logits(model), logits(alone), atol=1e-4)


def test_adapters_that_do_not_suit_are_errors(tmp_path: Path, bert: Path, still_bert: Path) -> None:
    model = build("Bert")
    good = write_adapter(tmp_path / "good", model, 0, reduction=4)

    def said(*names: Path | str) -> str:
        before = logits(model)
        with pytest.raises(InputError) as error:
            fusion.apply(model, fusion.Options(method="fusion", adapters=[str(n) for n in names]), [])
        assert not sites(model)
        assert torch.equal(logits(model), before)
        return str(error.value)

    assert "name two trained adapters" in said(good)
    assert "tune.adapters.1: nowhere: nowhere holds no adapter_config.json" in said(good, "nowhere")
    other = write_adapter(tmp_path / "pfeiffer", model, 0, placement="pfeiffer")
    assert "it sits at other places than tune.adapters.0" in said(good, other)
    lora = shutil.copytree(good, tmp_path / "lora")
    (lora / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 8}')
    assert "its method is lora; fusion mixes bottleneck adapters" in said(good, lora)
    odd = shutil.copytree(good, tmp_path / "odd")
    (odd / "adapter_config.json").write_text('{"engine_method": "adapter", "options": {"reduction": "four"}}')
    assert "adapter_config.json: options: " in said(good, odd)
    broken = shutil.copytree(good, tmp_path / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"\0" * 20)
    assert "no safetensors file" in said(good, broken)
    ARCHITECTURES["Bert"], kept = {**ARCHITECTURES["Bert"], "hidden_size": 48}, ARCHITECTURES["Bert"]
    wide = write_adapter(tmp_path / "wide", build("Bert"), 0, reduction=4)
    ARCHITECTURES["Bert"] = kept
    assert "where this model's hidden size asks for (8, 32)" in said(good, wide)

    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(bert)
    one = write_adapter(tmp_path / "one", model, 0, base=str(bert))
    two = write_adapter(tmp_path / "two", model, 0, base=str(still_bert))
    assert f"it was trained on {still_bert}, but this model is {bert}" in said(one, two)
    three = write_adapter(tmp_path / "three", model, 0, base=f"../{bert.name}")  # as a recipe in a neighbouring folder says it
    fusion.apply(model, fusion.Options(method="fusion", adapters=[str(one), str(three)]), [])
    assert len(sites(model)) == 4


# -- from beginning to end --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["parallel", "compacter", "fusion"])
def test_a_run_is_resumed_scored_and_opened_again(recipe: MakeRecipe, bert: Path, case: str) -> None:
    tune = {"parallel": "{method: adapter, placement: parallel, reduction: 4}", "compacter": "{method: compacter, reduction: 4}"}
    if case == "fusion":
        from transformers import AutoModelForSequenceClassification

        body = AutoModelForSequenceClassification.from_pretrained(bert)
        for i in range(2):
            write_adapter(Path(f"source-{i}/adapter"), body, i, base=str(bert), reduction=4)
        tune["fusion"] = "{method: fusion, adapters: [source-0, source-1/adapter]}"
    options = (f"tune={tune[case]}", "train.epochs=1", "train.warmup=0")
    whole = finetune.finetune(recipe(*options), "whole", say=lambda line: None)
    stopped = finetune.finetune(recipe(*options), "r", say=lambda line: None, interrupted=StopAt("r", 2))
    assert stopped.progress.stopped == "interrupted"
    result = finetune.finetune(recipe(*options), "r", resume=True, say=lambda line: None)
    assert model_bytes("r") == model_bytes("whole")
    assert log_of("r") == log_of("whole")
    assert result.metrics["test"] == whole.metrics["test"]

    for i in range(2):
        shutil.rmtree(f"source-{i}", ignore_errors=True)  # a saved fusion needs them no more
    again = evaluate_run("r", "test.jsonl", [], as_json=True)
    assert again["scores"]["accuracy"] == result.metrics["test"]["accuracy"]
    assert again["scores"]["loss"] == pytest.approx(result.metrics["test"]["loss"], rel=1e-5)
    predict_run("r", None, "test.jsonl", "out.jsonl", [])
    fresh = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    then = [json.loads(line) for line in Path("r/predictions/test.jsonl").read_text().splitlines()]
    assert [row["label"] for row in fresh] == [row["prediction"] for row in then]
    opened = runs.open_run("r").model
    assert len(sites(opened)) == {"parallel": 2, "compacter": 4, "fusion": 4}[case]
    for site in sites(opened).values():  # each has learnt something
        learnt = site.value.weight - torch.eye(32) if case == "fusion" else site.up.t if case == "compacter" else site.up.weight
        assert learnt.abs().max() > 1e-3


# -- adapter-hub's layout ---------------------------------------------------------------------------------------------

# what their package writes for SeqBnConfig (Pfeiffer); the other configurations change some keys of it
HUB = {
    "adapter_residual_before_ln": False, "cross_adapter": False, "dropout": 0.0, "factorized_phm_W": True, "factorized_phm_rule": False,
    "hypercomplex_nonlinearity": "glorot-uniform", "init_weights": "bert", "init_weights_seed": None, "inv_adapter": None,
    "inv_adapter_reduction_factor": None, "is_parallel": False, "learn_phm": True, "leave_out": [], "ln_after": False,
    "ln_before": False, "mh_adapter": False, "non_linearity": "relu", "original_ln_after": True, "original_ln_before": True,
    "output_adapter": True, "phm_bias": True, "phm_c_init": "normal", "phm_dim": 4, "phm_init_range": 0.0001, "phm_layer": False,
    "phm_rank": 1, "reduction_factor": 4, "residual_before_ln": True, "scaling": 1.0, "shared_W_phm": False, "shared_phm_rule": True,
    "stochastic_depth": 0.0, "use_gating": False,
}  # fmt: skip
HUB_CASES: dict[str, dict[str, Any]] = {
    "seq_bn": {},
    "double_seq_bn": {"mh_adapter": True, "original_ln_before": False, "non_linearity": "swish", "reduction_factor": 8},
    "par_bn": {"original_ln_before": False, "is_parallel": True, "scaling": 4.0, "reduction_factor": 2},
    "both norms": {"mh_adapter": True, "scaling": 2.0, "non_linearity": "leakyrelu"},
    "attention alone": {"mh_adapter": True, "output_adapter": False, "non_linearity": "tanh"},
    "left out": {"leave_out": [1], "reduction_factor": {"default": 16}},
}
ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu, "swish": nn.functional.silu, "leakyrelu": nn.functional.leaky_relu, "tanh": torch.tanh,
}  # fmt: skip


def write_hub(
    folder: Path, architecture: str, changes: dict[str, Any], *, prefixed: bool = True, **about: Any
) -> dict[str, Tensor]:
    """A folder as their package saves it; returns its tensors."""
    config = {**HUB, **changes}
    distil = architecture == "DistilBert"
    factor = config["reduction_factor"]
    narrow = 32 // (factor["default"] if isinstance(factor, dict) else factor)
    places = [
        (distil, "attention_adapters.", "output_adapters."),
        (not distil, "attention.output.", "output."),
    ]
    attention, output = next((a, o) for fits, a, o in places if fits)
    body = f"{architecture.lower()}." if prefixed else ""
    tensors = {}
    for layer in range(2):
        if layer in config["leave_out"]:
            continue
        for place, there in ((attention, config["mh_adapter"]), (output, config["output_adapter"])):
            stem = f"{body}{'transformer' if distil else 'encoder'}.layer.{layer}.{place}adapters.imdb."
            shapes = {"adapter_down.0.weight": (narrow, 32), "adapter_down.0.bias": (narrow,)}
            shapes |= {"adapter_up.weight": (32, narrow), "adapter_up.bias": (32,)}
            tensors |= {stem + n: torch.randn(shape) * 0.3 for n, shape in shapes.items() if there}
    folder.mkdir()
    full = {"config": config, "hidden_size": 32, "model_class": f"{architecture}ForSequenceClassification",
            "model_name": "x", "model_type": architecture.lower(), "name": "imdb", "version": "adapters.1.2.0", **about}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(full))
    save_file(tensors, folder / "adapter.safetensors")
    return tensors


def their_layer(config: dict[str, Any], tensors: dict[str, Tensor], stem: str) -> Callable[[Tensor, Tensor, nn.Module], Tensor]:
    """bottleneck_layer_forward(hidden_states, input_tensor, layer_norm) of adapters/methods/bottleneck.py, in plain torch.

    pre_forward, forward and post_forward of Adapter and ParallelAdapter (adapters/methods/modeling.py), in their order.
    """

    def run(hidden_states: Tensor, input_tensor: Tensor, layer_norm: nn.Module) -> Tensor:
        if stem + "adapter_up.weight" not in tensors:
            return layer_norm(hidden_states + input_tensor)
        input_hidden_states = hidden_states
        if config["is_parallel"]:
            hidden_states = residual = input_tensor
        else:
            residual = hidden_states
            if config["original_ln_before"]:
                hidden_states = layer_norm(hidden_states + input_tensor)
        down = hidden_states @ tensors[stem + "adapter_down.0.weight"].T + tensors[stem + "adapter_down.0.bias"]
        down = ACTS[config["non_linearity"]](down)
        output = (down @ tensors[stem + "adapter_up.weight"].T + tensors[stem + "adapter_up.bias"]) * config["scaling"]
        if config["is_parallel"]:
            output = output + input_hidden_states
        else:
            output = output + residual
        return layer_norm(output + input_tensor)

    return run


def theirs(model: Any, architecture: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    """`model` with the forward passes of their BertSelfOutput, BertOutput and TransformerBlock."""
    tensors = {n.removeprefix(f"{architecture.lower()}."): t for n, t in tensors.items()}
    if architecture == "DistilBert":
        for i, block in enumerate(model.distilbert.transformer.layer):
            stem = f"transformer.layer.{i}."
            after_attention = their_layer(config, tensors, stem + "attention_adapters.adapters.imdb.")
            after_output = their_layer(config, tensors, stem + "output_adapters.adapters.imdb.")

            def block_forward(
                x: Tensor,
                attention_mask: Any = None,
                b: Any = block,
                f: Any = after_attention,
                g: Any = after_output,
                **more: Any,
            ) -> Tensor:
                sa_output = f(b.attention(x, attention_mask=attention_mask, **more)[0], x, b.sa_layer_norm)
                return g(b.ffn(sa_output), sa_output, b.output_layer_norm)

            block.forward = block_forward
        return model
    for i, layer in enumerate(getattr(model, architecture.lower()).encoder.layer):
        for place, module in (("attention.output.", layer.attention.output), ("output.", layer.output)):
            f = their_layer(config, tensors, f"encoder.layer.{i}.{place}adapters.imdb.")

            def forward(h: Tensor, x: Tensor, m: Any = module, f: Any = f) -> Tensor:
                return f(m.dropout(m.dense(h)), x, m.LayerNorm)

            module.forward = forward
    return model


@pytest.mark.parametrize("architecture", ["Bert", "Roberta", "DistilBert", "Electra"])
@pytest.mark.parametrize("case", HUB_CASES)
def test_an_adapter_of_the_hub_computes_what_it_does_there(case: str, architecture: str) -> None:
    tensors = write_hub(Path("hub"), architecture, HUB_CASES[case], prefixed=case != "seq_bn")
    expected = logits(theirs(build(architecture), architecture, {**HUB, **HUB_CASES[case]}, tensors))
    assert _hub_layout.recognised(Path("hub"))
    options, ours, head = _hub_layout.read(Path("hub"))
    assert head == {}
    model = build(architecture)
    start = logits(model)
    adapter.apply(model, adapter.Options.model_validate({"method": "adapter", **options}), [])
    assert set(ours) == {n for n, p in model.named_parameters() if p.requires_grad}
    model.load_state_dict(ours, strict=False)
    assert torch.allclose(logits(model), expected, atol=1e-5)
    assert not torch.allclose(expected, start, atol=1e-2)


@pytest.mark.parametrize("case", ["seq_bn", "double_seq_bn", "par_bn"])
def test_a_run_begins_from_an_adapter_of_the_hub(case: str, recipe: MakeRecipe, bert: Path) -> None:
    """`tune.start` takes method, options and weights from the folder; what is trained from there opens again."""
    from transformers import AutoModelForSequenceClassification

    from engine import prepare

    tensors = write_hub(Path("hub"), "Bert", HUB_CASES[case])
    ready = prepare.prepare(recipe("tune={start: hub}"), say=lambda line: None)
    assert ready.recipe.tune.method == "adapter"
    base = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)
    base.classifier.load_state_dict(ready.loaded.model.classifier.state_dict())
    expected = logits(theirs(base.eval(), "Bert", {**HUB, **HUB_CASES[case]}, tensors))
    assert torch.allclose(logits(ready.loaded.model), expected, atol=1e-5)
    result = finetune.finetune(recipe("tune={start: hub}", "train.max_steps=3"), "r", say=lambda line: None)
    assert evaluate_run("r", "test.jsonl", [], as_json=True)["scores"]["accuracy"] == result.metrics["test"]["accuracy"]


def test_names_and_activations_of_old_versions_are_read() -> None:
    new = write_hub(Path("hub"), "Bert", {"mh_adapter": True, "non_linearity": "gelu"}, type="text_task", version="1")
    old = {
        n.replace("attention.output.adapters", "attention.output.attention_text_task_adapters").replace(
            "output.adapters", "output.layer_text_task_adapters"
        ): t
        for n, t in new.items()
    }
    assert len(set(old) - set(new)) == len(new)
    about = json.loads(Path("hub/adapter_config.json").read_text())
    options, expected, _ = _hub_layout.read(Path("hub"))
    assert options["activation"] == "gelu"
    del about["version"]
    about["config"]["invertible_adapter"] = {"block_type": "nice", "reduction_factor": 2}  # named, not used
    Path("hub/adapter_config.json").write_text(json.dumps(about))
    save_file(old, "hub/adapter.safetensors")
    options, ours, _ = _hub_layout.read(Path("hub"))
    assert options["activation"] == "gelu_new"
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[n], expected[n]) for n in ours)


@pytest.mark.parametrize(
    ("architecture", "modules", "activation"),
    [
        ("Bert", ("bert.pooler.dense", "classifier"), torch.tanh),
        ("Roberta", ("classifier.dense", "classifier.out_proj"), torch.tanh),
        ("DistilBert", ("pre_classifier", "classifier"), torch.relu),
        ("Electra", ("classifier.dense", "classifier.out_proj"), nn.functional.gelu),
    ],
)
def test_a_head_of_the_hub_is_read(architecture: str, modules: tuple[str, str], activation: Any) -> None:
    """Their flexible head is linear, activation, linear on the first token; the same weights make the same logits here."""
    write_hub(Path("hub"), architecture, {})
    sizes = ((1, 32), (4, 2))
    tensors = {
        f"heads.imdb.{i}.{p}": torch.randn((out, 32) if p == "weight" else (out,))
        for i, out in ((1, 32), (4, 2))
        for p in ("weight", "bias")
    }
    assert len(tensors) == 2 * len(sizes)
    name = {v: k for k, v in {"tanh": torch.tanh, "relu": torch.relu, "gelu": nn.functional.gelu}.items()}[activation]
    about = {"name": "imdb", "model_class": f"{architecture}AdapterModel",
             "config": {"head_type": "classification", "layers": 2, "activation_function": name, "use_pooler": False, "num_labels": 2}}  # fmt: skip
    Path("hub/head_config.json").write_text(json.dumps(about))
    save_file(tensors, "hub/model_head.safetensors")
    _, _, head = _hub_layout.read(Path("hub"))
    assert {n.rpartition(".")[0] for n in head} == set(modules)
    model = build(architecture)
    assert not model.load_state_dict(head, strict=False).unexpected_keys
    with torch.no_grad():
        first = getattr(model, architecture.lower())(**batch()).last_hidden_state[:, 0]
    hidden = activation(first @ tensors["heads.imdb.1.weight"].T + tensors["heads.imdb.1.bias"])
    assert torch.allclose(logits(model), hidden @ tensors["heads.imdb.4.weight"].T + tensors["heads.imdb.4.bias"], atol=1e-5)

    about["config"]["layers"] = 3
    Path("hub/head_config.json").write_text(json.dumps(about))
    with pytest.raises(InputError, match=r"config.layers: 3 cannot be read here.*delete head_config.json"):
        _hub_layout.read(Path("hub"))
    Path("hub/head_config.json").write_text(
        json.dumps({"name": None, "model_class": f"{architecture}ForSequenceClassification", "config": None})
    )
    save_file({"classifier.weight": torch.ones(2, 32)}, "hub/model_head.safetensors")
    assert set(_hub_layout.read(Path("hub"))[2]) == {"classifier.weight"}


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"original_ln_after": False}, "original_ln_after"),
        ({"ln_before": True}, "ln_before"),
        ({"ln_after": True}, "ln_after"),
        ({"use_gating": True}, "use_gating"),
        ({"phm_layer": True}, "phm_layer"),
        ({"dropout": 0.1}, "dropout"),
        ({"stochastic_depth": 0.1}, "stochastic_depth"),
        ({"scaling": "learned"}, "scaling"),
        ({"residual_before_ln": "post_add"}, "residual_before_ln"),
        ({"residual_before_ln": False}, "residual_before_ln"),
        ({"inv_adapter": "nice"}, "inv_adapter"),
        ({"reduction_factor": 1.5}, "reduction_factor"),
        ({"reduction_factor": {"0": 2, "default": 4}}, "reduction_factor"),
        ({"is_parallel": True, "mh_adapter": True}, "mh_adapter"),
        ({"output_adapter": False}, "output_adapter"),
        ({"architecture": "lora"}, "architecture"),
        ({"something_new": 1}, "something_new"),
        ({"non_linearity": "rellu"}, "non_linearity"),
    ],
)
def test_what_cannot_be_mapped_is_refused_by_its_key(changes: dict[str, Any], key: str) -> None:
    write_hub(Path("hub"), "Bert", {})
    about = json.loads(Path("hub/adapter_config.json").read_text())
    about["config"] |= changes
    Path("hub/adapter_config.json").write_text(json.dumps(about))
    with pytest.raises(InputError, match=rf"adapter_config.json: config.{key}: "):
        _hub_layout.read(Path("hub"))


def test_damaged_folders_and_pickles_are_refused() -> None:
    tensors = write_hub(Path("hub"), "Bert", {})
    name = next(iter(tensors))
    for changed, said in (
        ({n: t for n, t in tensors.items() if n != name}, "lacks down.weight"),
        ({**tensors, "bert.invertible_adapters.imdb.F.0.weight": torch.ones(2)}, "inv_adapter"),
        ({**tensors, "bert.pooler.dense.weight": torch.ones(2)}, "belongs to no bottleneck"),
        ({**tensors, name: torch.ones(3, 32)}, "reduction_factor: 4 gives 8, but the weights have 3"),
    ):
        save_file(changed, "hub/adapter.safetensors")
        with pytest.raises(InputError, match=said):
            _hub_layout.read(Path("hub"))
    Path("hub/adapter.safetensors").rename("hub/pytorch_adapter.bin")
    assert _hub_layout.recognised(Path("hub"))
    with pytest.raises(InputError, match=r"pickle, which can run code.*use_safetensors=True"):
        _hub_layout.read(Path("hub"))
    write_hub(Path("gpt"), "Bert", {}, model_type="gpt2")
    with pytest.raises(InputError, match="model_type 'gpt2' is not among bert, roberta"):
        _hub_layout.read(Path("gpt"))
