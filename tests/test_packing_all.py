"""Row packing and the last layer at read positions, on every architecture and head, with every kind of method: equal numbers."""

import copy
import json
import threading
import time
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import MakeRecipe, make_rows
from laws import CASES, REFUSED, apply, still
from torch import Tensor, nn

from engine import evaluate, finetune, models, optim, predict, prepare, runs
from engine.data import read, rows
from engine.data.windows import Windows
from engine.fast import ahead, kernels, last_layer, packing
from engine.fast.install import install
from engine.fast.packing import DECODERS, ENCODERS
from engine.watch import read_log

QUIET: dict[str, Any] = {"say": lambda line: None}
SMALL = {"vocab_size": 70, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
DEBERTA = {**SMALL, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 4, "max_relative_positions": 32,
           "norm_rel_ebd": "layer_norm"}  # fmt: skip
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", SMALL), "roberta": ("Roberta", SMALL), "xlm-roberta": ("XLMRoberta", SMALL), "camembert": ("Camembert", SMALL),
    "electra": ("Electra", {**SMALL, "embedding_size": 16}),
    "distilbert": ("DistilBert", {"vocab_size": 70, "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48}),
    "deberta-v2": ("DebertaV2", {**DEBERTA, "share_att_key": True, "position_biased_input": False}),
    "deberta-v2, own keys": ("DebertaV2", {**DEBERTA, "share_att_key": False, "position_biased_input": True}),
    "modernbert": ("ModernBert", {**SMALL, "local_attention": 6, "global_attn_every_n_layers": 2}),  # layer 1 sees 3 to each side
    "gpt2": ("GPT2", {"vocab_size": 70, "n_embd": 32, "n_layer": 3, "n_head": 4}),
    "llama": ("Llama", {**SMALL, "num_key_value_heads": 2}),
}  # fmt: skip
READ_FIRST = [name for name in ARCHITECTURES if name.split(",")[0] in ENCODERS]
LENGTHS = torch.tensor([19, 3, 7, 5, 2, 11, 4, 10])


def made(name: str, head: str = "SequenceClassification", **more: Any) -> Any:
    """A tiny model with random weights, in training mode without dropout."""
    import transformers

    torch.manual_seed(0)
    family, options = ARCHITECTURES[name]
    config = getattr(transformers, f"{family}Config")(**{**options, **IDS, **more})
    model = getattr(transformers, f"AutoModelFor{head}").from_config(config)
    with torch.no_grad():  # random norms and heads, so that nothing is hidden by a zero
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return still(model)


def batch() -> dict[str, Tensor]:
    torch.manual_seed(3)
    mask = (torch.arange(19) < LENGTHS[:, None]).long()
    ids = torch.randint(5, 70, mask.shape) * mask
    return {"input_ids": ids, "attention_mask": mask}


def results(model: Any, inputs: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Real outputs and the gradient of everything that trains, by plain autograd. An example's loss is its own function."""
    inputs = inputs or batch()
    model.zero_grad(set_to_none=True)
    out, mask = model(**inputs), inputs["attention_mask"].bool()
    heads = [out[name] for name in ("logits", "start_logits", "end_logits") if name in out]
    y = torch.cat([(t[mask] if t.shape[:2] == mask.shape else t).flatten() for t in heads])
    (y * torch.linspace(0, 40, len(y)).cos()).sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return {"outputs": y.detach(), **found}


def assert_equal(now: dict[str, Tensor], before: dict[str, Tensor], relative: float = 1e-5) -> None:
    """Each tensor to `relative` of its largest number, or of a hundredth of the largest gradient where it is about zero."""
    assert now.keys() == before.keys()
    largest = max(float(g.abs().max()) for n, g in before.items() if n != "outputs")
    for name, tensor in before.items():
        allowed = relative * max(float(tensor.abs().max()), 0.01 * largest)
        assert float((now[name] - tensor).abs().max()) <= allowed, name


HEADS = ["SequenceClassification", "TokenClassification", "QuestionAnswering", "MaskedLM", "CausalLM"]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_rows_give_every_head_the_same_outputs_and_gradients(name: str, head: str) -> None:
    if (head == "CausalLM") != (name in DECODERS) and head in ("CausalLM", "MaskedLM"):
        return  # an encoder has no causal head here, a decoder no masked one
    model = made(name, head)
    before = results(model)
    piece, said = packing.install(model, batch())
    assert piece, said
    now = results(model)
    assert piece.plan is not None
    assert piece.plan.positions.shape == (1, 64)  # a line, for 8 rows of 19
    assert piece.plan.shape == (8, 2, 32)  # and 2 rows of 32 for attention
    assert_equal(now, before)
    piece.remove()
    assert_equal(results(model), before, 0.0)


def test_every_architecture_of_the_list_is_tried() -> None:
    assert {name.split(",")[0] for name in ARCHITECTURES} == ENCODERS | DECODERS == packing.ARCHITECTURES
    assert set(last_layer.FAMILIES) == ENCODERS


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", READ_FIRST)
def test_the_last_layer_at_read_positions_changes_no_output_and_no_gradient(name: str, packed: bool) -> None:
    model = made(name)
    before = results(model)
    rows, _ = packing.install(model, batch()) if packed else (None, "")
    piece, said = last_layer.install(model, batch(), rows)
    assert piece, said
    sizes: list[int] = []
    for module in last_layer.last_block(model).modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda m, args, y: sizes.append(y.shape[:-1].numel()))
    assert_equal(results(model), before)
    tokens = 64 if packed else 8 * 19
    whole = 1 if name == "modernbert" else 2  # queries, keys and values are one matrix there
    assert sum(n >= tokens for n in sizes) == whole, "keys and values of every token, nothing else"
    assert sizes.count(len(LENGTHS)) >= 2, "the feed-forward, once an example"
    piece.remove()
    if rows:
        rows.remove()
    assert_equal(results(model), before, 0.0)


def test_a_row_alone_a_batch_of_one_length_and_left_padding_go_through_as_they_came() -> None:
    for name in ("bert", "modernbert", "llama"):
        model = made(name)
        left = {k: v.flip(1) for k, v in batch().items()}
        few = {k: v[:1] for k, v in batch().items()}
        equal = {k: v[[0, 0, 0]] for k, v in batch().items()}
        expected = [results(model, inputs) for inputs in (left, few, equal)]
        pieces = [packing.install(model, batch())[0]]
        if name != "llama":
            pieces.append(last_layer.install(model, batch(), pieces[0])[0])
        for inputs, before in zip((left, few, equal), expected, strict=True):
            assert_equal(results(model, inputs), before)
            assert pieces[0].plan is None


@pytest.mark.parametrize("name", ["roberta", "camembert"])
def test_padding_inside_a_text_keeps_its_strange_positions(name: str) -> None:
    model, inputs = made(name), batch()
    inputs["input_ids"][2, 3] = IDS["pad_token_id"]  # a text that says <pad>: RoBERTa leaves it out when it counts
    before = results(model, inputs)
    assert packing.install(model, batch())[0]
    assert_equal(results(model, inputs), before)


def test_who_asks_for_more_gets_it_unpacked() -> None:
    model = made("llama", "CausalLM").eval()
    inputs = batch()
    with torch.no_grad():
        text = {k: v[:1, :5] for k, v in inputs.items()}
        expected = model.generate(**text, max_new_tokens=6, do_sample=False)
        hidden = model(**inputs, output_hidden_states=True).hidden_states
        packing.install(model, inputs)
        assert torch.equal(model.generate(**text, max_new_tokens=6, do_sample=False), expected)
        assert torch.equal(model(**inputs, output_hidden_states=True).hidden_states[1], hidden[1])
        assert model(**inputs, use_cache=True).past_key_values.get_seq_length() == 19
    bert = made("bert").eval()
    with torch.no_grad():
        hidden = bert(**inputs, output_hidden_states=True).hidden_states
        last_layer.install(bert, inputs, packing.install(bert, inputs)[0])
        again = bert(**inputs, output_hidden_states=True).hidden_states
    assert all(torch.equal(a, b) for a, b in zip(again, hidden, strict=True))


@pytest.mark.parametrize(
    "name", [n for n in ARCHITECTURES if not n.startswith("deberta")]
)  # its own attention fails there, see laws.py
def test_bfloat16_autocast_computes_nearly_the_same(name: str) -> None:
    model = made(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = results(model)
    rows, _ = packing.install(model, batch())
    if name in READ_FIRST:
        assert last_layer.install(model, batch(), rows)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        now = results(model)
    assert now["outputs"].dtype == before["outputs"].dtype
    exact = results(model)
    for key, g in exact.items():
        off = (before[key].float() - g).norm() + 0.01 * g.norm() + 1e-4
        assert (now[key].float() - g).norm() <= 1.5 * off, key  # no further from float32 than without the pieces


@pytest.mark.parametrize("name", ["bert", "distilbert", "deberta-v2", "modernbert", "gpt2", "llama"])
def test_gradient_checkpointing_computes_each_pass_with_its_own_plan(name: str) -> None:
    model = made(name)
    first, second = batch(), {k: v[[3, 1, 6, 7, 4]][:, :10] for k, v in batch().items()}

    def both() -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        losses = [
            (model(**inputs).logits.flatten() * torch.arange(2 * len(inputs["input_ids"])).cos()).sum()
            for inputs in (first, second)
        ]
        (losses[0] + 3 * losses[1]).backward()  # the first is computed again after the second has made its plan
        return {"outputs": torch.stack(losses).detach()} | {
            n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
        }

    before = both()
    rows, _ = packing.install(model, first)
    if name in READ_FIRST:
        last_layer.install(model, first, rows)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    assert_equal(both(), before)


@pytest.mark.parametrize("name", [n for n in ARCHITECTURES if n != "electra"])  # there a projection follows the embeddings
def test_padded_states_may_take_the_embeddings_place(name: str) -> None:
    """As a cache of frozen states does: what the embeddings would give padded is packed before the first block."""
    from engine.freeze import layout

    model, states = made(name), []
    parts = layout(model, [])
    entry = model.get_submodule(parts.before[-1])  # GPT-2: its dropout, the last module before the blocks
    kept = entry.register_forward_hook(lambda m, args, y: states.append(y.detach()))
    with torch.no_grad():
        model(**batch())
    kept.remove()
    entry.register_forward_hook(lambda m, args, y: states[0] if len(states[0]) == len(LENGTHS) else y)
    before = results(model)
    rows = packing.Packing(model)
    if name in READ_FIRST:
        last_layer.LastLayer(model, rows)
    now = results(model)
    assert rows.plan is not None
    assert_equal(now, before)
    assert not any(path.startswith(parts.before[-1]) for path in now)


METHODS = ["last_n", "bitfit", "lora", "dora", "qlora nf4", "lora on embeddings", "ia3", "houlsby", "after norm", "parallel", "compacter",
           "prefix", "prompt", "p-tuning, lstm"]  # fmt: skip


@pytest.mark.parametrize("name", ["bert", "distilbert", "deberta-v2", "modernbert", "gpt2", "llama"])
@pytest.mark.parametrize("case", METHODS)
def test_methods_and_pieces_together_compute_the_same(case: str, name: str) -> None:
    if (case, ARCHITECTURES[name][0]) in REFUSED:
        return
    model = made(name)
    apply(model, case)
    still(model)
    before = results(model)
    rows, said = packing.install(model, batch())
    assert rows, said
    assert_equal(results(model), before)
    if name in READ_FIRST:
        piece, said = last_layer.install(model, batch(), rows)
        assert piece, said
        assert_equal(results(model), before)


def test_heads_that_read_more_than_the_first_position_keep_the_last_layer_whole(recipe: MakeRecipe) -> None:
    for model in (made("modernbert", classifier_pooling="mean"), made("bert", "TokenClassification")):
        piece, said = last_layer.install(model, batch())
        assert piece is None
        assert "the head reads more than the first position" in said
    for layer in ("MeanPooling", "AttentionPooling"):
        ready = prepare.prepare(recipe(f"swap=[{{at: '**.pooler', with: 'engine.layers.pooling:{layer}'}}]"), **QUIET)
        assert "rows are packed" in ready.packed
        assert "the head reads more than the first position" in ready.packed


def test_what_stands_in_the_last_block_decides(recipe: MakeRecipe) -> None:
    Path("mine.py").write_text(
        "from torch import nn\n\n\nclass Mixed(nn.Module):\n    def __init__(self, old):\n        super().__init__()\n        self.old = old\n\n"
        "    from_old = classmethod(lambda cls, old: cls(old))\n\n    def forward(self, x):\n        return self.old(x) + x.mean(1, keepdim=True)[..., :1]\n\n\n"
        "class Attention(Mixed):\n    def forward(self, x, *args, **kwargs):\n        return self.old(x, *args, **kwargs)\n"
    )
    ready = prepare.prepare(recipe("swap=[{at: '**.layer.1.intermediate.dense', with: 'mine.py:Mixed'}]"), **QUIET)
    assert "the last layer is whole: the probe batch" in ready.packed
    ready = prepare.prepare(recipe("swap=[{at: '**.layer.1.attention.self', with: 'mine.py:Attention'}]"), **QUIET)
    assert "rows are packed" in ready.packed
    assert "its attention.self is a Attention, not transformers' own" in ready.packed
    ready = prepare.prepare(recipe("swap=[{at: '**.layer.1.intermediate.dense', with: 'engine.layers.swiglu:SwiGLU'}]"), **QUIET)
    assert "the last layer computes what the head reads" in ready.packed


def test_a_proof_costs_no_more_however_long_the_texts_are(recipe: MakeRecipe) -> None:
    lengths = torch.tensor([200, 3, 4])
    mask = (torch.arange(200) < lengths[:, None]).long()
    probe = {"input_ids": 5 + mask, "attention_mask": mask}
    model, seen = made("bert", max_position_embeddings=256), []
    model.bert.embeddings.register_forward_hook(lambda m, args, y: seen.append(y.shape[:2].numel()))
    pieces = install(model, recipe(), probe)
    assert pieces.packing is not None
    assert pieces.last_layer is not None
    assert len(seen) == 6, "plain, attention, packed, which positions are read, the last layer packed, and not packed"
    assert max(seen) == 3 * 32
    model, seen = made("bert", max_position_embeddings=256), []
    assert install(model, recipe(), {k: v[[0, 0, 0]] for k, v in probe.items()}).packing is None, "nothing is short enough"


def test_a_model_that_cannot_run_on_the_probe_alone_is_left_alone(recipe: MakeRecipe) -> None:
    import transformers

    config = transformers.T5Config(vocab_size=70, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, pad_token_id=0)
    pieces = install(transformers.AutoModelForSeq2SeqLM.from_config(config), recipe(), batch())
    assert pieces.packing is pieces.last_layer is None
    assert all("t5 is not one of" in said for said in pieces.said)


def test_the_proof_sees_a_piece_that_is_wrong_in_its_gradients_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    compute = last_layer.FAMILIES["bert"][0]

    def cut_off(block: Any, reads: Any, hidden: Tensor, mask: Any, **more: Any) -> Tensor:
        return compute(block, reads, hidden.detach(), mask, **more)

    monkeypatch.setitem(last_layer.FAMILIES, "bert", (cut_off, last_layer.FAMILIES["bert"][1]))
    piece, said = last_layer.install(made("bert"), batch())
    assert piece is None
    assert "in its gradients" in said


# -- pieces of the loop -----------------------------------------------------------------------------------------------

OFF = {
    "kernels": "train.kernels=false", "packing": "train.packing=false", "last_layer": "train.last_layer=false", "ahead": "train.ahead=false",
    "vocabulary": "train.compact_vocabulary=false", "float32": "", "cache": "train.cache_frozen=off",
}  # fmt: skip
PIECES = tuple(OFF)[:-1]
NEARLY = ("train.weights=bfloat16", "train.precision=bfloat16", "train.dropout=pool")
CASES_OF_PIECES: dict[str, tuple[str, list[tuple[str, ...]]]] = {  # method, and which pieces are on
    "full": ("{method: full}", [*((name,) for name in PIECES), *combinations(PIECES, 2), PIECES]),
    "frozen below": ("{method: last_n, n: 1}", [("cache",), *(("cache", name) for name in PIECES), tuple(OFF)]),
    "decoder": ("{method: full}", [("packing", "ahead"), PIECES]),
}


@pytest.mark.parametrize("case", CASES_OF_PIECES)
def test_any_pieces_together_train_as_the_plain_loop(
    case: str, recipe: MakeRecipe, still_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each piece alone, every pair, all of them: the losses of 6 steps are the plain loop's; those asked for by name are near."""
    from engine import report

    monkeypatch.setattr(report, "write", lambda folder: None)
    amd, (method, every) = kernels.amd, CASES_OF_PIECES[case]
    model = make_decoder(Path("llama"), still_bert) if case == "decoder" else still_bert

    def losses(on: tuple[str, ...], *more: str) -> tuple[list[float], str]:
        monkeypatch.setattr(kernels, "amd", amd if "float32" in on else lambda: False)
        keys = [f"tune={method}", "train.max_steps=6", "train.learning_rate=1e-3", "data.validation=null", "data.test=null"]
        keys += ["train.cache_frozen=float32" if name == "cache" and name in on else off for name, off in OFF.items()
                 if off and (name == "cache" or name not in on)]  # fmt: skip
        folder = f"r{len(list(Path().glob('r*')))}"
        finetune.finetune(recipe(*keys, *more, model=model), folder, **QUIET)
        log = list(read_log(Path(folder, "log.jsonl")))
        return [r["loss"] for r in log if r["event"] == "step"], json.dumps([r for r in log if r["event"] != "step"])

    plain, _ = losses(())
    assert len(plain) == 6
    for on in every:
        found, said = losses(on)
        assert found == pytest.approx(plain, rel=1e-5), on
        assert ("rows are packed" in said) == ("packing" in on), said
        assert ("computes what the head reads" in said) == ("last_layer" in on and case != "decoder"), said
        assert ("frozen cache: 1 of 2 blocks" in said) == ("cache" in on), said
        trimmed = "rows of the word embeddings train" in said
        assert trimmed == ("vocabulary" in on and case != "frozen below"), said  # a table that does not train is left alone
    assert losses(every[-1], *NEARLY)[0] == pytest.approx(plain, rel=2e-2)


def make_decoder(folder: Path, like: Path) -> Path:
    """A tiny Llama with the tokenizer of `like`."""
    import transformers

    transformers.AutoTokenizer.from_pretrained(like).save_pretrained(folder)
    config = transformers.LlamaConfig(**{**SMALL, **IDS, "num_key_value_heads": 2, "initializer_range": 0.1})
    transformers.LlamaModel(config).save_pretrained(folder)
    return folder


def windows(lengths: list[int], **more: Any) -> Windows:
    from test_windows import encoded

    return Windows(encoded(lengths), lambda b: len(b["labels"]), **{"batch_size": 4, "tokens": 32, "seed": 0, **more})


def test_windows_made_ahead_are_the_windows() -> None:
    plain = windows([*range(3, 33)])
    early = ahead.Ahead(plain, torch.device("cpu"))
    for skip in (0, 3, 8):
        pairs = list(zip(plain.epoch(1, skip), early.epoch(1, skip), strict=True))
        assert len(pairs) == max(0, 8 - skip)
        for one, other in pairs:
            assert (one.rows == other.rows).all()
            assert (one.items, one.tokens) == (other.items, other.tokens)
            for a, b in zip(one.micro_batches, other.micro_batches, strict=True):
                assert all(torch.equal(a[k], b[k]) for k in a)
    assert early.per_epoch == 8
    assert early.tokens == plain.tokens


class Broken(Windows):
    """Fails at its third window; counts what was made."""

    made = 0

    def window(self, rows: Any, epoch: int = 0) -> Any:
        self.made += 1
        if self.made == 3:
            raise ValueError("third")
        return super().window(rows, epoch)


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("windows")]


def test_errors_arrive_in_their_turn_and_no_thread_is_left() -> None:
    broken = Broken(windows([5] * 30).encoded, lambda b: 4, batch_size=4, tokens=32, seed=0)
    coming = ahead.Ahead(broken, torch.device("cpu")).epoch(0)
    assert [len(next(coming).rows) for _ in range(2)] == [4, 4]
    with pytest.raises(ValueError, match="third"):
        next(coming)
    assert not threads()
    counted = Broken(windows([5] * 30).encoded, lambda b: 4, batch_size=4, tokens=32, seed=0)
    counted.made = 10

    def stops() -> None:
        for _ in ahead.Ahead(counted, torch.device("cpu")).epoch(0):
            deadline = time.monotonic() + 5
            while counted.made < 12 and time.monotonic() < deadline:
                time.sleep(0.001)
            break

    stops()
    assert counted.made == 12, "one ahead and no more"
    assert not threads()


def test_a_window_made_before_memory_ran_short_is_cut_anew() -> None:
    lengths = [8] * 32
    plain = windows(lengths, batch_size=8, tokens=64)
    early = ahead.Ahead(plain, torch.device("cpu")).epoch(1)
    first = next(early)
    assert len(first.micro_batches) == 1
    smaller = plain.smaller(first)
    assert smaller is not None
    found = [smaller, *early]
    assert [len(w.micro_batches) for w in found] == [2, 2, 2, 2]
    assert [w.epoch for w in found] == [1] * 4  # what a batch holds may depend on it


# -- prediction -------------------------------------------------------------------------------------------------------


def split_of(made: list[dict[str, Any]]) -> rows.Split:
    return rows.Split(read.Table(made, [f"line {i + 1}" for i in range(len(made))], {}), len(made))


@pytest.mark.parametrize("method", ["full", "prompt"])
def test_a_run_predicts_by_the_fast_pieces_what_it_predicts_without(
    method: str, recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine import report

    monkeypatch.setattr(report, "write", lambda folder: None)
    finetune.finetune(recipe(f"tune={{method: {method}}}", "train.max_steps=2"), "r", **QUIET)
    split, few, installed = split_of(make_rows(70, 9)), split_of(make_rows(5, 9)), []
    monkeypatch.setattr(predict, "install", lambda *args, **more: installed.append(install(*args, **more)))
    run = runs.open_run("r")
    made_fast, tokens = predict._outputs(run, split)
    assert installed[0].packing is not None
    assert installed[0].last_layer is not None
    cpu, plain = torch.device("cpu"), runs.open_run("r", ["train.packing=false", "train.last_layer=false"])
    expected = evaluate.outputs(plain.model, plain.task, tokens, tokens=4096, device=cpu, autocast=optim.autocast("float32", cpu))
    made_slow, _ = predict._outputs(plain, split)
    assert installed[1].packing is installed[1].last_layer is None
    for found in (made_fast, made_slow):
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    installed.clear()
    predict._outputs(runs.open_run("r"), few)
    assert not installed, "a few texts are answered before the pieces would be proven"


# -- nothing below the lowest layer that trains -----------------------------------------------------------------------


class Saved:
    """Bytes that autograd keeps for the backward pass, by the block (or the part before the blocks) in which they were made."""

    def __init__(self, model: Any, places: list[str]):
        self.bytes = dict.fromkeys([*places, "above"], 0)
        self.inside: list[str] = []
        self.parameters = {p.data_ptr() for p in model.parameters()}
        for place in places:
            module = model.get_submodule(place)
            module.register_forward_pre_hook(lambda m, args, place=place: self.inside.append(place))
            module.register_forward_hook(lambda m, args, y: self.inside.pop() and None)

    def keep(self, tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in self.parameters:
            self.bytes[self.inside[-1] if self.inside else "above"] += tensor.nbytes
        return tensor

    def hooks(self) -> Any:
        return torch.autograd.graph.saved_tensors_hooks(self.keep, lambda t: t)


def frozen_below() -> Iterator[tuple[str, str]]:
    for name in ARCHITECTURES:
        yield name, "last_n"
        yield name, "lora at the top"


@pytest.mark.parametrize("pieces", [True, False], ids=["packed", "plain"])
@pytest.mark.parametrize(("name", "case"), frozen_below())
def test_nothing_is_saved_and_nothing_moves_below_the_lowest_layer_that_trains(
    name: str, case: str, pieces: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.freeze import layout

    model = made(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1  # a mask would be saved too
    linear = "{query,q_lin,query_proj,Wqkv,c_attn,q_proj}"
    monkeypatch.setitem(CASES, "lora at the top", {"method": "lora", "r": 4, "at": [f"**.2.**.{linear}"]})
    apply(model, case)
    parts = layout(model, models.head_of(model, []))
    if pieces:
        rows, said = packing.install(model, batch())
        assert rows, said
        if name in READ_FIRST:
            assert last_layer.install(model, batch(), rows)[0]
    saved = Saved(model, [*parts.before, *parts.blocks])
    with saved.hooks():
        loss = F.cross_entropy(model(**batch()).logits, torch.arange(8) % 2)
    below = parts.before + parts.blocks[:2]
    assert {path: saved.bytes[path] for path in below} == dict.fromkeys(below, 0)
    assert saved.bytes[parts.blocks[2]] > 0
    loss.backward()
    assert all(p.grad is None for path in below for p in model.get_submodule(path).parameters())


def test_the_counter_of_saved_bytes_counts() -> None:
    model = made("bert")
    saved = Saved(copy.deepcopy(model), [])
    del saved
    from engine.freeze import layout

    saved = Saved(model, layout(model, []).blocks)
    with saved.hooks():
        model(**batch()).logits.sum()
    assert all(n > 8 * 19 * 32 * 4 for path, n in saved.bytes.items() if path != "above")
