"""The laws that every tuning method obeys on every architecture, and the table that says so.

make laws        runs them all and prints the README's table

identity      at init the model computes what the pretrained one computes (where the method promises it)
gradients     only what the method and the head train gets gradients, and all of it does
base          after training every other parameter is bit-equal
padding       a row alone gives what it gives in a padded batch
accumulation  gradients summed over uneven micro-batches equal those of the whole batch
bfloat16      under autocast the loss is near and gradients are finite
working       with bfloat16 weights too; what trains has its gradient in float32, and every bit of the others comes back
checkpointing gradient checkpointing changes no gradient
reload        saved and loaded it computes the same
merge         merged it is the plain architecture and computes the same
"""

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine import adapters, find, freeze, models
from engine.errors import InputError
from engine.fast import weights
from engine.layers.quantized import quantized

CASES: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "last_n": {"method": "last_n", "n": 1},
    "bitfit": {"method": "bitfit"},
    "layernorm": {"method": "layernorm"},
    "lora": {"method": "lora", "r": 4},
    "rslora": {"method": "lora", "r": 4, "rslora": True},
    "dora": {"method": "lora", "r": 4, "dora": True},
    "lora+": {"method": "lora", "b_rate": 16.0},
    "pissa": {"method": "lora", "r": 4, "init": "pissa"},
    "qlora nf4": {"method": "lora", "r": 4, "quantize": "nf4", "block": 16},
    "qlora int8": {"method": "lora", "r": 4, "quantize": "int8"},
    "qdora": {"method": "lora", "r": 4, "dora": True, "quantize": "nf4", "double_quant": False},
    "pissa on nf4": {"method": "lora", "r": 4, "init": "pissa", "quantize": "nf4", "block": 32},
    "lora on embeddings": {
        "method": "lora",
        "r": 4,
        "at": ["**.{query,q_proj,q_lin,query_proj,c_attn,Wqkv,q}", "**.{word_embeddings,embed_tokens,wte,tok_embeddings}"],
    },
    "ia3": {"method": "ia3"},
    "houlsby": {"method": "adapter", "reduction": 4},
    "pfeiffer": {"method": "adapter", "placement": "pfeiffer", "reduction": 4},
    "after norm": {"method": "adapter", "placement": "pfeiffer", "after": "norm", "reduction": 4},
    "parallel": {"method": "adapter", "placement": "parallel", "reduction": 4},
    "compacter": {"method": "compacter", "reduction": 4, "n": 4, "rank": 2},
    "prefix": {"method": "prefix", "length": 5},
    "prefix, reparametrised": {"method": "prefix", "length": 5, "reparametrize": True, "bottleneck": 16},
    "prompt": {"method": "prompt", "length": 5},
    "prompt, random": {"method": "prompt", "length": 5, "init": "random"},
    "p-tuning": {"method": "ptuning", "length": 5},
    "p-tuning, lstm": {"method": "ptuning", "length": 5, "encoder": "lstm", "encoder_size": 16, "encoder_layers": 1},
}
REFUSED = {
    ("bitfit", "Llama"): "needs biases",
    ("bitfit", "ModernBert"): "needs biases",
    **{
        ("after norm", name): "tune.after: norm: .* matches no module" for name in ("ModernBert", "Llama", "GPT2", "T5")
    },  # pre-norm
    ("bitfit", "T5"): "needs biases",
    ("lora on embeddings", "T5"): "is tied to",
}
CHANGES_AT_INIT = {"prefix", "prompt", "ptuning"}  # a random prefix or prompt is no identity, and none is promised
SMALL = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Bert": SMALL, "Roberta": SMALL, "Electra": SMALL, "DebertaV2": SMALL, "ModernBert": SMALL, "Llama": {**SMALL, "num_key_value_heads": 2},
    "DistilBert": {"vocab_size": 60, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
    "GPT2": {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "T5": {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
}  # fmt: skip
# transformers 5.23's own attention of DeBERTa-v2 fails under CPU autocast (it fills with float32's least number), with and without us
NOT_COMPUTED = {("bfloat16", "DebertaV2")}
LABELS = torch.tensor([0, 1, 1, 0])


def build(architecture: str) -> Any:
    """A tiny model with random weights and two labels."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(**ARCHITECTURES[architecture], **IDS)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():  # random heads and norms, so that nothing is hidden by a zero
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model.eval()


def batch() -> dict[str, Tensor]:
    """Four rows of 11, 4, 7 and 2 tokens."""
    torch.manual_seed(2)
    lengths = torch.tensor([11, 4, 7, 2])
    mask = (torch.arange(11) < lengths[:, None]).long()
    ids = torch.randint(3, 60, mask.shape) * mask
    ids[torch.arange(4), lengths - 1] = IDS["eos_token_id"]  # T5 classifies by the token that ends the text
    return {"input_ids": ids, "attention_mask": mask}


def logits(model: nn.Module, inputs: dict[str, Tensor] | None = None) -> Tensor:
    with torch.no_grad():
        return model.eval()(**(inputs or batch())).logits


def gradients(model: nn.Module, parts: list[list[int]] | None = None) -> dict[str, Tensor | None]:
    """Gradients of the mean loss, computed over `parts` of the batch, each cut to its longest row."""
    model.zero_grad(set_to_none=True)
    for rows in parts or [[0, 1, 2, 3]]:
        inputs = {k: v[rows] for k, v in batch().items()}
        inputs = {k: v[:, : int(inputs["attention_mask"].sum(1).max())] for k, v in inputs.items()}
        (F.cross_entropy(model(**inputs).logits.float(), LABELS[rows], reduction="sum") / 4).backward()
    found = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def still(model: nn.Module) -> nn.Module:
    """In training mode, without dropout."""
    for module in model.train().modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout_prob", "attention_dropout", "attn_dropout", "drop_prob", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


@dataclass
class Tuned:
    """A base and a copy of it with a method on it."""

    case: str
    architecture: str
    base: Any
    model: Any
    method: Any
    options: Any
    own: set[str]  # what trains
    after: Any = None  # the trained copy, made once

    def changes_at_init(self) -> bool:
        return CASES[self.case]["method"] in CHANGES_AT_INIT


def apply(model: Any, case: str) -> tuple[Any, Any]:
    """Apply a case to a model; returns (method, options)."""
    method = find.module("tune", CASES[case]["method"], "test")
    options = method.Options.model_validate(CASES[case])
    adapters.put_in(model, method, options, models.head_of(model, []))
    return method, options


def tuned(case: str, architecture: str) -> Tuned:
    """The case on the architecture; raises InputError where the method refuses it.

    The law for a quantised base: it is the float model with rounded weights. So that is the base to compare with.
    """
    base = build(architecture)
    model = copy.deepcopy(base)
    method, options = apply(model, case)
    with torch.no_grad():
        for name, weight in held_in_codes(model).items():
            parameter = base.get_parameter(name)
            conv1d = type(base.get_submodule(name.rpartition(".")[0])).__name__ == "Conv1D"
            assert not torch.equal(parameter, weight.T if conv1d else weight)
            parameter.copy_(weight.T if conv1d else weight)
    return Tuned(case, architecture, base, model, method, options, {n for n, p in model.named_parameters() if p.requires_grad})


def trained(one: Tuned, steps: int = 3) -> Any:
    """A trained copy; it is made once, so a law that changes it copies it first."""
    if one.after is not None:
        return one.after
    model = one.after = copy.deepcopy(one.model)
    rates = one.method.rates(model, one.options) if hasattr(one.method, "rates") else {}
    optimizer = torch.optim.AdamW(freeze.groups(model, 1e-2, 0.01, rates))
    model.train()
    for _ in range(steps):
        F.cross_entropy(model(**batch()).logits, LABELS).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def plain_name(name: str) -> str:
    return name.replace(".base.", ".")


def held_in_codes(model: nn.Module) -> dict[str, Tensor]:
    """What the quantised layers compute with, (out, in), by the plain name."""
    return {plain_name(f"{path}.weight"): layer.weight for path, layer in quantized(model).items()}


# -- the laws: each takes a Tuned and asserts -------------------------------------------------------------------------


def identity(one: Tuned) -> None:
    if not one.changes_at_init():
        assert torch.allclose(logits(one.model), logits(one.base), atol=1e-5)


def own_gradients(one: Tuned) -> None:
    assert one.own
    found = {n for n, g in gradients(one.model).items() if g is not None}
    assert found <= one.own
    assert one.case == "full" or found == one.own, one.own - found


def base_bit_equal(one: Tuned) -> None:
    before, start, model = dict(one.base.named_parameters()), dict(one.model.named_parameters()), trained(one)
    for name, parameter in model.named_parameters():
        if name not in one.own:
            assert torch.equal(parameter, start[name]), name
            assert plain_name(name) not in before or torch.equal(parameter, before[plain_name(name)]), name
    codes, now = held_in_codes(one.model), held_in_codes(model)
    assert {plain_name(n) for n in start} | codes.keys() >= set(before)
    assert codes.keys() == now.keys()
    assert all(torch.equal(now[name], codes[name]) for name in codes)
    assert not torch.allclose(logits(model), logits(one.base), atol=1e-3)


def padding(one: Tuned) -> None:
    model = trained(one)
    alone = {k: v[1:2, :4] for k, v in batch().items()}
    assert torch.allclose(logits(model, alone), logits(model)[1:2], atol=1e-5)


def accumulation(one: Tuned) -> None:
    model = still(copy.deepcopy(one.model))
    whole, parts = gradients(model), gradients(model, [[0], [1, 3], [2]])
    for name, g in whole.items():
        assert (g is None) == (parts[name] is None), name
        assert g is None or torch.allclose(g, parts[name], atol=1e-6, rtol=1e-4), name


def bfloat16(one: Tuned) -> None:
    model = still(copy.deepcopy(one.model))
    expected = F.cross_entropy(model(**batch()).logits, LABELS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = F.cross_entropy(model(**batch()).logits.float(), LABELS)
    loss.backward()
    assert abs(loss.item() - expected.item()) < 0.05 * expected.item() + 0.02
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def working(one: Tuned) -> None:
    """train.weights: bfloat16: near in value, a finite gradient at the float32 master of all that trains, and every bit comes back."""
    model = still(copy.deepcopy(one.model))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    expected = F.cross_entropy(model(**batch()).logits, LABELS)
    masters = weights.Masters(model, "bfloat16")
    loss = F.cross_entropy(model(**batch()).logits.float(), LABELS)
    loss.backward()
    assert abs(loss.item() - expected.item()) < 0.05 * expected.item() + 0.02
    found = {n for n, p in model.named_parameters() if freeze.moved(p).grad is not None}
    assert found <= one.own
    assert one.case == "full" or found == one.own, one.own - found
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert all(torch.isfinite(freeze.moved(p).grad).all() for n, p in model.named_parameters() if n in found)
    masters.restore()
    assert all(torch.equal(p, before[n]) and p.dtype == torch.float32 for n, p in model.named_parameters())


def checkpointing(one: Tuned) -> None:
    model = still(copy.deepcopy(one.model))
    expected = gradients(model)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    for name, g in gradients(model).items():
        assert (g is None) == (expected[name] is None), name
        assert g is None or torch.allclose(g, expected[name], atol=1e-6), name


def reload(one: Tuned) -> None:
    model, fresh = trained(one), build(one.architecture)
    apply(fresh, one.case)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(fresh), logits(model))


def merge(one: Tuned) -> None:
    model, before = copy.deepcopy(trained(one)), {n for n, _ in one.base.named_parameters()}
    if hasattr(one.method, "merge"):
        expected = logits(model)
        adapters.merge(model, one.method, batch())
        assert {n for n, _ in model.named_parameters()} == before
        assert torch.allclose(logits(model), expected, atol=1e-5)
    else:
        assert getattr(one.method, "STAYS", False) == ({n for n, _ in model.named_parameters()} != before)


LAWS: list[Callable[[Tuned], None]] = [
    identity, own_gradients, base_bit_equal, padding, accumulation, bfloat16, working, checkpointing, reload, merge,
]  # fmt: skip


def laws_of(architecture: str) -> list[Callable[[Tuned], None]]:
    """The laws that can be asked of an architecture."""
    return [law for law in LAWS if (law.__name__, architecture) not in NOT_COMPUTED]


def compiled(one: Tuned) -> None:
    """torch.compile changes no output and no gradient. On one architecture; the graph is traced and run without a C++ compiler."""
    model = still(copy.deepcopy(one.model))
    expected = gradients(model)
    fast = torch.compile(model, backend="aot_eager")
    for name, g in gradients(fast).items():
        want = expected[name.removeprefix("_orig_mod.")]
        assert (g is None) == (want is None), name
        assert g is None or torch.allclose(g, want, atol=1e-6), name


def main() -> int:
    """Run every law on every case and architecture; print the table."""
    import transformers

    transformers.logging.set_verbosity_error()
    failures: list[str] = []
    print(f"| | {' | '.join(ARCHITECTURES)} |\n|---|{'---|' * len(ARCHITECTURES)}")
    for case in CASES:
        cells = []
        for architecture in ARCHITECTURES:
            try:
                one = tuned(case, architecture)
            except InputError:
                cells.append("refused" if (case, architecture) in REFUSED else "FAILS")
                continue
            broken = []
            for law in laws_of(architecture):
                try:
                    law(one)
                except AssertionError as error:
                    broken.append(law.__name__)
                    failures.append(f"{case} on {architecture}: {law.__name__}: {str(error)[:200]}")
            cells.append("FAILS " + ", ".join(broken) if broken else f"{len(laws_of(architecture))}")
        print(f"| {case} | {' | '.join(cells)} |", flush=True)
    print("\n".join(failures), file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
