"""Modules as they are: every door attacks them, or refuses them by one sentence."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fedleak import laboratory
from fedleak.attacks import HybridAttack
from fedleak.capture.update import load_sent
from fedleak.client.probe import probe
from fedleak.commands.app import main
from fedleak.errors import FedleakError, InvalidUpdateError
from fedleak.metric.audit import audit
from fedleak.modules import renamed, unwrapped
from fedleak.observation import Observation
from fedleak.threat import LocalTraining

SHAPE = (1, 6, 6)
Factory = Callable[[], nn.Module]


def base(head: int = 5) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(96, head))


class Body(nn.Module):
    """A module around a chain; kinds of it return it in different ways."""

    def __init__(self, head: int = 5) -> None:
        super().__init__()
        self.body = base(head)

    def forward(self, x: Tensor) -> Any:
        return self.body(x)


class Named(Body):
    def forward(self, x: Tensor) -> Any:
        return {"logits": self.body(x), "hidden": x}


class LogSoftmax(Body):
    def forward(self, x: Tensor) -> Any:
        return F.log_softmax(self.body(x), dim=1)


class Unused(Body):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(3, 3)


class Two(Body):
    def forward(self, x: Tensor) -> Any:
        return self.body(x), x


class Squeezed(Body):
    def forward(self, x: Tensor) -> Any:
        return self.body(x).squeeze()


class Noisy(Body):
    def forward(self, x: Tensor) -> Any:
        return self.body(x + torch.randn_like(x))


class Detached(Body):
    def forward(self, x: Tensor) -> Any:
        return self.body(x).detach()


class OtherType(Body):
    def forward(self, x: Tensor) -> Any:
        out = torch.zeros(len(x), *SHAPE)
        return self.body(torch.cat([out, out]).float()[: len(x)] + x.float())


class TwoArguments(Body):
    def forward(self, x: Tensor, mask: Tensor) -> Any:
        return self.body(x * mask)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, padding=1)
        self.c = nn.Conv2d(4, 4, 3, padding=1)
        self.c.weight = self.b.weight
        self.head = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(self.b(self.a(x).tanh()).tanh()).flatten(1))


class ConvolutionAtTheEnd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).tanh()).mean((2, 3))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 8, 2, 2)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.patches(x).flatten(2).mT).mean(1))


def _changed(change: Callable[[nn.Module], Any]) -> Factory:
    """Return a factory of a chain whose first convolution is changed."""

    def make() -> nn.Module:
        model = base()
        made = change(model[0])
        if isinstance(made, nn.Module):
            model[0] = made
        return model

    return make


def _opacus() -> nn.Module:
    from opacus import GradSampleModule

    return GradSampleModule(base())


#: What is attacked, and whether layer by layer.
ATTACKED: dict[str, tuple[Factory, bool]] = {
    "plain": (base, True),
    "named logits": (Named, True),
    "log-softmax": (LogSoftmax, True),
    "log-softmax module": (lambda: nn.Sequential(*base(), nn.LogSoftmax(1)), True),
    "unused": (Unused, True),
    "data parallel": (lambda: nn.DataParallel(base()), True),
    "opacus": (_opacus, True),
    "half": (lambda: base().half(), True),
    "bfloat16": (lambda: base().bfloat16(), True),
    "double": (lambda: base().double(), True),
    "frozen": (_changed(lambda conv: conv.requires_grad_(False)), False),
    "tied": (Tied, False),
    "weight norm": (_changed(nn.utils.weight_norm), False),
    "weight norm, parametrised": (_changed(parametrizations.weight_norm), False),
    "spectral norm": (_changed(nn.utils.spectral_norm), False),
    "spectral norm, parametrised": (_changed(parametrizations.spectral_norm), False),
    "convolution at the end": (ConvolutionAtTheEnd, False),
    "attention": (Attention, False),
}

#: What is refused, and a word of the sentence.
REFUSED: dict[str, tuple[Factory, str]] = {
    "two outputs": (Two, "not a tuple of 2"),
    "squeezed": (Squeezed, "squeezes the batch away"),
    "noisy": (Noisy, "draws random numbers"),
    "dropout": (lambda: nn.Sequential(base(), nn.Dropout(0.5)).train(), "dropout"),
    "detached": (Detached, "depend on none of its trainable parameters"),
    "another type": (OtherType, "computes in another type"),
    "two arguments": (TwoArguments, "cannot take images"),
    "one output": (lambda: base(1), "the model has one output"),
    "all frozen": (lambda: base().requires_grad_(False), "no trainable parameters"),
    "lazy": (lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(5)), "lazy layer"),
    "scripted": (lambda: torch.jit.script(base()), "compiled by torch.jit"),
    "scripted inside": (lambda: nn.Sequential(torch.jit.script(base())), "compiled by torch.jit"),
    "no values": (lambda: base().to("meta"), "has no values"),
}


def _made(factory: Factory) -> nn.Module:
    torch.manual_seed(0)
    return factory()


def _image() -> Tensor:
    t = torch.linspace(0, 1, 6)
    return (0.5 + 0.3 * torch.sin(4 * t[:, None]) * torch.cos(3 * t))[None, None]


_LONG = ("attention", "tied")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in _LONG else n for n in ATTACKED]
)
def test_what_is_attacked(name: str) -> None:
    """In training mode too: no zoo member here has a layer that draws."""
    factory, chain = ATTACKED[name]
    attack = HybridAttack(steps=100)
    trials = laboratory.reconstruct(_made(factory), _image(), [3], attack)
    (trial,) = trials.trials
    assert trial.label_inferred == 3
    assert trial.reconstruction.details.get("why_not_linear") is None or not chain
    assert trial.reconstruction.fit < (0.05 if chain else 0.7)
    if chain:
        assert trial.quality.psnr_db > 30


@pytest.mark.parametrize("name", ["plain", "named logits", "frozen", "data parallel", "double"])
def test_the_audit_takes_them(name: str) -> None:
    found = audit(_made(ATTACKED[name][0]).eval(), SHAPE, references=1)
    assert found.prediction.psnr_db > 10


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_by_one_sentence_at_every_door(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from flwr.serverapp.strategy import FedAvg

    from strategies import MaliciousServer

    factory, words = REFUSED[name]
    model = _made(factory)
    doors: list[Callable[[], Any]] = [
        lambda: laboratory.reconstruct(model, _image(), [0]),
        lambda: Observation.from_gradient(model, {}, SHAPE),
        lambda: Observation.from_weights(model, {}, LocalTraining(0.1, 1), SHAPE),
        lambda: audit(model, SHAPE),
        lambda: MaliciousServer(FedAvg(), model, SHAPE),
    ]
    for door in doors:
        with pytest.raises(FedleakError, match=words) as caught:
            door()
        assert "\n" not in str(caught.value)
    if name == "dropout":
        return  # the command hands models over in evaluation mode
    from PIL import Image

    Image.new("L", (6, 6), 99).save(tmp_path / "a.png")
    monkeypatch.setattr("fedleak.models.build_model", lambda *given, **named: model)
    lines = (
        ["reconstruct", "--model", "x", "--images", str(tmp_path), "--channels", "1"],
        ["audit", "--model", "x", "--input-shape", "1,6,6"],
    )
    for line in lines:
        monkeypatch.setattr(sys, "argv", ["fedleak", *line, "--classes", "5"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        assert words in capsys.readouterr().err


def test_the_probe_changes_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 5))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.get_rng_state()
    probe(model, SHAPE)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training


def test_names_of_wrappers() -> None:
    state = base().state_dict()
    for prefix in ("module.", "_orig_mod.", "_module.", "_orig_mod.module."):
        wrapped = {prefix + k: v for k, v in state.items()}
        assert list(renamed(wrapped, state)) == list(state)
        assert list(renamed(state, wrapped)) == list(wrapped)
    assert renamed({"other.weight": 1}, state) == {"other.weight": 1}
    part = {"head.weight": 1, "head.bias": 2}  # of model.heads.state_dict()
    inside = [f"{name}.{leaf}" for name in ("body", "heads.head") for leaf in ("weight", "bias")]
    assert renamed(part, inside) == {"heads.head.weight": 1, "heads.head.bias": 2}
    assert renamed(part, [*inside, "b.head.weight", "b.head.bias"]) == part  # whose?
    assert renamed(part, ["heads.head.weight"]) == part
    both = {"module.a": 1, "_orig_mod.a": 2}
    assert renamed(both, ["a"]) == both  # two of one name: neither is taken


def test_prefixed_updates_and_states(tmp_path: Path) -> None:
    model = base()
    gradient = dict.fromkeys(model.state_dict())
    loss = F.cross_entropy(model(_image()), torch.tensor([3]))
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradient = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    plain = Observation.from_gradient(model, gradient, SHAPE)
    prefixed = {f"_orig_mod.{k}": v for k, v in gradient.items()}
    for wrapped in (model, nn.DataParallel(model)):
        seen = Observation.from_gradient(wrapped, prefixed, SHAPE)
        assert seen.model is model
        assert all(torch.equal(seen.gradient[k], v) for k, v in plain.gradient.items())
    sent = {f"module.{k}": v + 1 for k, v in model.state_dict().items()}
    loaded = load_sent(nn.DataParallel(base()), sent)
    assert torch.equal(loaded.state_dict()["3.bias"], model.state_dict()["3.bias"] + 1)


def test_a_part_of_the_state() -> None:
    """What is frozen stays the server's own; what it does not know, it says."""
    model = base()
    model[0].requires_grad_(False)
    head = {k: v + 1 for k, v in model.state_dict().items() if k.startswith("3.")}
    loaded = load_sent(base_frozen := model, head)
    assert torch.equal(loaded.state_dict()["0.weight"], base_frozen.state_dict()["0.weight"])
    with pytest.raises(InvalidUpdateError, match=r"'0.weight' is not sent \(1 more\).*frozen"):
        load_sent(base(), head)
    with pytest.raises(InvalidUpdateError, match="'extra' is not in the model"):
        load_sent(model, {**head, "extra": torch.ones(1)})


