"""The client's step on any torch module, against torch itself."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedleak import laboratory
from fedleak.attacks.hybrid import HybridAttack
from fedleak.client.replay import Replay
from fedleak.errors import InvalidInputError, UnsupportedModelError
from fedleak.solvers import jacobian

SHAPE = (2, 6, 5)


class Residual(nn.Module):
    """A branch that is added back, then pooling and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.branch = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4 * 6, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        h = h + self.branch(h).tanh()
        return self.head(F.adaptive_avg_pool2d(h, (3, 2)).flatten(1))


def _normalised() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Sigmoid(), nn.Flatten(), nn.Linear(36, 5)
    )


def _headless() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 5, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _in_place() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.LeakyReLU(0.2, inplace=True), nn.InstanceNorm2d(4, affine=True),
        nn.Flatten(), nn.Linear(48, 7), nn.ELU(inplace=True), nn.Linear(7, 5, bias=False),
    )  # fmt: skip


def _counting() -> nn.Module:
    """Instance normalisation that counts along in place, as batch normalisation does."""
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.InstanceNorm2d(3, track_running_stats=True), nn.Tanh(),
        nn.Flatten(), nn.Linear(36, 5),
    )  # fmt: skip


MODELS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": _normalised,
    "residual": Residual,
    "headless": _headless,
    "in place": _in_place,
    "counting": _counting,
}


def _model(kind: str, train: bool) -> nn.Module:
    torch.manual_seed(3)
    model = MODELS[kind]()
    for module in model.modules():  # running statistics that are not those of a batch
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.uniform_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.train(train)


def _batch(count: int, batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(count, batch, *SHAPE, generator=generator, dtype=torch.float64)
    return images, torch.randint(5, (count, batch), generator=generator)


def _expected(model: nn.Module, images: Tensor, labels: Tensor) -> list[dict[str, Tensor]]:
    """Return each client's gradient by plain torch, on a copy of the model."""
    out = []
    for x, y in zip(images, labels, strict=True):
        own = copy.deepcopy(model).double()
        F.cross_entropy(own(x), y).backward()
        out.append({n: p.grad for n, p in own.named_parameters() if p.grad is not None})
    return out


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("kind", list(MODELS))
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("batch", [1, 4])
def test_gradients_are_those_of_torch(kind: str, train: bool, count: int, batch: int) -> None:
    """In float64, one client or several, and the model itself stays as it was."""
    model = _model(kind, train)
    before = copy.deepcopy(model.state_dict())
    images, labels = _batch(count, batch)
    expected = _expected(model, images, labels)
    replay = Replay(model, SHAPE)
    for _ in range(2):  # a first call changes nothing for the next
        made = replay(images, labels)
        assert set(made.gradients) == {n for n, _ in model.named_parameters()}
        for name, gradient in made.gradients.items():
            for n in range(count):
                torch.testing.assert_close(gradient[n], expected[n][name], atol=1e-12, rtol=1e-9)
    assert model.training == train
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
        assert value.dtype == before[name].dtype


@pytest.mark.parametrize("count", [1, 3])
def test_head_input(count: int) -> None:
    """What the last connected layer is given, and nothing where the output is none's."""
    model = _model("residual", False)
    images, labels = _batch(count, 2)
    replay = Replay(model, SHAPE)
    assert replay.head == "head"
    assert replay.classes == 5
    seen: list[Tensor] = []
    own = copy.deepcopy(model).double()
    assert isinstance(own, Residual)
    own.head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for x in images:
        own(x)
    found = replay(images, labels).head_input
    assert found is not None
    torch.testing.assert_close(found, torch.stack(seen))
    headless = Replay(_model("headless", False), SHAPE)
    assert headless.head is None
    assert headless(images, labels).head_input is None
    # A connected layer that something follows is no head.
    followed = nn.Sequential(nn.Flatten(), nn.Linear(60, 5), nn.Tanh())
    assert Replay(followed, SHAPE).head is None


def test_soft_labels_are_class_probabilities() -> None:
    model = _model("residual", False)
    images, labels = _batch(2, 3)
    replay = Replay(model, SHAPE)
    soft = F.one_hot(labels, 5).double()
    hard = replay(images, labels).gradients
    for name, gradient in replay(images, soft).gradients.items():
        torch.testing.assert_close(gradient, hard[name])


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.BatchNorm2d(2),
        lambda: nn.BatchNorm2d(2, affine=False),
        lambda: nn.InstanceNorm2d(2, affine=True),
        lambda: nn.InstanceNorm2d(2, track_running_stats=True),
        lambda: nn.GroupNorm(1, 2),
    ],
)
def test_differentiable_in_images(count: int, train: bool, norm: Callable[[], nn.Module]) -> None:
    """Numerically, through gradients and head input.

    Under vmap torch's own derivative of batch normalisation by statistics of the batch is
    wrong in the weight's gradient (2.15 and before).
    """
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 2), norm(), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)
    ).train(train)
    replay = Replay(model, (1, 3, 3))
    labels = torch.tensor([[0, 2], [1, 1]])[:count]

    def made(images: Tensor) -> tuple[Tensor, ...]:
        out = replay(images, labels)
        assert out.head_input is not None
        return (*out.gradients.values(), out.head_input)

    generator = torch.Generator().manual_seed(1)
    images = torch.rand(count, 2, 1, 3, 3, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(made, (images.requires_grad_(),), fast_mode=True)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("kind", ["residual", "headless"])
def test_jacobian_of_a_replay(count: int, kind: str) -> None:
    """By torch.func, also of a single client: against the rows of autograd."""
    replay = Replay(_model(kind, False), SHAPE)
    images, labels = _batch(count, 1)

    def made(x: Tensor) -> Tensor:
        out = replay(x.reshape(images.shape), labels)
        return torch.cat([g.flatten(1)[:, :3] for g in out.gradients.values()], 1)

    x = images.flatten(1)
    found = jacobian(made, x)
    reference = torch.autograd.functional.jacobian(made, x)
    assert isinstance(reference, Tensor)
    for n in range(count):
        torch.testing.assert_close(found[n], reference[n, :, n], atol=1e-11, rtol=1e-8)


@pytest.mark.parametrize("count", [1, 2])
def test_no_graph_is_kept_where_none_is_asked_for(count: int) -> None:
    """Images that need no gradient leave none behind: an attack's result is plain data."""
    replay = Replay(_model("residual", False), SHAPE)
    images, labels = _batch(count, 2)
    out = replay(images, labels)
    assert out.head_input is not None
    assert not any(g.requires_grad for g in (*out.gradients.values(), out.head_input))
    with torch.no_grad():
        assert not replay(images, labels).gradients["first.weight"].requires_grad


def test_frozen_and_unused_parameters() -> None:
    """Neither is attacked: a client has no gradient of them."""

    class Loose(Residual):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Parameter(torch.ones(2))

    model = Loose()
    model.first.bias.requires_grad_(False)  # type: ignore[union-attr]
    for count in (1, 2):
        images, labels = _batch(count, 1)
        made = Replay(model, SHAPE)(images, labels).gradients
        assert "first.bias" not in made
        assert "unused" not in made


@pytest.mark.parametrize("layer", [nn.Dropout(0.3), nn.Dropout2d(0.3), nn.AlphaDropout(0.3)])
def test_dropout_is_refused_in_training_only(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), layer, nn.Flatten(), nn.Linear(36, 5))
    with pytest.raises(UnsupportedModelError, match=r"layer '1': dropout with p=0.3"):
        Replay(model.train(), SHAPE)
    images, labels = _batch(2, 1)
    replay = Replay(model.eval(), SHAPE)
    first, second = (replay(images, labels).gradients["0.weight"] for _ in range(2))
    assert torch.equal(first, second)


