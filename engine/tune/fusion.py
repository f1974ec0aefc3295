"""AdapterFusion: several trained adapters, mixed by a learnt attention (Pfeiffer et al. 2021, arXiv:2005.00247).

    z_i = u_i(h)                        what frozen adapter i, trained on its own task, would add; i = 1 .. N
    p   = softmax_i(Q h . K z_i)        which of them helps this token, (..., N)
    y   = h + sum_i p_i V z_i           Q, K, V (H, H) at each site; they and the head train, all else is frozen

                    ,-> u_1 -> z_1 -.
          h --+-----+-> u_2 -> z_2 --+-> attention, asked by Q h --> + --> y
              |                                                      ^
              `------------------------------------------------------'

V starts as the identity (with noise of 1e-6 beside its diagonal), Q and K small, so at first the mix is near the plain
mean of the adapters. The paper's penalty on V is left out. Sites and forms are those of adapter.py.

The adapters' weights become part of the model and are saved with it. What shapes them (form, paths, sizes) is noted in the
model's config as `adapter_fusion`, so a run opens again when the folders in `tune.adapters` are gone.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers.activations import ACT2FN

from engine import adapters, models
from engine.errors import InputError
from engine.freeze import train_only
from engine.schema import Tune
from engine.swap import swap
from engine.tune import adapter
from engine.tune._bottleneck import Form, Site, width_of

STAYS = True  # an attention does not fold into a plain weight: the saved model keeps its layers
TRAINED = ("query", "key", "value")


class Options(Tune):
    """The adapters to mix."""

    adapters: Annotated[list[str], "list of folders"] = Field(
        default_factory=list, description="Runs or adapter folders of method adapter, trained on this base; two or more."
    )


class Bottleneck(nn.Module):
    """A trained bottleneck, as adapter.py makes them."""

    def __init__(self, width: int, reduction: int, activation: str, scaling: float):
        super().__init__()
        self.scaling = scaling
        self.down = nn.Linear(width, max(1, width // reduction))
        self.up = nn.Linear(max(1, width // reduction), width)
        self.act = ACT2FN[activation]

    def forward(self, x: Tensor) -> Tensor:
        """(..., H) -> (..., H)."""
        return self.scaling * self.up(self.act(self.down(x)))  # type: ignore[no-any-return]


class Fusion(Site):
    """A frozen module with several frozen bottlenecks and the attention that mixes them."""

    def __init__(self, base: nn.Module, form: Form, width: int, bottlenecks: list[Bottleneck]):
        super().__init__(base, form)
        self.adapters = nn.ModuleList(bottlenecks)
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value = nn.Linear(width, width, bias=False)
        for layer in (self.query, self.key):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        nn.init.normal_(self.value.weight, std=1e-6)
        with torch.no_grad():
            self.value.weight.fill_diagonal_(1.0)

    def update(self, x: Tensor) -> Tensor:
        """(..., H) -> (..., H)."""
        z = torch.stack([one(x) for one in self.adapters], dim=-2)  # (..., N, H)
        scores = (self.query(x)[..., None, :] * self.key(z)).sum(-1)  # (..., N)
        return (scores.softmax(-1)[..., None] * self.value(z)).sum(-2)  # type: ignore[no-any-return]


@dataclass
class Trained:
    """A trained adapter: its sites, and its tensors by their paths in the model."""

    where: str
    options: adapter.Options
    sites: list[str]
    tensors: dict[str, Tensor]


def apply(model: Any, options: Options, head: list[str]) -> str:
    """Read the adapters, put the fusions in, freeze the rest but the head; returns the coverage line."""
    if len(options.adapters) < 2:
        raise InputError("tune.adapters: name two trained adapters or more, as runs or adapter folders")
    read = [_read(name, f"tune.adapters.{i}", model) for i, name in enumerate(options.adapters)]
    for one in read[1:]:
        if one.sites != read[0].sites or adapter.form_of(one.options) != adapter.form_of(read[0].options):
            raise InputError(f"{one.where}: it sits at other places than {read[0].where}; fusion mixes adapters of one placement")
    shapes = [
        {"reduction": a.options.reduction, "activation": a.options.activation, "scaling": adapter.scaling_of(a.options)}
        for a in read
    ]
    noted = {"form": adapter.form_of(read[0].options), "sites": read[0].sites, "adapters": shapes}
    line = _put_in(model, noted, head, read)
    model.config.adapter_fusion = noted
    return line


def rebuild(model: Any, options: Options, head: list[str]) -> str:
    """The layers of a saved fusion, to be filled with its weights; the adapters' own folders are not needed."""
    return _put_in(model, model.config.adapter_fusion, head)


