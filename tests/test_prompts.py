"""Prefixes and prompts: the maths against plain formulas, generation with and without a cache, and the peft package."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FLOAT32, MakeRecipe, StopAt
from laws import ARCHITECTURES, IDS, SMALL, batch, build, logits
from test_loop import model_bytes
from torch import nn

from engine import find, finetune, freeze, models, prepare
from engine.errors import InputError
from engine.fast import packing
from engine.layers.disentangled import DisentangledAttention
from engine.predict import evaluate_run, predict_run
from engine.swap import swap

QUIET = {"say": lambda line: None}
DEBERTA = {**SMALL, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": -1}
T5 = ARCHITECTURES["T5"]
METHODS: dict[str, dict[str, Any]] = {
    "prefix": {"length": 5},
    "prompt": {"length": 5},
    "ptuning": {"length": 5, "encoder_size": 16},
}


def shaken(model: Any, by: float = 0.02) -> Any:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * by)
    return model.eval()


def made(config: str, options: dict[str, Any], auto: str, by: float = 0.02) -> Any:
    import transformers

    torch.manual_seed(0)
    return shaken(getattr(transformers, auto).from_config(getattr(transformers, f"{config}Config")(**options, **IDS)), by)


def put(model: Any, method: str, **options: Any) -> tuple[Any, Any]:
    """Apply a method, then move what it trains away from its beginning; (method, options)."""
    module = find.module("tune", method, "test")
    chosen = module.Options.model_validate({"method": method, **METHODS[method], **options})
    module.apply(model, chosen, models.head_of(model, []))
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".prefix." in name or "prompt." in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return module, chosen


# -- DeBERTa's attention ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"position_buckets": 4, "share_att_key": True, "norm_rel_ebd": "layer_norm", "position_biased_input": False},
        {"position_buckets": 4, "share_att_key": False, "conv_kernel_size": 3},
        {"pos_att_type": ["p2c"]},
        {"pos_att_type": ["c2p"], "share_att_key": True},
        {"relative_attention": False},
    ],
)
def test_our_disentangled_attention_is_deberta_s(more: dict[str, Any]) -> None:
    """Without a prefix: outputs and gradients to float32's rounding, in the same places of the state dict."""
    theirs = made("DebertaV2", {**DEBERTA, **more}, "AutoModelForSequenceClassification", by=0.2)
    ours = copy.deepcopy(theirs)
    done = swap(ours, ["**.attention.self"], lambda old, path: DisentangledAttention(old))
    assert len(done) == 2
    assert not any(s.fresh or s.dropped for s in done)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert torch.allclose(logits(ours), logits(theirs), atol=FLOAT32)
    for model in (ours, theirs):
        model(**batch(), labels=torch.tensor([0, 1, 1, 0])).loss.backward()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        assert a.grad is None or torch.allclose(a.grad, b.grad, atol=FLOAT32), name


def test_a_prefix_in_deberta_follows_its_formula() -> None:
    """One attention, written out: softmax over [P_k ; K] with the distances' terms for the text alone."""
    model = made("DebertaV2", {**DEBERTA, "position_buckets": 4}, "AutoModelForSequenceClassification", by=0.2)
    put(model, "prefix")
    layer = model.deberta.encoder.layer[0].attention.self
    x, t = torch.randn(2, 6, 32), 6
    mask = torch.ones(2, 1, t, t)
    mask[1, :, :, 4:] = 0
    table = model.deberta.encoder.get_rel_embedding()
    buckets = model.deberta.encoder.get_rel_pos(x)
    p_key, p_value = layer.prefix()
    q, k, v = (p(x).view(2, t, 4, 8).transpose(1, 2) for p in (layer.query_proj, layer.key_proj, layer.value_proj))
    kr, qr = (p(table).view(-1, 4, 8).transpose(0, 1) for p in (layer.pos_key_proj, layer.pos_query_proj))
    scores = torch.full((2, 4, t, 5 + t), -1e9)
    for i in range(t):
        scores[:, :, i, :5] = torch.einsum("bhd,hpd->bhp", q[:, :, i], p_key[0])
        for j in range(t):
            d = int(buckets[0, i, j])
            one = (q[:, :, i] * k[:, :, j]).sum(-1)
            one = one + (q[:, :, i] * kr[:, d + 4]).sum(-1) + (k[:, :, j] * qr[:, d + 4]).sum(-1)
            scores[:, :, i, 5 + j] = one.masked_fill(mask[:, :, i, j] == 0, -1e9)
    weights = (scores / (3 * 8) ** 0.5).softmax(-1)
    expected = weights @ torch.cat([p_value.expand(2, -1, -1, -1), v], dim=2)
    found, _ = layer(x, mask, relative_pos=buckets, rel_embeddings=table)
    assert torch.allclose(found, expected.transpose(1, 2).reshape(2, t, 32), atol=1e-5)


