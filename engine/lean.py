"""Importing transformers without what a fine-tuning run never touches.

A model class of transformers takes two and a half seconds to import, and a second more when it is first loaded. More than half
of that goes into parts for other work: torch's compiler and the algebra that it needs (sympy), tensors that are spread over machines and their
checkpoints, the assignment problem of object detection. What imports these binds a name and goes on:

    from torch.distributed.tensor import DTensor        transformers/distributed/utils.py
    isinstance(x, DTensor)                              no: nothing has made one

So stand-ins take their places. A stand-in gives out names that stand in for the module's; nothing is an instance of such a name
while its module sleeps. When one is really used (called, asked for an attribute), or a part of a sleeping module is imported,
all stand-ins leave, the real module is imported, and the name hands on to it: for torch.compile, for instance. Two things do
not wake the compiler: decorators, which act while modules are imported, leave what they are put on as it is; and what torch's
own optimizers and initialisers ask of it whenever they run, not to compile them (`disable`, `graph_break`), is answered without it.

A model that is made on the device `meta`, as from_pretrained does, asks torch's rules for shapes about each size, and they ask the algebra:
what they ask of plain numbers is answered here (QUESTIONS), what they ask of symbols wakes it.

It saves more than a second and 100 MB of memory before the first step. ENGINE_PLAIN_IMPORTS=1 in the environment leaves it out;
so does anything that goes wrong while transformers is imported.
"""

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import os
import sys
import types
from collections.abc import Iterator
from typing import Any

COMPILER = "torch._dynamo"
SHAPES = "torch.fx.experimental.symbolic_shapes"
SLEEP = (
    COMPILER, "torch.distributed.tensor", "torch.distributed.checkpoint", "torch.distributed.fsdp", SHAPES, "torch.utils._sympy", "sympy",
)  # fmt: skip
LEAVE = ("scipy.optimize",)  # scikit-learn will want it: its stand-in goes as soon as transformers is imported
SHARED = (
    "modeling_utils", "masking_utils", "modeling_layers", "integrations.sdpa_attention", "generation.utils",
    "models.auto.modeling_auto", "models.auto.tokenization_auto",
)  # what model classes import, whichever is asked for  # fmt: skip
PLAIN = "ENGINE_PLAIN_IMPORTS"


class Later(type):
    """The class of names that stand in for others: classes, so that they can be bases, annotations and decorators."""

    module: str
    name: str

    def __new__(cls, name: str, bases: tuple[type, ...] = (), values: dict[str, Any] | None = None, module: str = "") -> "Later":
        made = super().__new__(cls, name, bases, values or {})
        if module:
            made.module, made.name = module, name
        return made

    def __init__(cls, *args: Any, **more: Any):
        super().__init__(*args[:3])

    def stands_in(cls) -> bool:
        """False for a class that was derived from a stand-in."""
        return "module" in vars(cls)

    def real(cls) -> Any:
        """What it stands for."""
        wake()
        return getattr(importlib.import_module(cls.module), cls.name)

    def __call__(cls, *args: Any, **more: Any) -> Any:
        if not cls.stands_in():
            return super().__call__(*args, **more)
        if not _finder.importing:
            return cls.real()(*args, **more)
        if cls.module.startswith(COMPILER):  # a decorator, bare or with options
            return args[0] if args and callable(args[0]) else lambda function: function
        return super().__call__()  # a constant, such as Replicate(), in a plan for several machines

    def __instancecheck__(cls, instance: Any) -> bool:
        if not cls.stands_in():
            return super().__instancecheck__(instance)
        there = cls.module in sys.modules and not isinstance(sys.modules[cls.module], StandIn)
        return there and isinstance(instance, cls.real())

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__") or _finder.importing or not cls.stands_in():
            raise AttributeError(name)
        return getattr(cls.real(), name)


