"""Adapters travel: into and out of the peft package's layout, from run to run, several on one base, merged into the base."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeRecipe, StopAt
from laws import CASES, logits

from engine import adapters, bases, finetune, prepare, runs
from engine.errors import InputError, RunError
from engine.predict import predict_run

QUIET: dict[str, Any] = {"say": lambda line: None}
FAST = ("train.max_steps=4", "train.learning_rate=3e-2")
WHOLE = {"full", "last_n", "bitfit", "layernorm"}  # methods that train the model's own weights and leave no adapter


def peft_config(kind: str) -> Any:
    peft = pytest.importorskip("peft", reason="peft is a rival to compare with, not a dependency")
    lora = {"task_type": "SEQ_CLS", "r": 4, "lora_alpha": 6, "target_modules": ["query", "dense"]}
    return {
        "lora": lambda: peft.LoraConfig(**lora, rank_pattern={"query": 2}, alpha_pattern={"layer.0.attention.output.dense": 5}),
        "rslora": lambda: peft.LoraConfig(**lora, use_rslora=True),
        "dora": lambda: peft.LoraConfig(**lora, use_dora=True),
        "embedding": lambda: peft.LoraConfig(**{**lora, "target_modules": ["word_embeddings", "value"]}),
        "ia3": lambda: peft.IA3Config(task_type="SEQ_CLS", target_modules=["key", "value"], feedforward_modules=[]),
    }[kind]()


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "embedding", "ia3"])
def test_what_peft_trained_starts_a_run_and_computes_the_same(recipe: MakeRecipe, bert: Path, kind: str) -> None:
    config = peft_config(kind)
    import peft
    from transformers import AutoModelForSequenceClassification

    theirs = peft.get_peft_model(AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2), config)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained("theirs")
    ready = prepare.prepare(recipe("tune={start: theirs}"), **QUIET)
    assert ready.recipe.tune.method == ("ia3" if kind == "ia3" else "lora")
    assert torch.allclose(logits(ready.loaded.model), logits(theirs), atol=1e-5)
    base = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)
    assert not torch.allclose(logits(theirs), logits(base), atol=1e-2)
    # and back again: what is trained from there opens in peft
    finetune.finetune(recipe("tune={start: theirs}", *FAST), "r", **QUIET)
    again = peft.PeftModel.from_pretrained(base, "r/adapter")
    merged = AutoModelForSequenceClassification.from_pretrained("r/model")
    assert torch.allclose(logits(again), logits(merged), atol=1e-5)
    assert not torch.allclose(logits(again), logits(theirs), atol=1e-3)


@pytest.mark.parametrize(
    "tune",
    ["{method: lora, r: 3, init: pissa}", "{method: lora, r: 3, init: pissa, rslora: true}", "{method: lora, at: ['**.value', '**.word_embeddings']}",
     "{method: lora, r: 3, train: '**.LayerNorm.*'}"],
)  # fmt: skip
def test_what_we_trained_opens_in_peft(recipe: MakeRecipe, bert: Path, tune: str) -> None:
    peft = pytest.importorskip("peft", reason="peft is a rival to compare with, not a dependency")
    from transformers import AutoModelForSequenceClassification

    finetune.finetune(recipe(f"tune={tune}", *FAST), "r", **QUIET)
    merged = AutoModelForSequenceClassification.from_pretrained("r/model")
    base = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)
    theirs = peft.PeftModel.from_pretrained(base, "r/adapter")
    assert torch.allclose(logits(theirs), logits(merged), atol=1e-5)


@pytest.mark.parametrize("tune", ["{method: lora, r: 3, dora: true}", "{method: adapter, reduction: 4}", "{method: ia3}"])
def test_a_run_starts_where_another_ended_and_needs_it_no_more(recipe: MakeRecipe, tune: str) -> None:
    finetune.finetune(recipe(f"tune={tune}", *FAST), "first", **QUIET)
    first = runs.open_run("first").model
    ready = prepare.prepare(recipe("tune={start: first}"), **QUIET)
    assert torch.allclose(logits(ready.loaded.model), logits(first), atol=1e-5)
    straight = finetune.finetune(recipe("tune={start: first}", *FAST), "straight", **QUIET)
    finetune.finetune(recipe("tune={start: first}", *FAST), "second", interrupted=StopAt("second", 2), **QUIET)
    shutil.rmtree("first")
    from engine.recipe import load

    resumed = finetune.finetune(load("second/recipe.yaml"), "second", resume=True, **QUIET)
    assert resumed.metrics["test"] == straight.metrics["test"]
    assert torch.equal(logits(runs.open_run("second").model), logits(runs.open_run("straight").model))


def test_what_does_not_fit_is_said(recipe: MakeRecipe) -> None:
    finetune.finetune(recipe("tune={method: lora, r: 3}", *FAST), "first", **QUIET)

    def fails(tune: str, said: str) -> None:
        with pytest.raises(InputError, match=said) as error:
            finetune.finetune(recipe(f"tune={tune}"), "r", **QUIET)
        assert "Traceback" not in str(error.value)
        assert not Path("r").exists()

    fails("{start: nowhere}", "tune.start: nowhere holds no adapter_config.json")
    fails("{start: first, method: lora, r: 8}", "tune.r: 8 here, but 3 in the adapter")
    fails("{start: first, method: bitfit}", "tune.method: bitfit here, but lora in the adapter")
    config = json.loads(Path("first/adapter/adapter_config.json").read_text())
    Path("first/adapter/adapter_config.json").write_text(json.dumps({**config, "peft_type": "VERA"}))
    fails("{start: first}", "peft's VERA is not among what is read here: IA3, LORA")
    Path("first/adapter/adapter_config.json").write_text("{")
    fails("{start: first}", "adapter_config.json cannot be read")
    Path("first/adapter/adapter_config.json").write_text(json.dumps(config))
    Path("first/adapter/adapter_model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{]")
    fails("{start: first}", "no safetensors file")
    Path("first/adapter/adapter_model.safetensors").rename("first/adapter/adapter_model.bin")
    fails("{start: first}", "adapter_model.bin is a pickle")


def test_other_labels_leave_the_head_fresh(recipe: MakeRecipe) -> None:
    finetune.finetune(recipe("tune={method: lora, r: 3}", *FAST), "first", **QUIET)
    rows = [json.loads(line) for line in Path("train.jsonl").read_text().splitlines()]
    Path("three.jsonl").write_text("".join(json.dumps({**r, "label": ["a", "b", "c"][i % 3]}) + "\n" for i, r in enumerate(rows)))
    notes: list[str] = []
    ready = prepare.prepare(
        recipe("tune={start: first}", "data.train=three.jsonl", "data.validation=null", "data.test=null"), say=notes.append
    )
    assert any("the head is fresh: classifier" in line for line in notes)
    assert ready.loaded.model.config.num_labels == 3


def test_merge_is_checked_and_loads_plainly(recipe: MakeRecipe, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForSequenceClassification

    finetune.finetune(recipe("tune={method: lora, r: 3}", *FAST), "r", **QUIET)
    bases.merge_run("r", None)
    assert "read back, it computes the same" in capsys.readouterr().out
    unmerged, method = bases.open_unmerged("r")
    plain = AutoModelForSequenceClassification.from_pretrained("r/merged")
    assert torch.allclose(logits(plain), logits(unmerged.model), atol=1e-5)
    assert torch.equal(logits(plain), logits(AutoModelForSequenceClassification.from_pretrained("r/model")))
    with pytest.raises(InputError, match="is not empty"):
        bases.merge_run("r", None)
    with torch.no_grad():
        next(p for n, p in unmerged.model.named_parameters() if n.endswith("lora_B")).fill_(float("nan"))
    with pytest.raises(RunError, match="are no numbers"):
        adapters.merge(unmerged.model, method, bases.probe(unmerged.tokenizer, torch.device("cpu")))
    finetune.finetune(recipe("tune={method: adapter}", *FAST), "stays", **QUIET)
    with pytest.raises(InputError, match="do not fold"):
        bases.merge_run("stays", None)
    finetune.finetune(recipe(*FAST), "whole", **QUIET)
    with pytest.raises(InputError, match="no adapter/"):
        bases.merge_run("whole", None)


@pytest.mark.parametrize("case", [*(c for c, o in CASES.items() if o["method"] not in WHOLE), "pissa, rslora", "pissa, dora"])
def test_opened_unmerged_a_run_computes_what_it_learnt(recipe: MakeRecipe, case: str) -> None:
    """Base + adapter/ is the model/ that was trained; the base in it is the pretrained one, bit for bit."""
    more = {"rslora": {"rslora": True}, "dora": {"dora": True}}
    kind, _, also = case.partition(", ") if case not in CASES else (case, "", "")
    tune = json.dumps({**CASES[kind], **more.get(also, {})})
    finetune.finetune(recipe(f"tune={tune}", *FAST), "r", **QUIET)
    unmerged, method = bases.open_unmerged("r")
    learnt = logits(runs.open_run("r").model)
    assert torch.allclose(logits(unmerged.model), learnt, atol=1e-5)
    base = prepare.prepare(recipe("train.max_steps=1"), **QUIET).loaded.model
    if "nf4" not in case and "int8" not in case and case != "qdora":
        ours = {name.replace(".base.", "."): p for name, p in unmerged.model.named_parameters()}
        assert all(torch.equal(ours[n], p) for n, p in base.named_parameters() if not n.startswith("classifier."))
    if hasattr(method, "merge"):
        adapters.merge(unmerged.model, method, bases.probe(unmerged.tokenizer, torch.device("cpu")))
        assert torch.allclose(logits(unmerged.model), learnt, atol=1e-5)
    with torch.no_grad():  # it was the adapter that did it: the trained head on the bare base says something else
        base.classifier.load_state_dict(unmerged.model.classifier.state_dict())
    assert not torch.allclose(logits(base), learnt, atol=1e-3)


def test_a_merge_that_changes_the_outputs_is_refused(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.layers.lora import LoRALinear

    keep = LoRALinear.delta
    monkeypatch.setattr(LoRALinear, "delta", lambda self: 2 * keep(self))
    with pytest.raises(RunError, match="merging failed its check"):
        finetune.finetune(recipe("tune={method: lora}", *FAST), "r", **QUIET)
    assert (Path("r/adapter") / adapters.WEIGHTS).exists()  # nothing that was learnt is lost


@pytest.mark.parametrize("more", ["", ", quantize: nf4, block: 16", ", dora: true", ", init: pissa"])
def test_the_head_may_be_a_target_too(recipe: MakeRecipe, more: str) -> None:
    """It trains whole and has an update besides; merged or not, the run gives what it learnt."""
    tune = "{method: lora, r: 2, at: ['**.query', classifier]" + more + "}"
    finetune.finetune(recipe(f"tune={tune}", *FAST), "r", **QUIET)
    unmerged, _ = bases.open_unmerged("r")
    trains = {n for n, p in unmerged.model.named_parameters() if p.requires_grad and n.startswith("classifier.")}
    assert {"classifier.base.weight", "classifier.base.bias", "classifier.lora_A", "classifier.lora_B"} <= trains
    assert torch.allclose(logits(unmerged.model), logits(runs.open_run("r").model), atol=1e-5)


def test_a_head_that_is_tied_to_the_embeddings_leaves_them_to_the_base(bert: Path, tmp_path: Path) -> None:
    """adapter/ of a masked language model holds the head without the decoder's weight; one that holds it, the same, is read."""
    from laws import apply
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForMaskedLM

    def tuned() -> Any:
        model = AutoModelForMaskedLM.from_pretrained(bert).eval()
        return (model, *apply(model, "lora"))

    model, method, options = tuned()
    own = [n for n, _ in model.named_parameters() if "lora_" in n]
    with torch.no_grad():
        model.cls.predictions.transform.dense.weight.add_(0.1)
    folder = tmp_path / "adapter"
    adapters.save(model, folder, method, options, ["cls"], own, {"name": "x", "revision": None, "task_type": None})
    held = load_file(folder / adapters.WEIGHTS)
    assert "base_model.model.cls.predictions.transform.dense.weight" in held
    decoder = "base_model.model.cls.predictions.decoder.weight"
    assert decoder not in held
    for extra, fits in (({}, True), ({decoder: model.get_input_embeddings().weight.detach()}, True), ({decoder: torch.ones(62, 32)}, False)):
        save_file({n: t.clone() for n, t in {**held, **extra}.items()}, folder / adapters.WEIGHTS)
        again, method, options = tuned()
        base = again.get_input_embeddings().weight.clone()
        if fits:
            adapters.load(again, method, options, adapters.read(folder, "here"), ["cls"], "here")
            assert torch.equal(logits(again), logits(model))
        else:
            with pytest.raises(InputError, match="cls.predictions.decoder.weight"):
                adapters.load(again, method, options, adapters.read(folder, "here"), ["cls"], "here")
        assert torch.equal(again.get_input_embeddings().weight, base)