def test_an_architecture_without_the_interface_is_refused_and_left_whole() -> None:
    model = made("Deberta", SMALL, "AutoModelForSequenceClassification")
    before = logits(model)
    with pytest.raises(InputError, match="prefix needs an architecture that computes its attention by sdpa"):
        put(model, "prefix")
    assert torch.equal(logits(model), before)
    assert not any("prefix" in name for name, _ in model.named_parameters())


# -- T5 ---------------------------------------------------------------------------------------------------------------


def seq2seq() -> Any:
    return made("T5", {**T5, "num_decoder_layers": 3}, "AutoModelForSeq2SeqLM", by=0.2)


def test_t5_has_its_parts() -> None:
    for model, head in ((seq2seq(), "lm_head"), (build("T5"), "classification_head")):
        assert models.head_of(model, []) == [head]
        parts = freeze.layout(model, [head])
        stacks = [path.split(".block")[0].rpartition(".")[2] for path in parts.blocks]
        assert stacks == ["encoder"] * stacks.count("encoder") + ["decoder"] * stacks.count("decoder")
        covered = [*parts.before, *parts.blocks, *parts.between, *parts.after, head]
        outside = [n for n, _ in model.named_parameters() if not any(n.startswith(p + ".") for p in covered)]
        assert not outside
    rates = freeze.layer_rates(seq2seq(), ["lm_head"], 0.5)
    assert (rates["shared.weight"], rates["encoder.block.0.layer.0.SelfAttention.q.weight"]) == (0.5**6, 0.5**5)
    assert rates["encoder.final_layer_norm.weight"] == rates["encoder.block.1.layer.0.SelfAttention.q.weight"] == 0.5**4
    assert rates["decoder.block.0.layer.0.SelfAttention.q.weight"] == 0.5**3
    assert rates["decoder.final_layer_norm.weight"] == 1


def test_t5_has_a_prefix_in_every_attention() -> None:
    model = seq2seq()
    put(model, "prefix")
    places = {name for name, m in model.named_modules() if name.endswith(".prefix")}
    expected = {name + ".prefix" for name, m in model.named_modules() if name.endswith("Attention")}
    assert places == expected
    assert len(places) == 2 + 3 + 3  # the encoder's, the decoder's, and the decoder's look at the encoder
    out = model(**batch(), labels=batch()["input_ids"])
    out.loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.named_parameters() if ".prefix." in n)