@pytest.mark.parametrize("shared", ["gradient", "weights"])
def test_what_is_declared_withheld_may_be_missing(shared: str) -> None:
    from fedleak.defences import parse_defence

    model, told = base(), parse_defence("withhold:3")
    loss = F.cross_entropy(model(_image()), torch.tensor([3]))
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradient = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    received = {k: g for k, g in gradient.items() if k.startswith("0.")}
    if shared == "gradient":
        seen = Observation.from_gradient(model, received, SHAPE, defence=told)
    else:
        state = model.state_dict()
        received = {k: state[k] - 0.1 * g for k, g in received.items()}
        seen = Observation.from_weights(model, received, LocalTraining(0.1, 1), SHAPE, defence=told)
    assert bool(seen.errors["3.weight"].isinf().all())
    assert not bool(seen.gradient["3.weight"].any())
    (result,) = HybridAttack(steps=50)([seen])
    assert int(result.labels) == 3
    with pytest.raises(InvalidUpdateError, match="defence 'withhold:3'"):
        Observation.from_gradient(model, {"0.weight": gradient["0.weight"],
                                          "0.bias": gradient["0.bias"]}, SHAPE)  # fmt: skip


def test_compiled_models_are_unwrapped() -> None:
    model = base()
    compiled = torch.compile(model)  # not run: nothing is compiled
    assert unwrapped(compiled) is model
    assert unwrapped(nn.DataParallel(compiled)) is model
