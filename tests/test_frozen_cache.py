"""The frozen-prefix cache computes what the same model computes whose frozen part is in eval mode, and never anything else."""

import contextlib
import copy
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import laws
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import MakeRecipe, StopAt
from torch import Tensor

from engine import adapters, disk, distributed, finetune, models, preflight, prepare
from engine import freeze as freezing
from engine.data.encode import Encoded
from engine.errors import RunError
from engine.fast import frozen_cache, frozen_file, last_layer, packing
from engine.fast.frozen_places import Places
from engine.tune import last_n, lora, prefix, prompt

LENGTHS = [11, 4, 7, 2, 4, 9]
LABELS = torch.tensor([0, 1, 1, 0, 1, 0])
OFF: Callable[[], Any] = contextlib.nullcontext


class Task:
    """As small as a task can be."""

    def forward(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def tokens(seed: int = 2) -> Encoded:
    draw = np.random.default_rng(seed)
    offsets = np.cumsum([0, *LENGTHS])
    flat = draw.integers(3, 60, offsets[-1]).astype(np.int32)
    flat[offsets[1:] - 1] = laws.IDS["eos_token_id"]
    return Encoded({"input_ids": (flat, offsets)}, {"labels": LABELS.numpy()}, {"input_ids": 0})


def build(architecture: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Three blocks; dropout as the architecture has it."""
    three = {
        k: 3 if k in ("num_hidden_layers", "n_layers", "n_layer") else v for k, v in laws.ARCHITECTURES[architecture].items()
    }
    if architecture == "Electra":
        three["embedding_size"] = 16  # projected to H before the first block
    if architecture == "DebertaV2":  # as the published ones are
        three |= {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "norm_rel_ebd": "layer_norm", "position_buckets": 8}
    monkeypatch.setitem(laws.ARCHITECTURES, architecture, three)
    return laws.build(architecture)


def freeze(model: Any, n: int = 1) -> list[str]:
    """Train the upper n blocks and the head; returns the head."""
    head = models.head_of(model, [])
    last_n.apply(model, last_n.Options(method="last_n", n=n), head)
    return head


def put_in(model: Any, head: list[str], splits: list[Encoded], kind: str = "float32", **more: Any) -> tuple[Any, str]:
    options: dict[str, Any] = {"folder": Path("cache"), "limit": 1.0, "device": torch.device("cpu"), "autocast": OFF, "about": [],
                               "interrupted": lambda: False}  # fmt: skip
    return frozen_cache.install(model, Task(), splits, head, kind=kind, **(options | more))


def results(model: Any, encoded: Encoded) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a padded batch in training mode, dropout drawn from one seed."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    loss = F.cross_entropy(Task().forward(model, encoded.batch(np.arange(len(encoded)))), LABELS)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same(one: tuple[Tensor, dict[str, Tensor]], two: tuple[Tensor, dict[str, Tensor]], tolerance: float) -> None:
    assert one[0].item() == pytest.approx(two[0].item(), abs=tolerance)
    assert one[1].keys() == two[1].keys()
    for name, gradient in one[1].items():
        assert (gradient - two[1][name]).abs().max() <= tolerance * max(1.0, float(gradient.abs().max())), name


ARCHITECTURES = [name for name in laws.ARCHITECTURES if name != "T5"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_losses_and_gradients_are_those_of_the_frozen_part_in_eval_mode(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = tokens()
    for n, k in ((2, 1), (1, 2), (0, 3)):
        model = build(architecture, monkeypatch)
        head = freeze(model, n)
        reference = copy.deepcopy(model).train()
        parts = freezing.layout(reference, head)
        for path in (*parts.before, *parts.blocks[:k]):
            reference.get_submodule(path).eval()
        expected = results(reference, encoded)
        assert expected[1], "something trains"
        for kind, tolerance in (("float32", 2e-6), ("bfloat16", 3e-2)):
            one = copy.deepcopy(model)
            cache, said = put_in(one, head, [encoded], kind)
            assert cache is not None, said
            assert f"{k} of 3 blocks" in said, said
            one.train()
            same(results(one, encoded), expected, tolerance)
            assert cache.used == 3, "the probe without and with the file, and this batch"


def test_a_part_in_training_mode_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The law above can fail: dropout in the frozen part changes the loss by a hundred times its tolerance."""
    model = build("Bert", monkeypatch)
    head = freeze(model)
    dropped = results(copy.deepcopy(model).train(), tokens())
    put_in(model, head, [tokens()])
    assert abs(results(model.train(), tokens())[0] - dropped[0]) > 2e-4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_other_piece_of_speed_works_with_it(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row packing, the last layer where the head reads, both, neither: with the cache and without it."""
    encoded = tokens()
    probe = encoded.batch(np.array([3, 1, 0]))
    probe.pop("labels")
    for n, k in ((1, 2), (0, 3)):
        model = laws.still(build(architecture, monkeypatch))
        head, made = freeze(model, n), []
        for packed, last, cached in itertools.product((False, True), repeat=3):
            one = copy.deepcopy(model)
            packer = packing.install(one, probe)[0] if packed else None
            layer = last_layer.install(one, probe, packer)[0] if last else None
            cache, said = put_in(one, head, [encoded], packing=packer) if cached else (None, "")
            made.append(results(one.train(), encoded))
            assert not packed or (packer is not None and packer.plan is not None)
            assert (layer is not None) == (last and architecture not in ("GPT2", "Llama"))
            assert (cache is not None and cache.used > 0) == cached, said
            if cache is not None:
                assert len(cache.seam.blocks) == (2 if layer else k), "the last layer leaves one position"
        for other in made[1:]:
            same(other, made[0], 5e-6)


def test_only_padding_and_rounding_stand_between_the_file_and_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each state in the file is the one that the model computes for its example alone, rounded; row 0 is zeros."""
    model, encoded = build("Bert", monkeypatch), tokens()
    head = freeze(model)
    for kind, dtype in frozen_file.TYPES.items():
        cache, _ = put_in(copy.deepcopy(model), head, [encoded], kind)
        assert cache.states.dtype == dtype
        assert not cache.states[0].any()
        for i, n in enumerate(LENGTHS):
            batch = encoded.batch(np.array([i]))
            batch.pop("labels")
            plain = frozen_cache.beginning(model, frozen_cache.seam(model, head, batch), batch, OFF)[0]
            kept = cache.gather(torch.tensor([i]), n + 2)[0]
            assert torch.allclose(kept[:n], plain.to(dtype).float(), atol=1e-6, rtol=0 if kind == "float32" else 2**-7)
            assert not kept[n:].any()


def test_after_removal_nothing_is_left_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("DebertaV2", monkeypatch).train()
    head, before = freeze(model), {n: set(m.__dict__) for n, m in model.named_modules()}
    keys, expected = set(model.state_dict()), results(model, tokens())
    cache, _ = put_in(model, head, [tokens()])
    assert set(model.state_dict()) == keys
    cache.remove()
    assert {n: set(m.__dict__) for n, m in model.named_modules()} == before
    assert all(m.training for m in model.modules())
    assert not model.deberta._forward_pre_hooks
    same(results(model, tokens()), expected, 0.0)


def test_examples_that_are_not_in_the_file_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("Bert", monkeypatch)
    head = freeze(model)
    plain = copy.deepcopy(model)
    cache, _ = put_in(model, head, [tokens()])
    other, used = tokens(seed=9), cache.used
    with torch.no_grad():
        for batch in (other.batch(np.arange(6)), {k: v.flip(1) for k, v in tokens().batch(np.arange(6)).items() if v.ndim == 2}):
            assert torch.equal(Task().forward(model, batch), Task().forward(plain, batch))
        assert cache.used == used
        whole = tokens().batch(np.arange(6))
        given = {k: whole[k] for k in ("input_ids", "attention_mask")}
        elsewhere = model(**given, position_ids=torch.arange(11)[None] + 3).logits  # a state depends on the position too
        assert torch.equal(elsewhere, plain(**given, position_ids=torch.arange(11)[None] + 3).logits)


def test_places_finds_each_example_by_its_tokens() -> None:
    one, two = tokens(), tokens(seed=3)
    places = Places([one, two])
    for first, split in ((0, one), (6, two)):
        batch = split.batch(np.array([4, 0, 3]))
        batch.pop("labels")
        found = places.find(batch)
        assert found is not None
        assert found.tolist() == [first + 4, first + 0, first + 3]
        rows = places.places(found, 11)
        assert ((rows == 0) == (batch["attention_mask"] == 0)).all()
    every = [places.places(torch.tensor([i]), n)[0] for i, n in enumerate(LENGTHS * 2)]
    assert sorted(torch.cat(every).tolist()) == list(range(1, places.total))
    seen = [s.lengths[rows].tolist() for s, rows in places.batches(8)]
    assert all(len(set(lengths)) == 1 and (sum(lengths) <= 8 or len(lengths) == 1) for lengths in seen)
    assert sorted(n for lengths in seen for n in lengths) == sorted(LENGTHS * 2)


# -- how far "frozen" goes ----------------------------------------------------------------------------------------------


def depth(model: Any, head: list[str]) -> int | str:
    found = frozen_cache.seam(model, head, laws.batch())
    return found if isinstance(found, str) else len(found.blocks)


def test_whatever_trains_ends_the_frozen_part(monkeypatch: pytest.MonkeyPatch) -> None:
    none = "no block is frozen below all that trains"
    model = build("Bert", monkeypatch)
    head = freeze(model, 1)
    assert depth(model, head) == 2
    model.bert.encoder.layer[1].output.LayerNorm.bias.requires_grad_(True)
    assert depth(model, head) == 1
    model.bert.embeddings.LayerNorm.bias.requires_grad_(True)
    assert depth(model, head) == none
    for method, at, k in ((lora, "**.layer.2.**.query", 2), (lora, "**.query", none), (prefix, None, none), (prompt, None, none)):
        model = build("Bert", monkeypatch)
        options = {"method": method.__name__.rpartition(".")[2]} | ({"at": [at]} if at else {})
        adapters.put_in(model, method, method.Options.model_validate(options), head)
        assert depth(model, head) == k, options
    model = build("DebertaV2", monkeypatch)  # every block reads the table of relative positions
    freeze(model, 1)
    assert depth(model, head) == 2
    model.deberta.encoder.rel_embeddings.weight.requires_grad_(True)
    assert depth(model, head) == none
    model = build("Bert", monkeypatch)
    head = freeze(model, 2)
    freezing.set_timetable(model, head, 1.0, 10)
    assert depth(model, head) == 1, "block 1 is frozen at first and trains later"
    trains = {n: p.requires_grad for n, p in model.named_parameters()}
    depth(model, head)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == trains
    assert "two stacks" in str(depth(laws.build("T5"), ["classification_head"]))


def test_what_does_not_fit_the_seam_is_noticed_and_not_used(monkeypatch: pytest.MonkeyPatch, recipe: MakeRecipe) -> None:
    """A convolution that DeBERTa-v2 puts behind its first block; a layer that looks across examples."""
    monkeypatch.setitem(laws.ARCHITECTURES, "DebertaV2", {**laws.SMALL, "conv_kernel_size": 3, "conv_act": "gelu"})
    model = laws.build("DebertaV2")
    cache, said = put_in(model, freeze(model), [tokens()])
    assert cache is None
    assert "not used: with it a probe batch" in said
    assert not list(Path("cache").glob("*"))
    Path("across.py").write_text(
        "from torch import nn\n\n\nclass Across(nn.Module):\n    def __init__(self, old):\n        super().__init__()\n"
        "        self.old = old\n\n    from_old = classmethod(lambda cls, old: cls(old))\n\n"
        "    def forward(self, x):\n        return self.old(x) + x.abs().max()\n"
    )
    swap = "swap=[{at: '**.layer.0.intermediate.dense', with: 'across.py:Across'}]"
    ready = prepare.prepare(recipe(swap, *FROZEN, "train.packing=false"), say=lambda line: None)
    cache, said = prepare.cache_frozen(ready, {})
    assert cache is None
    assert "not used: with it a probe batch differs by" in said


def test_the_key_is_of_all_that_the_states_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def key(model: Any, n: int = 1, seed: int = 2, kind: str = "float32", about: Any = ()) -> str:
        found = frozen_cache.seam(model, freeze(model, n), laws.batch())
        return frozen_cache.key(found, Places([tokens(seed)]), model.config, kind, torch.device("cpu"), about)

    model = build("Bert", monkeypatch)
    base = key(model)
    with torch.no_grad():
        model.classifier.weight.add_(1.0)
        model.bert.encoder.layer[2].output.dense.weight.add_(1.0)  # trains
    assert key(model) == base
    seen = {base, key(model, n=2), key(model, seed=3), key(model, kind="bfloat16"), key(model, about=["other code"])}
    for path in ("bert.embeddings.LayerNorm.bias", "bert.encoder.layer.1.output.dense.weight"):
        changed = copy.deepcopy(model)
        with torch.no_grad():
            changed.get_parameter(path).view(-1)[0] += 1e-3
        seen.add(key(changed))
    changed = copy.deepcopy(model)
    changed.config.layer_norm_eps = 1e-3
    seen.add(key(changed))
    assert len(seen) == 8


# -- the file -----------------------------------------------------------------------------------------------------------


def test_a_damaged_file_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    model, encoded = build("Bert", monkeypatch), tokens()
    head = freeze(model)

    def again() -> str:
        cache, said = put_in(model, head, [encoded])
        cache.remove()
        return said.rpartition(", ")[2]

    assert again() == "made"
    assert again() == "found"
    (path,) = Path("cache").iterdir()
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:100] + bytes([whole[100] ^ 1]) + whole[101:], whole[:-256] + b" " * 256, b""):
        path.write_bytes(damaged)
        assert again() == "made"
        assert path.read_bytes() == whole
    assert again() == "found"


def test_what_was_not_used_for_longest_goes_first() -> None:
    folder = Path("cache")
    for i in range(4):
        frozen_file.write(folder / f"{i}.states", 10, 8, "float32", [torch.full((10, 8), float(i))])
        os.utime(folder / f"{i}.states", (1000 + i, 1000 + i))
    mapped = frozen_file.find(folder / "1.states", 10, 8, "float32", check=False)  # and now it is the newest
    one = frozen_file.size(10, 8, "float32")
    for age, name in ((10, ".9.states.77"), (frozen_file.ABANDONED + 10, ".8.states.78")):
        (folder / name).write_bytes(b"half")
        os.utime(folder / name, (time_ := (folder / "1.states").stat().st_mtime - age, time_))
    assert frozen_file.make_room(folder, one, 3 * one) == ""
    assert sorted(p.name for p in folder.iterdir()) == [".9.states.77", "1.states", "3.states"]
    assert "train.cache_limit allows" in frozen_file.make_room(folder, one, one - 1)
    assert len(list(folder.glob("*.states"))) == 2, "nothing is deleted for what would not fit anyway"
    frozen_file.make_room(folder, one, one)
    assert mapped is not None
    assert (mapped == 1.0).all(), "who has a file mapped keeps it"


def test_without_room_it_is_computed_each_time_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded, model = tokens(), build("Bert", monkeypatch)
    head, free = freeze(model), disk.free
    Path("file").write_text("")
    found = []
    for expected, options, left in (
        ("made", {}, free), ("train.cache_limit allows 0 MB", {"folder": Path("a"), "limit": 0.0}, free),
        ("stay free", {"folder": Path("b")}, lambda path: frozen_file.RESERVE), ("cannot be written", {"folder": Path("file/c")}, free),
    ):  # fmt: skip
        monkeypatch.setattr(disk, "free", left)
        one = copy.deepcopy(model)
        cache, said = put_in(one, head, [encoded], **options)
        assert cache is not None
        assert expected in said
        found.append(results(one.train(), encoded))
        same(found[-1], found[0], 2e-6)  # the numbers do not depend on the disk
    assert not list(Path().glob("[ab]/*"))


def test_a_signal_while_it_is_made_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = build("Bert", monkeypatch), []
    head, before = freeze(model), {n: set(m.__dict__) for n, m in model.named_modules()}
    with pytest.raises(KeyboardInterrupt):
        put_in(model, head, [tokens()], interrupted=lambda: asked.append(1) or len(asked) > 2)
    assert not list(Path("cache").iterdir())
    assert {n: set(m.__dict__) for n, m in model.named_modules()} == before


def test_too_little_memory_makes_smaller_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = build("Bert", monkeypatch), frozen_cache.beginning
    head = freeze(model)
    expected = put_in(copy.deepcopy(model), head, [tokens()])[0].states.clone()

    def small(model: Any, seam: Any, inputs: dict[str, Tensor], autocast: Any) -> Tensor:
        if len(inputs["input_ids"]) > limit:
            raise torch.OutOfMemoryError("none left")
        return plain(model, seam, inputs, autocast)

    monkeypatch.setattr(frozen_cache, "beginning", small)
    limit = 1
    made = put_in(copy.deepcopy(model), head, [tokens()], folder=Path("other"))[0].states
    assert torch.allclose(made, expected, atol=1e-6)
    limit = 0
    with pytest.raises(RunError, match="memory does not suffice for a single example"):
        put_in(model, head, [tokens()], folder=Path("third"))


def test_another_process_that_cannot_open_the_file_keeps_all_from_using_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("Bert", monkeypatch)
    monkeypatch.setattr(distributed, "largest", lambda value: 1)
    cache, said = put_in(model, freeze(model), [tokens()])
    assert cache.states is None
    assert "not every process can open" in said


# -- whole runs ---------------------------------------------------------------------------------------------------------

FROZEN = ["tune.method=last_n", "tune.n=1", "train.cache_frozen=float32"]


def run(made: Any, out: str, **more: Any) -> tuple[Any, list[dict[str, Any]], list[str]]:
    said: list[str] = []
    result = finetune.finetune(made, out, say=said.append, **more)
    return result, [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()], said


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    from engine import report

    monkeypatch.setattr(report, "write", lambda folder: disk.replace(folder / "report.html", b"report"))  # plots take seconds


@pytest.mark.usefixtures("no_report")
def test_a_run_with_it_is_the_run_without_room_for_it(recipe: MakeRecipe) -> None:
    seen = []
    for out, options in (("a", []), ("b", []), ("c", ["train.cache_limit=0", "data.cache=elsewhere"]), ("d", ["train.cache_frozen=bfloat16"]),
                         ("e", ["train.packing=false"])):  # fmt: skip
        _, log, said = run(recipe(*FROZEN, "train.epochs=1", *options), out)
        seen.append([r["loss"] for r in log if r["event"] in ("step", "evaluation")])
        seen[-1].append(json.loads(Path(out, "metrics.json").read_text())["test"]["loss"])
        (line,) = [s for s in said if s.startswith("frozen  ")]
        (plan,) = [r for r in log if r["event"] == "plan"]
        assert plan["frozen_cache"] == "frozen cache: " + line.removeprefix("frozen  ")
        expected = {"a": "made", "b": "found", "c": "computed each time", "d": "made", "e": "found"}
        assert f"1 of 2 blocks, {'0 MB, ' if out != 'c' else ''}{expected[out]}" in line
    assert len(seen[0]) == 8
    assert seen[1] == seen[0]
    assert seen[2] == pytest.approx(seen[0], rel=1e-4)
    assert seen[3] == pytest.approx(seen[0], rel=3e-2)
    _, _, said = run(recipe("tune.method=full", "train.cache_frozen=float32", "train.max_steps=2"), "full")
    assert any("not used: no block is frozen below all that trains" in line for line in said)


def test_it_works_with_bfloat16_weights_and_pooled_dropout(recipe: MakeRecipe, no_report: None) -> None:
    seen = []
    for out, options in (("a", []), ("b", ["train.cache_limit=0", "data.cache=elsewhere"])):
        _, log, said = run(recipe(*FROZEN, "train.epochs=1", "train.weights=bfloat16", "train.dropout=pool", *options), out)
        assert any(f"1 of 2 blocks, {'0 MB' if out == 'a' else 'computed each time'}" in line for line in said)
        seen.append([r["loss"] for r in log if r["event"] == "step"])
    assert seen[0] == pytest.approx(seen[1], rel=1e-2)


def test_tokens_that_change_each_time_are_not_kept(recipe: MakeRecipe) -> None:
    made = recipe("task=masked_lm", "data.columns={text: text}", *FROZEN)
    cache, said = prepare.cache_frozen(prepare.prepare(made, say=lambda line: None), {})
    assert cache is None
    assert "the task does not hand its tokens to the model as they are" in said
    assert not list(Path("runs/.cache").glob("*states*"))


@pytest.mark.usefixtures("no_report")
def test_a_resumed_run_is_bit_equal_and_may_find_or_remake_the_file(recipe: MakeRecipe) -> None:
    run(recipe(*FROZEN), "whole")
    model = Path("whole/model/model.safetensors").read_bytes()
    for stop in (3, 8):
        run(recipe(*FROZEN), f"stopped-{stop}", interrupted=StopAt(f"stopped-{stop}", stop))
        if stop == 8:
            for path in Path("runs/.cache").glob("*.states"):
                path.unlink()
        result, _, _ = run(recipe(*FROZEN), f"stopped-{stop}", resume=True)
        assert result.progress.stopped == "finished"
        assert Path(f"stopped-{stop}/model/model.safetensors").read_bytes() == model


class Soon:
    """A signal that comes at the n-th look."""

    code = 130

    def __init__(self, looks: int):
        self.left = looks

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


@pytest.mark.usefixtures("no_report")
def test_a_signal_while_it_is_made_ends_a_run_that_can_go_on(recipe: MakeRecipe) -> None:
    prepare.prepare(recipe(*FROZEN), say=lambda line: None)  # so that nothing else looks for signals
    result, _, said = run_stopped(recipe(*FROZEN), "r")
    assert (result.code, result.progress.step) == (130, 0)
    assert "go on with" in said[-1]
    assert not list(Path("runs/.cache").glob("*states*"))
    result, _, _ = run(recipe(*FROZEN), "r", resume=True)
    assert result.progress.stopped == "finished"


def run_stopped(made: Any, out: str) -> tuple[Any, Any, list[str]]:
    said: list[str] = []
    return finetune.finetune(made, out, say=said.append, interrupted=Soon(8)), None, said  # type: ignore[arg-type]


def test_check_says_it(recipe: MakeRecipe, capsys: pytest.CaptureFixture[str]) -> None:
    for expected in ("made", "found"):
        preflight.check(recipe(*FROZEN))
        assert f"frozen cache: 1 of 2 blocks, 0 MB, {expected}" in capsys.readouterr().out