def test_images_and_outputs_that_do_not_fit() -> None:
    with pytest.raises(InvalidInputError, match=r"cannot take images of shape \(3, 6, 5\)"):
        Replay(Residual(), (3, 6, 5))
    with pytest.raises(InvalidInputError, match=r"logits of shape .*not \(2, 3, 4, 3\)"):
        Replay(nn.Conv2d(2, 3, 3), SHAPE)

    class Two(Residual):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return super().forward(x), x

    with pytest.raises(InvalidInputError, match="not a tuple of 2"):
        Replay(Two(), SHAPE)


class Mobile(nn.Module):
    """Activations and squeezing as in mobile networks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.squeeze = nn.Conv2d(2, 4, 3), nn.Linear(4, 4)
        self.swish, self.gate = nn.Hardswish(inplace=True), nn.Hardsigmoid()
        self.head = nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.swish(5 * self.first(x))
        return self.head((h * self.gate(self.squeeze(h.mean((2, 3))))[..., None, None]).flatten(1))


def test_hard_activations_are_the_same_and_have_two_derivatives() -> None:
    torch.manual_seed(0)
    model = Mobile().double().eval()
    replay = Replay(model, SHAPE)
    images, labels = _batch(1, 2)
    images = 8 * images - 4  # beyond both ends of the linear part
    assert torch.allclose(replay.model(images[0]), model(images[0]), atol=1e-12)
    made = replay(images, labels).gradients
    loss = F.cross_entropy(model(images[0]), labels[0])
    for name, g in zip(made, torch.autograd.grad(loss, list(model.parameters())), strict=True):
        assert torch.allclose(made[name][0], g, atol=1e-12)
    assert isinstance(model.swish, nn.Hardswish)
    assert "forward" not in vars(model.swish)  # the user's own is left as it was

    def made_of(x: Tensor) -> Tensor:
        gradients = replay(x.reshape(1, *images.shape[1:]), labels).gradients
        return torch.cat([g.flatten(1) for g in gradients.values()], 1)

    rows = jacobian(made_of, images.reshape(1, -1))
    assert float(rows.abs().max()) > 0


@pytest.mark.slow
def test_hard_activations_can_be_attacked() -> None:
    torch.manual_seed(0)
    model, x = Mobile().eval(), torch.rand(1, *SHAPE)
    trials = laboratory.reconstruct(model, x, [3], HybridAttack(steps=60), labels_known=True)
    assert trials.trials[0].reconstruction.fit < 0.1
