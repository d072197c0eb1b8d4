"""Fishing by a gate: of a batch one image alone sends a gradient below the head."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fedleak import Observation, ThreatModel
from fedleak.attacks import make_attack
from fedleak.attacks.fished import FLAG, catch
from fedleak.errors import FedleakError, InvalidInputError, UnsupportedModelError
from fedleak.quality import score_batch
from fedleak.tampers import make_tamper
from fedleak.tampers.gate import Ending

SHAPE, BATCH = (1, 8, 8), 64


class Block(nn.Module):
    def __init__(self, given: int, made: int, stride: int, kernel: int = 3):
        super().__init__()
        self.conv1 = nn.Conv2d(given, made, 3, stride, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(made), nn.BatchNorm2d(made)
        self.conv2 = nn.Conv2d(made, made, kernel, 1, kernel // 2, bias=False)
        self.down = (
            nn.Sequential(nn.Conv2d(given, made, 1, stride, bias=False), nn.BatchNorm2d(made))
            if stride > 1
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.down(x)).relu()


class Net(nn.Module):
    def __init__(self, stride: int = 2, kernel: int = 3, width: int = 32):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        made = width * stride
        self.a, self.b = Block(width, made, stride), Block(made, made, 1, kernel)
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(made, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(self.bn(self.stem(x)).relu()))
        return self.fc(torch.flatten(self.pool(x), 1))


def net(seed: int = 0, **options: int) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = Net(**options).eval()
        for module in made.modules():  # as after some training
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.data.uniform_(0.5, 1.5)
                module.bias.data.normal_(0, 0.1)
    return made


def digits(first: int, count: int) -> tuple[Tensor, Tensor]:
    """Return digits on a background that is no ReLU's very edge."""
    data, generator = load_digits(), torch.Generator().manual_seed(first)
    images = torch.tensor(data.images[first : first + count] / 16, dtype=torch.float32)
    images = (
        0.05 + 0.9 * images.unsqueeze(1) + 0.05 * torch.rand(count, *SHAPE, generator=generator)
    )
    return images, torch.tensor(data.target[first : first + count])


def tampered(model: Net, images: int = BATCH, **options: object) -> tuple[Net, dict[str, Tensor]]:
    tamper = make_tamper("fishing", by="feature", public=digits(1000, 300)[0], **options)
    state = tamper.prepare(model, SHAPE, 1, 0, images)
    other = copy.deepcopy(model)
    other.load_state_dict(state)
    return other, state


def gradient(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    loss = F.cross_entropy(model(images), labels)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def features(model: Net, images: Tensor) -> Tensor:
    kept: list[Tensor] = []
    handle = model.pool.register_forward_hook(lambda m, i, o: kept.append(o.flatten(1)))
    model(images)
    handle.remove()
    return kept[0]


@pytest.mark.parametrize("stride", [2, 4, 8])  # 4x4, 2x2 and 1x1 positions before the head
def test_a_gate_is_open_or_closed_for_the_whole_image(stride: int) -> None:
    model = net(stride=stride, width=16)
    other, _ = tampered(model)
    images, _ = digits(0, 300)
    flag = features(other, images)[:, FLAG]
    assert set(flag.tolist()) == {0.0, 1.0}  # at all positions alike, exactly
    passed = flag > 0
    assert 3 <= int(passed.sum()) <= 60
    assert not features(other, images[~passed]).any()
    # Whoever passes is seen by the honest network, but for the channels of the gate.
    assert torch.isfinite(features(other, images[passed])).all()


def test_the_foremost_image_outshines_the_batch() -> None:
    model = net()
    other, _ = tampered(model)
    caught = 0
    for first in range(0, 640, BATCH):
        images, labels = digits(first, BATCH)
        step = gradient(other, images, labels)
        seen = Observation.from_gradient(other, step, SHAPE, BATCH, threat=ThreatModel(tamper=True))
        found = catch(seen)
        passed = features(other, images)[:, FLAG] > 0
        of_class = (passed & (labels == found.label)).nonzero().flatten()
        assert found.count == len(of_class)
        if found.update is None:
            continue
        caught += 1
        one = int(of_class[0])
        alone = gradient(copy.deepcopy(found.update.model).eval(), images[[one]], labels[[one]])
        for name, value in alone.items():
            if value.any():
                off = (found.update.gradient[name] - value).norm() / value.norm()
                assert float(off) < 1e-5, name
    assert caught >= 4  # of ten batches


def test_the_image_that_passed_comes_back_exactly() -> None:
    model = net(1)
    other, _ = tampered(model)
    for first in range(0, 640, BATCH):
        images, labels = digits(first, BATCH)
        step = gradient(other, images, labels)
        seen = Observation.from_gradient(other, step, SHAPE, BATCH, threat=ThreatModel(tamper=True))
        if catch(seen).update is not None:
            break
    (found,) = make_attack("fished")([seen])
    scored = [s for s in score_batch(found.images, found.labels, images, labels) if s.quality]
    assert len(scored) == 1
    assert scored[0].quality is not None
    assert scored[0].quality.psnr_db > 60
    assert scored[0].label == scored[0].label_inferred
    assert found.fit < 1e-3


def test_classes_take_turns_in_front() -> None:
    model = net()
    for server_round in (1, 4):
        tamper = make_tamper("fishing", public=digits(1000, 100)[0])  # auto: by feature
        state = tamper.prepare(model, SHAPE, server_round, 0, BATCH)
        sizes = state["fc.weight"].double().norm(dim=1)
        assert int(sizes.argmax()) == server_round - 1
        assert int((sizes == 0).sum()) == 1  # all images are taken for this one
        assert int(state["fc.bias"].argmax()) == int(sizes.argmin())


def test_an_update_that_cannot_be_is_refused() -> None:
    other, _ = tampered(net())
    images, labels = digits(0, BATCH)
    step = {k: 1.37 * g for k, g in gradient(other, images, labels).items()}
    seen = Observation.from_gradient(other, step, SHAPE, BATCH, threat=ThreatModel(tamper=True))
    with pytest.raises(FedleakError, match="passed the gate"):
        catch(seen)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (net(stride=2).train(), "in evaluation mode"),
        (net(kernel=5), "convolutions of 3x3"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), "two residual blocks"),
    ],
)
def test_a_model_that_does_not_allow_it_is_told_why(model: nn.Module, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        Ending.of(model, SHAPE)
    with pytest.raises(UnsupportedModelError, match=message):
        make_tamper("fishing", by="feature").prepare(model, SHAPE)
    if not isinstance(model, nn.Sequential):
        return
    assert make_tamper("fishing").prepare(model, SHAPE)["1.bias"].any()  # by class instead


def test_options_are_checked(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="by must be one of"):
        make_tamper("fishing", by="colour")
    assert make_tamper("fishing", public=tmp_path).needs == {"tamper", "public_images"}
    assert make_tamper("fishing").needs == {"tamper"}