class StandIn(types.ModuleType):
    """A sleeping module: every name in it is a stand-in."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what looks through all modules, as inspect does, needs none of them
            raise AttributeError(name)
        if name in ASLEEP.get(self.__name__, {}):
            return ASLEEP[self.__name__][name]
        if self.__name__ == COMPILER and not _finder.importing:
            return getattr(self.real(), name)
        made = Later(name, module=self.__name__)
        setattr(self, name, made)
        return made

    def real(self) -> types.ModuleType:
        wake()
        return importlib.import_module(self.__name__)


def disable(fn: Any = None, recursive: bool = True, **more: Any) -> Any:
    """torch._dynamo.disable: `fn` itself, until the compiler is awake."""
    if not callable(fn):
        return lambda function: disable(function, recursive, **more)
    disabled: list[Any] = []

    def plain(*args: Any, **named: Any) -> Any:
        if isinstance(sys.modules.get(COMPILER), StandIn):
            return fn(*args, **named)
        if not disabled:
            disabled.append(importlib.import_module(COMPILER).disable(fn, recursive, **more))
        return disabled[0](*args, **named)

    return plain


def graph_break(msg: str = "") -> None:
    """torch._dynamo.graph_break: nothing is being compiled."""


def of_numbers(name: str, answer: Any) -> Any:
    """A question of SHAPES about sizes: `answer` where all are plain bools, ints and tuples, the real one where one is a symbol."""

    def plain(one: Any) -> bool:
        return type(one) in (bool, int) or (isinstance(one, tuple) and all(map(plain, one)))

    def asked(*args: Any, **named: Any) -> Any:
        if not named and all(map(plain, args)):
            return answer(*args)
        wake()
        return getattr(importlib.import_module(SHAPES), name)(*args, **named)

    return asked


same = lambda condition: condition
QUESTIONS = {
    "expect_true": same, "guard_or_true": same, "guard_or_false": same, "statically_known_true": same,
    "sym_and": lambda *all_: all(all_), "sym_or": lambda *any_: any(any_), "is_nested_int": lambda size: False,
    "sym_eq": lambda a, b: a == b,
}  # fmt: skip
ASLEEP: dict[str, dict[str, Any]] = {  # what these answer without waking
    COMPILER: {"disable": disable, "graph_break": graph_break},
    SHAPES: {name: of_numbers(name, answer) for name, answer in QUESTIONS.items()},
}


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds stand-ins for the modules `aside`, and while transformers is imported for all below them."""

    def __init__(self) -> None:
        self.aside: tuple[str, ...] = ()
        self.importing = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        root = next((one for one in self.aside if f"{name}.".startswith(f"{one}.")), None)
        if root is None:
            return None
        if self.importing or (name == root and name not in LEAVE):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        wake()
        parent = importlib.import_module(name.rpartition(".")[0])
        return importlib.machinery.PathFinder.find_spec(name, parent.__path__)

    def create_module(self, spec: Any) -> types.ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """It has no code."""


_finder = Finder()


def wake() -> None:
    """Take all stand-ins away: from now on everything is imported as usual."""
    _finder.aside = ()
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
    take_away("")


def take_away(*roots: str) -> None:
    """The stand-ins at and below `roots` leave sys.modules and their parents; "" stands for all."""
    for name in [name for name, module in sys.modules.items() if isinstance(module, StandIn)]:
        if any(not root or f"{name}.".startswith(f"{root}.") for root in roots):
            parent, _, leaf = name.rpartition(".")
            if isinstance(vars(sys.modules.get(parent, _finder)).get(leaf), StandIn):
                delattr(sys.modules[parent], leaf)
            del sys.modules[name]


@contextlib.contextmanager
def aside() -> Iterator[None]:
    """Within the block stand-ins take the place of all of SLEEP and LEAVE that is not there yet."""
    _finder.aside = tuple(name for name in (*SLEEP, *LEAVE) if name not in sys.modules)
    _finder.importing = True
    sys.meta_path.insert(0, _finder)
    try:
        yield
    finally:
        _finder.importing = False
        take_away(*LEAVE)
        _finder.aside = tuple(name for name in _finder.aside if name not in LEAVE)


def load() -> None:
    """Import what all models of transformers share, the lean way; does nothing where it is imported already."""
    if "transformers.modeling_utils" in sys.modules or os.environ.get(PLAIN):
        return
    before = set(sys.modules)
    try:
        import torch  # noqa: F401 (itself, and whole, before anything stands aside)

        with aside():
            for name in SHARED:
                importlib.import_module(f"transformers.{name}")
    except Exception:  # another version, which does more with one of them: as everybody imports it
        wake()
        for name in [name for name in sys.modules if name.startswith("transformers") and name not in before]:
            del sys.modules[name]
        importlib.import_module("transformers.modeling_utils")