def _put_in(model: Any, noted: dict[str, Any], head: list[str], read: list[Trained] | None = None) -> str:
    """Fusions at the noted sites, with the weights of the adapters that were read."""

    def build(old: nn.Module, path: str) -> nn.Module:
        width = width_of(old, path, noted["form"])
        bottlenecks = [Bottleneck(width, **shape) for shape in noted["adapters"]]
        for bottleneck, one in zip(bottlenecks, read or [], strict=read is not None):
            _fill(bottleneck, one, path)
        return Fusion(old, noted["form"], width, bottlenecks)

    done = swap(model, noted["sites"], build, where="tune.adapters")
    train_only(model, [f"{s.path}.{part}" for s in done for part in TRAINED] + head)
    return f"fusion: {len(noted['adapters'])} adapters mixed at {len(done)} sites"


@torch.no_grad()
def _fill(bottleneck: Bottleneck, one: Trained, site: str) -> None:
    """Copy what an adapter learnt at `site` into a bottleneck."""
    for name, parameter in bottleneck.named_parameters():
        tensor = one.tensors[f"{site}.{name}"]
        if tensor.shape != parameter.shape:
            raise InputError(
                f"{one.where}: {site}.{name} is {tuple(tensor.shape)}, where this model's hidden size asks for"
                f" {tuple(parameter.shape)}"
            )
        parameter.copy_(tensor)


# -- reading trained adapters -----------------------------------------------------------------------------------------


def _read(name: str, where: str, model: Any) -> Trained:
    """A run's adapter/ or an adapter folder; whatever does not suit this model is an InputError."""
    where = f"{where}: {name}"
    read = adapters.read(adapters.locate(name, where), where)
    if read.method != "adapter":
        raise InputError(f"{where}: its method is {read.method}; fusion mixes bottleneck adapters (tune.method: adapter)")
    _check_base(read.base, read.revision, str(getattr(model, "name_or_path", "")), where, read.folder)
    try:
        options = adapter.Options.model_validate({"method": "adapter", **read.options})
    except ValueError as error:
        raise InputError(f"{where}: {read.folder / adapters.CONFIG}: options: {str(error).splitlines()[0]}") from error
    tensors = read.tensors
    sites = [n.removesuffix(".down.weight") for n in tensors if n.endswith(".down.weight")]
    order = {path: i for i, (path, _) in enumerate(model.named_modules())}
    lost = [s for s in sites if s not in order]
    if lost or not sites:
        raise InputError(f"{where}: this model has no module {lost[0]}" if lost else f"{where}: it holds no bottleneck")
    missing = [f"{s}.{n}" for s in sites for n in ("down.bias", "up.weight", "up.bias") if f"{s}.{n}" not in tensors]
    if missing:
        raise InputError(f"{where}: {read.folder / adapters.WEIGHTS} lacks {missing[0]}")
    return Trained(where, options, sorted(sites, key=order.__getitem__), tensors)


def _check_base(base: str, revision: str | None, ours: str, where: str, folder: Path) -> None:
    """The adapter's base must be this model: the same name, or names that lead to the same folder."""
    if not ours or not base or base == ours:  # adapter-hub's files may name none; a model that was built, not loaded, has no name
        return
    try:
        same = models.find(base, revision, True, where).folder.resolve() == Path(ours).resolve()
    except InputError:  # not found from here: a path relative to another recipe's folder, perhaps
        same = f"/{Path(ours).as_posix()}".endswith(f"/{base.lstrip('./')}")
    if not same:
        raise InputError(
            f"{where}: it was trained on {base}, but this model is {ours}; if they are the same model,"
            f" correct base_model_name_or_path in {folder / 'adapter_config.json'}"
        )