def test_several_runs_answer_on_one_base(recipe: MakeRecipe, capsys: pytest.CaptureFixture[str]) -> None:
    tunes = {"a": "{method: lora, r: 3}", "b": "{method: lora, r: 2, dora: true}", "c": "{method: adapter, reduction: 4}"}
    for name, tune in tunes.items():
        finetune.finetune(recipe(f"tune={tune}", f"seed={ord(name)}", *FAST), name, **QUIET)
    alone = {}
    for name in tunes:
        capsys.readouterr()
        predict_run(name, ["a good film", "a dull film , not warm"], None, None, [])
        alone[name] = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    predict_run("a", ["a good film", "a dull film , not warm"], None, None, [], also=["b", "c"])
    said = capsys.readouterr()
    lines = [json.loads(line) for line in said.out.splitlines()]
    assert [line["run"] for line in lines] == ["a", "b", "c", "a", "b", "c"]
    for line, want in zip(lines, [alone[n][i] for i in range(2) for n in "abc"], strict=True):
        assert line["label"] == want["label"]
        assert line["probabilities"] == pytest.approx(want["probabilities"], abs=1e-5)
    assert "3 runs on one base" in said.err
    shared: dict[str, Any] = {}
    models = [bases.open_unmerged(name, shared)[0].model for name in tunes]
    table = [{p.data_ptr() for p in m.base_model.encoder.parameters()} for m in models]
    assert (
        len(table[0] & table[1] & table[2])
        == sum(1 for _ in bases.open_unmerged("a")[0].model.base_model.encoder.parameters()) - 8
    )
    finetune.finetune(recipe(*FAST), "whole", **QUIET)
    with pytest.raises(InputError, match="no adapter/"):
        bases.open_unmerged("whole")


def test_runs_of_two_bases_are_not_held_as_one(recipe: MakeRecipe, still_bert: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    other = shutil.copytree(still_bert, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    save_file({n: t + 0.01 for n, t in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    finetune.finetune(recipe("tune={method: lora, r: 3}", *FAST), "r", **QUIET)
    finetune.finetune(recipe("tune={method: lora, r: 3}", *FAST, model=other), "s", **QUIET)
    with pytest.raises(InputError, match=r"--also s: its base model is .*other .sha256 .* that of r is .*bert.*Ask it alone: predict s"):
        predict_run("r", ["a good film"], None, None, [], also=["s"])


def test_another_base_is_refused(recipe: MakeRecipe, bert: Path, tmp_path: Path) -> None:
    finetune.finetune(recipe("tune={method: lora, r: 3}", *FAST), "r", **QUIET)
    environment = json.loads(Path("r/environment.json").read_text())
    environment["model"]["sha256"] = "0" * 64
    Path("r/environment.json").write_text(json.dumps(environment))
    with pytest.raises(InputError, match="is not the base of this run"):
        bases.open_unmerged("r")