@pytest.mark.parametrize("method", METHODS)
def test_t5_s_decoder_stays_causal_and_padding_changes_nothing(method: str) -> None:
    model = seq2seq()
    put(model, method)
    targets = torch.randint(3, 60, (4, 6))
    out = logits(model, {**batch(), "decoder_input_ids": targets})
    changed = targets.clone()
    changed[:, 4:] = 7
    assert torch.allclose(logits(model, {**batch(), "decoder_input_ids": changed})[:, :4], out[:, :4], atol=1e-5)
    assert not torch.allclose(logits(model, {**batch(), "decoder_input_ids": changed})[:, 4:], out[:, 4:], atol=1e-3)
    one = {k: v[1:2, :4] for k, v in batch().items()}
    assert torch.allclose(logits(model, {**one, "decoder_input_ids": targets[1:2]}), out[1:2], atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_t5_recomputes_its_activations_to_the_same_gradients(method: str) -> None:
    model = seq2seq()
    put(model, method)
    plain = copy.deepcopy(model)
    model.gradient_checkpointing_enable()
    for m in (model, plain):
        for module in m.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if hasattr(module, "dropout") and isinstance(module.dropout, float):
                module.dropout = 0.0
        m.train()(**batch(), labels=batch()["input_ids"]).loss.backward()
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        assert a.grad is None or torch.allclose(a.grad, b.grad, atol=1e-5), name


# -- generation -------------------------------------------------------------------------------------------------------


def greedy(model: Any, inputs: dict[str, torch.Tensor], steps: int) -> torch.Tensor:
    """What argmax says, each step from the start, by the formula of decoding: no cache, no generate()."""
    rows = []
    for i in range(len(inputs["input_ids"])):
        real = inputs["attention_mask"][i].bool()
        text = inputs["input_ids"][i][real][None]
        out = torch.tensor([[0]]) if model.config.is_encoder_decoder else text
        for _ in range(steps):
            given = {"input_ids": text, "decoder_input_ids": out} if model.config.is_encoder_decoder else {"input_ids": out}
            out = torch.cat([out, logits(model, given)[:, -1:].argmax(-1)], dim=1)
        rows.append(out[0, -steps:])
    return torch.stack(rows)


@pytest.mark.parametrize("architecture", ["GPT2", "Llama", "T5"])
@pytest.mark.parametrize("method", METHODS)
def test_generating_with_a_cache_equals_generating_without(method: str, architecture: str) -> None:
    """Texts of several lengths, padded as each wants it (language models on the left): a prefix or prompt comes in once."""
    model = made(
        architecture, ARCHITECTURES[architecture], f"AutoModelFor{'Seq2SeqLM' if architecture == 'T5' else 'CausalLM'}", 0.3
    )
    plain = copy.deepcopy(model)
    put(model, method)
    lengths = torch.tensor([7, 3, 5])
    mask = (torch.arange(7) < lengths[:, None]).long()
    if architecture != "T5":
        mask = mask.flip(1)
    inputs = {"input_ids": torch.randint(3, 60, mask.shape) * mask, "attention_mask": mask}
    how = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = greedy(model, inputs, 8)
    for cache in (True, False):
        assert torch.equal(model.generate(**inputs, use_cache=cache, **how)[:, -8:], expected), f"use_cache={cache}"
    how = {**how, "max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 2}
    assert torch.equal(*(model.generate(**inputs, use_cache=cache, **how) for cache in (True, False)))
    assert not torch.equal(greedy(plain, inputs, 8), expected)


# -- prompts ----------------------------------------------------------------------------------------------------------


def test_a_prompt_is_vectors_before_the_words_embeddings() -> None:
    """BERT by hand: [P ; E(text)], ones in the mask, zeros in the token types; positions count from the prompt's start."""
    model = build("Bert")
    inputs = {**batch(), "token_type_ids": (torch.arange(11) > 5).long().expand(4, -1)}
    plain = copy.deepcopy(model)
    put(model, "prompt")
    vectors = model.bert.prompt.embedding.detach()
    words = plain.bert.embeddings.word_embeddings(inputs["input_ids"])
    by_hand = {
        "inputs_embeds": torch.cat([vectors.expand(4, -1, -1), words], dim=1),
        "attention_mask": torch.cat([torch.ones(4, 5), inputs["attention_mask"]], dim=1),
        "token_type_ids": torch.cat([torch.zeros(4, 5, dtype=torch.int64), inputs["token_type_ids"]], dim=1),
    }
    assert torch.allclose(logits(model, inputs), logits(plain, by_hand), atol=FLOAT32)
    placed = {**inputs, "position_ids": torch.arange(11).expand(4, -1)}
    assert torch.allclose(logits(model, placed), logits(plain, by_hand), atol=FLOAT32)


@pytest.mark.parametrize("architecture", ["Bert", "Roberta", "DistilBert", "Electra", "DebertaV2", "ModernBert", "GPT2", "T5"])
def test_heads_that_read_every_token_read_the_text_s_alone(architecture: str) -> None:
    model = made(architecture, ARCHITECTURES[architecture], "AutoModelForTokenClassification")
    plain = copy.deepcopy(model)
    put(model, "prompt")
    out = model(**batch(), labels=batch()["input_ids"] % 2)
    assert out.logits.shape == (4, 11, 2)
    out.loss.backward()
    stack = next(m for m in model.modules() if hasattr(m, "prompt"))
    embeds = torch.cat([stack.prompt().expand(4, -1, -1), plain.get_input_embeddings()(batch()["input_ids"])], dim=1)
    mask = torch.cat([torch.ones(4, 5, dtype=torch.int64), batch()["attention_mask"]], dim=1)
    assert torch.allclose(out.logits, logits(plain, {"inputs_embeds": embeds, "attention_mask": mask})[:, 5:], atol=1e-5)


def test_a_head_that_takes_the_mean_takes_the_text_s() -> None:
    options = {**SMALL, "classifier_pooling": "mean"}
    model = made("ModernBert", options, "AutoModelForSequenceClassification")
    module, chosen = put(model, "prompt")
    hidden = model.model(**batch()).last_hidden_state
    mask = batch()["attention_mask"][..., None]
    mean = (hidden * mask).sum(1) / mask.sum(1)
    assert hidden.shape[1] == 11
    assert torch.allclose(logits(model), model.classifier(model.drop(model.head(mean))), atol=FLOAT32)
    with pytest.raises(InputError, match="no peft counterpart"):
        module.peft(model, chosen)


def test_a_prompt_begins_as_words_or_as_noise_of_their_size() -> None:
    for init, is_row in (("vocabulary", True), ("random", False)):
        model = build("Bert")
        table = model.get_input_embeddings().weight.detach().clone()
        module = find.module("tune", "prompt", "test")
        module.apply(model, module.Options(method="prompt", length=8, init=init), ["classifier"])
        same = (module.found(model).embedding.detach()[:, None] == table).all(-1)  # (P, V)
        assert same.any(1).tolist() == [is_row] * 8
        if is_row:
            assert same.any(0).sum() == 8
        else:
            assert module.found(model).embedding.std().item() == pytest.approx(table.std().item(), rel=0.2)


@pytest.mark.parametrize("architecture", ["Bert", "Roberta", "Electra", "DistilBert"])
@pytest.mark.parametrize("method", METHODS)
def test_packed_rows_take_their_prompts_with_them(method: str, architecture: str) -> None:
    model = build(architecture)
    put(model, method)
    expected = logits(model)
    packing_, said = packing.install(model, batch())
    assert packing_ is not None, said
    assert packing_.plan is not None
    assert packing_.plan.shape[1] < 4
    assert torch.allclose(logits(model), expected, atol=1e-5)


def test_a_prompt_needs_room_before_the_text(recipe: MakeRecipe) -> None:
    with pytest.raises(InputError) as error:
        prepare.prepare(recipe("tune={method: prompt, length: 20}"), **QUIET)  # 48 + 20 > 64
    assert "48 tokens and the 20 of the prompt are more than this model's 64 positions; at most 44 are left" in str(error.value)
    assert "data.max_length" in str(error.value)
    assert "tiny.yaml:" in str(error.value)
    prepare.prepare(recipe("tune={method: prompt, length: 16}"), **QUIET)
    model = made("Roberta", {**SMALL, "max_position_embeddings": 18}, "AutoModelForSequenceClassification")
    room = 18 - (IDS["pad_token_id"] + 1)  # RoBERTa counts from the padding index on
    assert models.positions(model) == (room, IDS["pad_token_id"] + 1)
    put(model, "prompt")
    fits = {"input_ids": torch.full((1, room - 5), 7)}
    assert logits(model, fits).shape == (1, 2)
    with pytest.raises(InputError, match=f"more than this model's {room} positions; at most {room - 5} are left"):
        logits(model, {"input_ids": torch.full((1, room - 4), 7)})


@pytest.mark.parametrize("method", METHODS)
def test_compiled_it_computes_the_same(method: str) -> None:
    model = build("Bert")
    put(model, method)
    expected = logits(model)
    with torch.no_grad():
        found = torch.compile(model, backend="eager")(**batch()).logits
    assert torch.allclose(found, expected, atol=1e-5)


# -- the peft package -------------------------------------------------------------------------------------------------

PARITY = {"prefix": ["Bert", "Roberta", "Electra", "GPT2", "Llama"], "prompt": [], "ptuning": ["Bert", "GPT2"]}
PARITY["prompt"] = [a for a in ARCHITECTURES if a != "T5"]


def peft_folder(folder: Path, model: Any, module: Any, options: Any, task: str) -> Path:
    """adapter_config.json and adapter_model.safetensors with the head beside the prompt, as peft lays them out."""
    from safetensors.torch import save_file

    config, tensors = module.peft(model, options)
    head = {f"base_model.{path}.{n}": p.detach() for path in models.head_of(model, []) for n, p in model.get_submodule(path).named_parameters()}  # fmt: skip
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({**config, "task_type": task, "inference_mode": True}))
    save_file(
        {k: v.contiguous() for k, v in {**tensors, **(head if task == "SEQ_CLS" else {})}.items()},
        folder / "adapter_model.safetensors",
    )
    return folder


def same_rows(method: str, architecture: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The inputs for ours and for peft's: decoders' heads read the last token, in peft the last position: no padding there."""
    rows = {k: v[:1] for k, v in batch().items()} if architecture in ("GPT2", "Llama") else batch()
    theirs = dict(rows)
    if method == "prefix":  # peft's cache moves the text's positions up by P; position_ids - P moves them back
        first = 1 + IDS["pad_token_id"] if architecture == "Roberta" else 0
        theirs["position_ids"] = torch.arange(11).expand(len(rows["input_ids"]), -1) + first - 5
    return rows, theirs


@pytest.mark.parametrize(("method", "architecture"), [(m, a) for m, them in PARITY.items() for a in them])
def test_peft_reads_ours_and_ours_reads_peft_s(method: str, architecture: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is a rival to compare with, not a dependency")
    warnings.simplefilter("ignore")
    base = build(architecture)
    model = copy.deepcopy(base)
    module, options = put(model, method)
    with torch.no_grad():
        for path in models.head_of(model, []):
            for parameter in model.get_submodule(path).parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    rows, their_rows = same_rows(method, architecture)
    folder = peft_folder(tmp_path / "adapter", model, module, options, "SEQ_CLS")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)
    assert torch.allclose(logits(theirs, their_rows), logits(model, rows), atol=1e-5)
    assert not torch.allclose(logits(model, rows), logits(base, rows), atol=1e-3)

    # the other way: peft begins with random values, saves them, and we open the folder
    from safetensors.torch import load_file

    common = {"task_type": "SEQ_CLS", "num_virtual_tokens": 5}
    if method != "prefix":  # peft knows not everyone's sizes: ELECTRA's embeddings are narrower, DistilBERT has other names
        common |= {k: module.peft(model, options)[0][k] for k in ("token_dim", "num_layers", "num_attention_heads")}
    kinds = {
        "prefix": lambda: peft.PrefixTuningConfig(**common),
        "prompt": lambda: peft.PromptTuningConfig(**common),
        "ptuning": lambda: peft.PromptEncoderConfig(**common, encoder_hidden_size=16),
    }
    theirs = peft.get_peft_model(copy.deepcopy(base), kinds[method]()).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    chosen = module.from_peft(config)
    opener = find.module("tune", chosen["method"], "test")
    ours = copy.deepcopy(base)
    opener.apply(ours, opener.Options.model_validate(chosen), models.head_of(ours, []))
    opener.load_peft(ours, opener.Options.model_validate(chosen), tensors)
    assert torch.allclose(logits(ours, rows), logits(theirs, their_rows), atol=1e-5)
    kept = module.peft(ours, options)[1] if method == "prefix" else opener.peft(ours, chosen)[1]
    assert torch.equal(kept["prompt_embeddings"], tensors["prompt_embeddings"])


@pytest.mark.parametrize("method", ["prompt", "ptuning"])
def test_t5_s_prompt_computes_the_same_in_peft(method: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is a rival to compare with, not a dependency")
    base = seq2seq()
    model = copy.deepcopy(base)
    module, options = put(model, method)
    folder = peft_folder(tmp_path / "adapter", model, module, options, "SEQ_2_SEQ_LM")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)
    inputs = {**batch(), "labels": batch()["input_ids"]}
    assert torch.allclose(logits(theirs, inputs), logits(model, inputs), atol=1e-5)
    assert not torch.allclose(logits(model, inputs), logits(base, inputs), atol=1e-3)


@pytest.mark.parametrize("kind", ["mlp", "lstm"])
def test_ptuning_s_network_is_peft_s(kind: str) -> None:
    peft = pytest.importorskip("peft", reason="peft is a rival to compare with, not a dependency")
    from engine.tune.ptuning import Encoder

    config = peft.PromptEncoderConfig(
        task_type="SEQ_CLS", num_virtual_tokens=5, token_dim=12, num_transformer_submodules=1, encoder_hidden_size=7,
        encoder_reparameterization_type=kind.upper(), encoder_num_layers=2,
    )  # fmt: skip
    theirs = peft.PromptEncoder(config)
    ours = Encoder(12, 7, kind, 2, 0.0)
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith("embedding")})
    assert torch.equal(ours(theirs.embedding.weight), theirs(torch.arange(5)[None])[0])


@pytest.mark.parametrize("method", ["prefix", "prompt", "ptuning"])
def test_what_peft_cannot_read_is_said(method: str) -> None:
    refused = ["DebertaV2", "ModernBert", "DistilBert", "T5"] if method == "prefix" else ["T5"]
    for architecture in refused:
        model = build(architecture)
        module, options = put(model, method)
        with pytest.raises(InputError, match="no peft counterpart"):
            module.peft(model, options)
    model = build("Bert")
    module, options = put(model, method)
    with pytest.raises(InputError, match="prompt_embeddings is"):
        module.load_peft(model, options, {"prompt_embeddings": torch.zeros(2, 3)})


# -- whole runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_run_trains_resumes_and_opens_again(recipe: MakeRecipe, method: str) -> None:
    options = [f"tune={{method: {method}, length: 4}}", "checkpoint.every=2", "train.epochs=1", "evaluate.bootstrap=0"]
    result = finetune.finetune(recipe(*options), "whole", **QUIET)
    first = finetune.finetune(recipe(*options), "stopped", interrupted=StopAt("stopped", 2), **QUIET)
    assert (first.progress.stopped, first.progress.step) == ("interrupted", 2)
    finetune.finetune(recipe(*options), "stopped", resume=True, **QUIET)
    assert model_bytes("stopped") == model_bytes("whole")
    again = evaluate_run("whole", "test.jsonl", [], as_json=True)
    assert again["scores"]["accuracy"] == result.metrics["test"]["accuracy"]
    assert again["scores"]["loss"] == pytest.approx(result.metrics["test"]["loss"], rel=1e-5)
    predict_run("whole", None, "test.jsonl", "made.jsonl", [])
    theirs = [json.loads(line) for line in Path("made.jsonl").read_text().splitlines()]
    ours = [json.loads(line) for line in Path("whole/predictions/test.jsonl").read_text().splitlines()]
    assert [row["label"] for row in theirs] == [row["prediction"] for row in ours]
