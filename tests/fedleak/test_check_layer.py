"""Every kind of layer is held against torch by what strangers run, too; and strangers' layers."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedleak import laboratory
from fedleak.attacks import HybridAttack, LinearAttack, run_attack
from fedleak.errors import InvalidInputError, LayerCheckError, UnsupportedModelError
from fedleak.metric import security_metric
from fedleak.observation import Observation
from fedleak.systems import LAYERS, Affine, Chain, Layer, check_layer
from fedleak.systems.base import Shape, class_name
from fedleak.systems.pooling import Mean
from tests.conftest import photo_patches

Observe = Callable[[nn.Module, Tensor, int], Observation]


def _drawn(module: nn.Module) -> nn.Module:
    """Give a module weights and statistics that hide nothing."""
    generator = torch.Generator().manual_seed(0)
    for p in module.parameters():
        nn.init.normal_(p, generator=generator)
    if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        module.running_mean.normal_(generator=generator)
        module.running_var.uniform_(0.3, 2, generator=generator)
    return module


KINDS: list[tuple[nn.Module, Shape]] = [
    (nn.Conv2d(2, 3, 3), (2, 6, 6)),
    (nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=2), (4, 7, 6)),
    (nn.Conv2d(3, 8, 3, padding="same", bias=False), (3, 6, 6)),
    (nn.Linear(7, 5), (7,)),
    (nn.Linear(5, 9, bias=False), (5,)),
    (nn.Tanh(), (3, 4, 4)),
    (nn.Sigmoid(), (5,)),
    (nn.ReLU(), (2, 5, 5)),
    (nn.ReLU6(), (2, 5, 5)),
    (nn.Hardtanh(-0.4, 0.7), (6,)),
    (nn.LeakyReLU(0.2), (4, 3)),
    (nn.BatchNorm2d(3), (3, 4, 4)),
    (nn.BatchNorm1d(6), (6,)),
    (nn.AvgPool2d(2), (2, 6, 6)),
    (nn.AvgPool2d(3, 1, 1, count_include_pad=False), (1, 6, 6)),
    (nn.AdaptiveAvgPool2d(2), (2, 4, 4)),
    (Mean((2, 3)), (3, 4, 4)),
    (nn.MaxPool2d(2), (2, 6, 6)),
    (nn.MaxPool2d(3, 2, 1), (2, 7, 7)),
    (nn.Identity(), (3, 2, 2)),
    (nn.Flatten(), (2, 3, 3)),
    (nn.Unflatten(1, (2, 3)), (6,)),
    (nn.Dropout(0.5), (6,)),
    (nn.Dropout2d(0.5), (2, 3, 3)),
    (nn.GroupNorm(2, 4), (4, 3, 3)),
    (nn.GroupNorm(1, 4, affine=False), (4, 5)),
    (nn.InstanceNorm1d(3, affine=True), (3, 6)),
    (nn.InstanceNorm2d(3), (3, 4, 4)),
    (nn.LayerNorm(7), (7,)),
    (nn.LayerNorm((3, 4), bias=False), (2, 3, 4)),
]


@pytest.mark.parametrize(("module", "shape"), KINDS, ids=[f"{m}" for m, _ in KINDS])
def test_every_kind_of_layer_stands_the_check(module: nn.Module, shape: Shape) -> None:
    torch.manual_seed(0)
    assert isinstance(check_layer(_drawn(module), shape, seed=1), Layer)


@pytest.mark.parametrize(
    ("module", "shape"), [(nn.Conv2d(2, 3, 3), (2, 6, 6)), (nn.Linear(30, 3), (30,))]
)
def test_large_layers_count_what_they_do_not_factor(
    module: nn.Module, shape: Shape, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedleak.systems.system.EXACT_UNKNOWNS", 10)
    layer = check_layer(_drawn(module), shape)
    assert isinstance(layer, Affine)
    e = torch.ones(1, *layer.out_shape, dtype=torch.float64)
    assert layer.ranks(e, e > 0)[1] is False


def test_every_kind_is_in_the_list() -> None:
    own = {n for n in LAYERS if LAYERS[n].__module__.startswith("fedleak.")}
    assert own == {class_name(type(m)) for m, _ in KINDS}


# A stranger's layer: nn.Linear on every position of a sequence, in a package of its own.
_PACKAGE = '''
from torch import nn
from fedleak.systems import Affine

class Everywhere(nn.Linear):
    """A fully connected layer at each position, on inputs of (positions, features)."""

class Positions(Affine):
    def __init__(self, name, module, in_shape, out_shape):
        super().__init__(name, in_shape, out_shape, module.weight, module.bias)

    def patches(self, x):
        return x.mT.unsqueeze(1)

    def scatter(self, p):
        return p[:, 0].mT

    def split(self, z):
        return z.mT.unsqueeze(1)

    def join(self, p):
        return p[:, 0].mT
'''


@pytest.fixture
def everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[nn.Linear]]:
    """Install the package, and name its layer by an entry point."""
    (tmp_path / "positions.py").write_text(_PACKAGE)
    described = tmp_path / "positions-1.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: positions\nVersion: 1.0\n")
    (described / "entry_points.txt").write_text(
        "[fedleak.layers]\npositions.Everywhere = positions:Positions\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(LAYERS, "_points", None)
    monkeypatch.setattr(LAYERS, "_entries", dict(LAYERS._entries))
    yield importlib.import_module("positions").Everywhere
    sys.modules.pop("positions", None)


def _sequence(everywhere: type[nn.Linear], outputs: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(3, (1, 16)), nn.Flatten(1, 3), everywhere(16, outputs), nn.Tanh(),
        nn.Flatten(), nn.Linear(8 * outputs, 10),
    )  # fmt: skip


def _sequence_image() -> Tensor:
    return F.interpolate(photo_patches(1)[:, :1], size=(8, 16), mode="area")[0]


def test_a_foreign_layer_is_ranked_as_what_it_is(
    everywhere: type[nn.Linear], observe: Observe
) -> None:
    """Of 4 outputs at 8 positions ``rank(W) P + n rank(E) - rank(W) rank(E)`` is 80 of 128."""
    check_layer(everywhere(16, 4), (8, 16))
    model, image = _sequence(everywhere, 4), _sequence_image()
    layer = Chain.read(model, (1, 8, 16)).layers[2]
    assert LAYERS.package_of(class_name(everywhere)) == "positions"
    assert isinstance(layer, Affine)
    found = security_metric(model, (1, 8, 16)).layers[0]
    assert (found.kind, found.rank, found.deficiency, found.exact) == ("Positions", 80, -48, True)
    assert found.weight == 1.0
    (outcome,) = run_attack(HybridAttack(), [observe(model, image, 2)])
    assert outcome.reconstruction is not None
    (step,) = outcome.reconstruction.details["layers"]
    assert (step["rank"], step["unknowns"]) == (80, 128)
    assert outcome.reconstruction.details["by"] == "matching"  # the prior decides the rest


def test_a_foreign_layer_of_full_rank_is_solved(
    everywhere: type[nn.Linear], observe: Observe
) -> None:
    model, image = _sequence(everywhere, 16), _sequence_image()
    trials = laboratory.reconstruct(model, image[None], torch.tensor([2]), attack="linear")
    assert min(trials.psnr_db) > 90
    (step,) = trials.trials[0].reconstruction.details["layers"]
    assert step["rank"] == step["unknowns"] == 128


class _Lying(nn.Linear):
    """Read, in each test, as a layer that is wrong in one way."""


def _read_wrongly(monkeypatch: pytest.MonkeyPatch, everywhere: type, **wrong: object) -> None:
    positions = LAYERS[class_name(everywhere)]
    lying = type("Lying", (positions,), wrong)  # type: ignore[arg-type]
    monkeypatch.setitem(LAYERS._entries, class_name(_Lying), lying)


WRONG: dict[str, dict[str, object]] = {
    "forward": {"join": lambda self, p: p[:, 0].mT.flip(1)},
    "backward": {"scatter": lambda self, p: 2 * p[:, 0].mT},
    "gradients are of": {"gradients": lambda self, x, e: {}},
    "adjoint is not": {"adjoint": lambda self, rows, e: self.backward(e, e, rows.weight)},
    "says 128, exactly; it is 80": {"exact_rank": lambda self, e, known=None: self.unknowns},
    "counted_rank says 128": {"counted_rank": lambda self, e=None, known=None: self.unknowns},
    "ranks says 384": {"batch_rank": lambda self, e, known: len(e) * self.unknowns},
    "the weight rows": {"target": lambda self, z, gradient: Affine.target(self, z + 1, gradient)},
    "the Jacobian": {"jacobian": lambda self, x, z: 2 * Affine.jacobian(self, x, z)},
    "descend says is known": {
        "descend": lambda self, above, start: type(Affine.descend(self, above, start))(start)
    },
}


@pytest.mark.parametrize("words", WRONG)
def test_what_is_off_is_named(
    words: str, everywhere: type[nn.Linear], monkeypatch: pytest.MonkeyPatch
) -> None:
    _read_wrongly(monkeypatch, everywhere, **WRONG[words])
    torch.manual_seed(0)
    with pytest.raises(LayerCheckError, match=words):
        check_layer(_Lying(16, 4), (8, 16))


def test_what_cannot_be_checked() -> None:
    with pytest.raises(UnsupportedModelError, match=r"no layer reads torch\.nn\.GELU"):
        check_layer(nn.GELU(), (4,))
    with pytest.raises(InvalidInputError, match="cannot take inputs of shape"):
        check_layer(nn.Linear(4, 2), (5,))
    with pytest.raises(InvalidInputError, match="too many to check"):
        check_layer(nn.Tanh(), (3, 64, 64))


class _Cube(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x**3


class _NoWayBack(Layer):
    """A layer that says no more than it must."""

    def __init__(self, name: str, module: nn.Module, in_shape: Shape, out_shape: Shape):
        super().__init__(name, in_shape, out_shape)

    def forward(self, x: Tensor) -> Tensor:
        return x**3

    def backward(self, x: Tensor, z: Tensor, e: Tensor) -> Tensor:
        return 3 * e * x**2


def test_a_layer_without_a_way_back_is_refused_and_matched(
    observe: Observe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LAYERS._entries, class_name(_Cube), _NoWayBack)
    check_layer(_Cube(), (3, 4))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), _Cube(), nn.Flatten(), nn.Linear(8 * 36, 10))
    image = F.interpolate(photo_patches(1), size=(8, 8), mode="area")[0]
    seen = [observe(model, image, 1)]
    (refused,) = run_attack(LinearAttack(), seen)
    assert refused.reconstruction is None
    assert "layer '1' (_NoWayBack) does not say how its input follows" in refused.reason
    (matched,) = run_attack(HybridAttack(), seen)
    assert matched.reconstruction is not None
    assert "_NoWayBack" in matched.reconstruction.details["why_not_linear"]
    assert security_metric(model, (3, 8, 8)).layers[0].exact  # its Jacobian is dense, and small


def test_a_large_system_without_a_structure_is_refused(everywhere: type[nn.Linear]) -> None:
    model = nn.Sequential(
        nn.Flatten(1, 2), everywhere(64, 4), nn.Tanh(), nn.Flatten(), nn.Linear(3 * 64 * 4, 10)
    )
    with pytest.raises(UnsupportedModelError, match=r"'1' \(Positions\) has 12288 unknowns"):
        security_metric(model, (3, 64, 64))


@pytest.mark.parametrize("kind", ["group", "layer"])
def test_what_is_below_a_group_norm_is_matched_from_its_output(kind: str) -> None:
    """Each group hides two numbers, and all of them are found with the image."""
    torch.manual_seed(1)
    norms = {
        "group": (nn.GroupNorm(4, 12), nn.GroupNorm(4, 16)),
        "layer": (nn.LayerNorm((12, 8, 8)), nn.LayerNorm((16, 6, 6))),
    }[kind]
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), norms[0], nn.Tanh(), nn.Conv2d(12, 16, 3), norms[1],
        nn.Tanh(), nn.Flatten(), nn.Linear(16 * 36, 10),
    )  # fmt: skip
    image = F.interpolate(photo_patches(1), size=(8, 8), mode="area")
    trials = laboratory.reconstruct(model, image, torch.tensor([3]), attack="hybrid")
    (found,) = (t.reconstruction for t in trials.trials)
    assert found.details["lost"] == {"1": 1.0, "4": 1.0}
    assert found.details["by"] == "matching"
    assert min(trials.psnr_db) > 60
    assert found.fit < 1e-4


def test_running_statistics_of_instance_norm_are_refused() -> None:
    module = nn.InstanceNorm2d(2, track_running_stats=True)
    with pytest.raises(UnsupportedModelError, match="running statistics"):
        check_layer(module, (2, 3, 3))
