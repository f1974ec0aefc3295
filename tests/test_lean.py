"""Parts of torch that sleep while transformers is imported: nobody notices, and they wake for whoever wants them."""

import os
import subprocess
import sys

import pytest

from engine import find, lean

BEGIN = """
import sys
import engine.finetune
from engine import lean
asleep = lambda name: name not in sys.modules or isinstance(sys.modules[name], lean.StandIn)
import torch, transformers
torch.manual_seed(0)
config = transformers.BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
model = transformers.BertForSequenceClassification(config).eval()
ids = torch.arange(8).view(2, 4)
plain = model(ids).logits
model(ids).logits.sum().backward()
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
optimizer.step(), optimizer.zero_grad()
"""


def run(code: str, **environment: str) -> str:
    """What the code prints, in a process of its own."""
    given = {**os.environ, "PYTHONPATH": str(find.PROJECT), **environment}
    done = subprocess.run([sys.executable, "-c", BEGIN + code], capture_output=True, text=True, env=given)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_model_trains_while_they_sleep_and_they_wake_for_a_compiler() -> None:
    said = run("""
assert all(map(asleep, lean.SLEEP)), "training wakes none"
from transformers import masking_utils
from transformers.distributed.utils import is_dtensor
assert not is_dtensor(plain) and all(map(asleep, lean.SLEEP)), "nor does a question whether something is a DTensor"
before = model(ids).logits
compiled = torch.compile(model, backend="eager")(ids).logits
assert torch.equal(compiled, before)
assert not asleep("torch._dynamo") and not any(isinstance(m, lean.StandIn) for m in sys.modules.values())
assert torch._dynamo is sys.modules["torch._dynamo"]
with masking_utils.TransformGetItemToIndex():
    pass
optimizer.step()
print("compiled")
""")
    assert said == "compiled\n"


def test_a_model_without_memory_is_made_while_the_algebra_sleeps() -> None:
    said = run("""
with torch.device("meta"):
    made = transformers.BertForSequenceClassification(config)
    grid = torch.arange(6).view(2, 3).expand(4, 2, 3).contiguous()
    both = torch.cat([torch.empty(2, 3).normal_(), torch.zeros(1, 3)])
assert grid.shape == (4, 2, 3) and both.shape == (3, 3) and made.classifier.weight.is_meta
assert asleep("sympy") and asleep("torch.fx.experimental.symbolic_shapes")
for wrong in (lambda: torch.empty(2, 3, device="meta") @ torch.empty(2, 3, device="meta"), lambda: torch._check(False)):
    try:
        wrong()
        raise SystemExit("not refused")
    except RuntimeError:
        pass
from torch.fx.experimental.symbolic_shapes import ShapeEnv, guard_or_false, sym_eq
assert guard_or_false(True) and sym_eq((1, 2), torch.Size([1, 2])) and not sym_eq(3, 4)
size = ShapeEnv().create_unbacked_symint()  # a symbol: the real answers now
from torch.fx.experimental.symbolic_shapes import guard_or_false as real
assert not real(size == 3) and not guard_or_false(size == 3) and isinstance(sym_eq(size, 3), torch.SymBool)
import sympy
assert sympy.simplify("x + x") == 2 * sympy.Symbol("x") and not asleep("sympy")
print("meta")
""")
    assert said == "meta\n"


def test_a_name_that_was_handed_out_asleep_is_the_real_one_awake() -> None:
    said = run("""
from torch.distributed.tensor import DTensor
assert isinstance(DTensor, lean.Later) and not isinstance(plain, DTensor)
import torch.distributed.tensor._api
from torch.distributed.tensor import DTensor as Real
assert not isinstance(Real, lean.Later)
made = object.__new__(type("Part", (), {}))
assert isinstance(torch.Tensor._make_subclass(Real, torch.ones(2)), DTensor)
assert not isinstance(plain, DTensor)
import torch._dynamo.config, torch.distributed.checkpoint, torch.distributed.fsdp
assert torch.distributed.fsdp.fully_shard.__module__.startswith("torch.")
print("real")
""")
    assert said == "real\n"


def test_scipy_is_there_for_scikit_learn() -> None:
    said = run("""
import scipy.optimize, sklearn.metrics
from transformers.loss import loss_for_object_detection as loss
assert loss.linear_sum_assignment([[1, 2], [3, 0]])[1].tolist() == scipy.optimize.linear_sum_assignment([[1, 2], [3, 0]])[1].tolist()
print(sklearn.metrics.f1_score([0, 1], [0, 1]))
""")
    assert said == "1.0\n"


@pytest.mark.parametrize("environment", [{}, {lean.PLAIN: "1"}])
def test_outputs_are_the_same_and_plain_imports_can_be_had(environment: dict[str, str]) -> None:
    said = run("print(asleep('torch._dynamo'), plain.flatten().tolist())", **environment)
    flag, _, numbers = said.partition(" ")
    assert flag == str(not environment)
    expected = run("print(plain.flatten().tolist())", **{lean.PLAIN: "1"})
    assert numbers == expected


def test_what_goes_wrong_while_they_sleep_is_imported_as_usual() -> None:
    code = """
import sys
from engine import lean
lean.SHARED = (*lean.SHARED, "no_such_module")
lean.load()
import transformers.modeling_utils
from transformers import masking_utils
assert not isinstance(masking_utils.TransformGetItemToIndex, lean.Later)
print("usual")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(find.PROJECT)}
    )
    assert done.stdout == "usual\n", done.stderr[-2000:]
