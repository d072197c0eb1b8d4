"""Predicted PSNR, attribution and advice against explicit matrices, and their invariances."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedleak.client.replay import Gradients
from fedleak.metric.adviser import advise
from fedleak.metric.attribution import LEVEL, attribute, information
from fedleak.metric.groups import group_layers
from fedleak.metric.prediction import natural_prior, predict
from fedleak.metric.redesign import change, redesign
from fedleak.metric.reference import Reference, make_references

SHAPE = (2, 6, 6)
#: Drawn once: synthetic images take longer to draw than to judge.
IMAGES = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(1))


def tiny(seed: int = 0, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    """Return a convolution, a fully connected layer and a head."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(2, 4, 3, 2), activation(), nn.Flatten(), nn.Linear(16, 8), activation(),
            nn.Linear(8, 5),
        ).eval()  # fmt: skip


def dense_jacobian(reference: Reference) -> dict[str, Tensor]:
    """Return the derivative of each parameter's gradient by the images, by autograd alone."""
    model = reference.jacobian.replay.model
    names, parameters = zip(*model.named_parameters(), strict=True)
    parameters = tuple(p.detach().requires_grad_() for p in parameters)

    def gradient(x: Tensor) -> tuple[Tensor, ...]:
        logits = torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (x,))
        loss = nn.functional.cross_entropy(logits, reference.jacobian.labels)
        return torch.autograd.grad(loss, parameters, create_graph=True)

    made = torch.autograd.functional.jacobian(gradient, reference.jacobian.images)
    return {
        name: rows.reshape(p.numel(), -1)
        for name, p, rows in zip(names, parameters, made, strict=True)
    }


def explicit_db(rows: dict[str, Tensor], errors: Gradients, batch: int) -> float:
    """Return the predicted PSNR from ``(S^-1 + J^T N^-1 J)^-1`` itself."""
    covariance = natural_prior(SHAPE).dense().covariance
    precision = torch.block_diag(*[torch.linalg.inv(covariance)] * batch)
    for name, j in rows.items():
        weight = errors[name].expand(len(j)) if errors[name].dim() == 0 else errors[name].flatten()
        precision = precision + j.T @ (j / weight.square()[:, None])
    variance = torch.linalg.inv(precision).diagonal().unflatten(0, (batch, -1))
    return -10 * float(variance.mean(1).log10().mean())


def predicted(model: nn.Module, defence: str = "none", batch: int = 1) -> float:
    found = make_references(model, SHAPE, batch, defence, IMAGES, count=1)
    return predict(found, natural_prior(SHAPE)).psnr_db


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("defence", ["noise:0.1", "prune:0.7+noise:0.01", "withhold:3+noise:0.03"])
def test_prediction_is_that_of_the_explicit_inverse(defence: str, batch: int) -> None:
    (reference,) = make_references(tiny(), SHAPE, batch, defence, count=1)
    expected = explicit_db(dense_jacobian(reference), reference.errors, batch)
    found = predict([reference], natural_prior(SHAPE))
    assert found.psnr_db == pytest.approx(expected, abs=1e-4)
    assert found.unknowns == batch * 72
    assert found.psnr_db > 12.5


def test_attribution_is_that_of_the_explicit_inverse() -> None:
    (reference,) = make_references(tiny(), SHAPE, count=1)
    factor = natural_prior(SHAPE).dense().factor
    found = attribute(reference, factor, reference.blocks())
    rows = dense_jacobian(reference)
    sizes = {k: g.square().mean().sqrt() for k, g in reference.jacobian.gradient.items()}
    floor = {k: LEVEL * s for k, s in sizes.items()}
    assert found.psnr_db == pytest.approx(explicit_db(rows, floor, 1), abs=1e-3)
    assert [x.name for x in found.layers] == ["0", "3", "5"]
    assert [x.entries for x in found.layers] == [76, 136, 45]
    for leak in found.layers:
        mine = {k: leak.name == k.partition(".")[0] for k in rows}
        withheld = {k: torch.tensor(math.inf) if mine[k] else e for k, e in floor.items()}
        alone = {k: e if mine[k] else torch.tensor(math.inf) for k, e in floor.items()}
        noised = {k: 0.1 * sizes[k] if mine[k] else e for k, e in floor.items()}
        lost = found.psnr_db - explicit_db(rows, withheld, 1)
        assert leak.withheld_db == pytest.approx(lost, abs=1e-3)
        assert leak.alone_db == pytest.approx(explicit_db(rows, alone, 1), abs=1e-3)
        lost = found.psnr_db - explicit_db(rows, noised, 1)
        assert leak.noised_db == pytest.approx(lost, abs=1e-2)
        assert leak.pruned_db is not None
        assert 0 <= leak.pruned_db <= leak.withheld_db + 1e-6
        assert leak.noised_db <= leak.withheld_db + 1e-6


@pytest.mark.parametrize("defence", ["noise:0.1", "prune:0.9", "quantise:4", "withhold:3"])
def test_attribution_starts_from_the_defence(defence: str) -> None:
    (reference,) = make_references(tiny(), SHAPE, 1, defence, IMAGES, count=1)
    prior = natural_prior(SHAPE)
    blocks = reference.blocks()
    found = attribute(reference, prior.dense().factor, blocks)
    whole = predict([reference], prior, [blocks]).psnr_db
    # At errors far above the floor, the floor changes nothing.
    assert found.psnr_db <= whole + 1e-6
    if defence != "withhold:3":
        assert found.psnr_db == pytest.approx(whole, abs=0.2)
    else:
        leak = found.layers[1]
        assert (leak.withheld_db, leak.noised_db, leak.alone_db) == (0.0, 0.0, found.nothing_db)


@settings(deadline=None, max_examples=12)
@given(seed=st.integers(0, 1000), strength=st.floats(1e-4, 1.0), step=st.floats(1.3, 10.0))
def test_prediction_falls_with_noise(seed: int, strength: float, step: float) -> None:
    model = tiny(seed)
    weak, strong = (predicted(model, f"noise:{s}") for s in (strength, strength * step))
    assert strong < weak


@settings(deadline=None, max_examples=12)
@given(
    seed=st.integers(0, 1000),
    share=st.floats(0.0, 0.9),
    step=st.floats(0.0, 1.0),
    batch=st.integers(1, 2),
)
def test_prediction_falls_with_pruning(seed: int, share: float, step: float, batch: int) -> None:
    model = tiny(seed)
    more = share + step * (0.999 - share)
    few, many = (predicted(model, f"prune:{s}", batch) for s in (share, more))
    assert many <= few + 1e-6


@settings(deadline=None, max_examples=8)
@given(order=st.permutations(range(4)), defence=st.sampled_from(["none", "prune:0.6"]))
def test_order_of_filters_changes_nothing(order: list[int], defence: str) -> None:
    model = tiny()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight.copy_(model[0].weight[order])
        other[0].bias.copy_(model[0].bias[order])
        columns = torch.arange(16).reshape(4, 4)[order].flatten()
        other[3].weight.copy_(model[3].weight[:, columns])
    assert predicted(other, defence) == pytest.approx(predicted(model, defence), abs=0.01)


@settings(deadline=None, max_examples=8)
@given(
    scale=st.sampled_from([0.125, 0.5, 4.0, 64.0]),
    defence=st.sampled_from(["none", "prune:0.6", "noise:0.1"]),
)
def test_scale_that_the_next_layer_takes_back_changes_nothing(scale: float, defence: str) -> None:
    """Every gradient's error is in proportion to it, and ReLU passes a factor on."""
    model = tiny(activation=nn.ReLU)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight.mul_(scale)
        other[0].bias.mul_(scale)
        other[3].weight.div_(scale)
    assert predicted(other, defence) == pytest.approx(predicted(model, defence), abs=0.01)


def test_prediction_of_a_batch_is_below_that_of_its_images() -> None:
    model = tiny()
    assert predicted(model, "noise:0.01", 2) < predicted(model, "noise:0.01")


def test_groups_are_neighbours_with_common_names() -> None:
    names = [f"block{b}.{i}.weight" for b in range(4) for i in range(3)] + ["head.weight"]
    found = group_layers(names, 5)
    assert [g.name for g in found] == ["block0", "block1", "block2", "block3", "head"]
    assert found[0].parameters == tuple(names[:3])
    (single,) = group_layers(names, 1)
    assert single.modules == ("block0", "block1", "block2", "block3", "head")
    flat = group_layers([f"{i}.weight" for i in range(20)], 12)
    assert len(flat) == 12
    assert [p for g in flat for p in g.parameters] == [f"{i}.weight" for i in range(20)]
    assert flat[0].name == "0"
    # The module's name would name the layers below it, too.
    below = group_layers(["encoder.position", "encoder.layer.weight", "encoder.layer.bias"], 12)
    assert [g.name for g in below] == ["encoder.position", "encoder.layer"]


@pytest.mark.parametrize("defence", ["none", "noise:0.01", "prune:0.5"])
def test_advice_holds_when_it_is_taken(defence: str) -> None:
    target = 15.0
    (reference,) = make_references(tiny(), SHAPE, 1, defence, IMAGES, count=1)
    factor = natural_prior(SHAPE).dense().factor
    blocks = reference.blocks()
    told = information(reference, factor, blocks)
    found = advise(reference, factor, blocks, told, target)
    assert [a.kind for a in found] == ["withhold", "prune", "noise"]
    for advice in found:
        assert advice.reached == (advice.predicted_psnr_db < target)
        assert advice.defence is not None
        if defence == "none":
            taken = predicted(tiny(), advice.defence)
            # Noise is drawn: what is received is not quite of the size that is predicted.
            near = 0.3 if advice.kind == "noise" else 0.02
            assert taken == pytest.approx(advice.predicted_psnr_db, abs=near)
    withheld, _, noise = found
    if defence == "noise:0.01":
        taken = predicted(tiny(), f"noise:{math.hypot(0.01, float(noise.strength))}")
        assert taken == pytest.approx(noise.predicted_psnr_db, abs=0.3)
    assert noise.reached
    assert "still sent" in withheld.cost


def test_redesign_widens_the_stride() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Tanh(), nn.Conv2d(6, 4, 3, padding=1),
        nn.Tanh(), nn.Flatten(), nn.Linear(144, 5),
    ).eval()  # fmt: skip
    before = {k: v.clone() for k, v in model.state_dict().items()}
    wider = change(model, "0", "stride", 2, SHAPE, seed=3)
    assert wider[6].in_features == 36
    assert not wider[1].training
    assert torch.equal(change(model, "0", "stride", 2, SHAPE, seed=3)[6].weight, wider[6].weight)
    fewer = change(model, "0", "filters", 3, SHAPE)
    assert (fewer[1].num_features, fewer[3].in_channels) == (3, 3)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    def linearised(network: nn.Module) -> list[Reference]:
        return make_references(network, SHAPE, images=IMAGES, count=1)

    found = redesign(model, SHAPE, natural_prior(SHAPE), 40.0, linearised)
    assert {a.kind for a in found} == {"stride", "filters"}
    assert all(a.defence is None and "anew" in a.cost for a in found)


def test_residual_networks_are_not_redesigned() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch = nn.Conv2d(2, 2, 3, padding=1)
            self.head = nn.Linear(72, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((x + self.branch(x).tanh()).flatten(1))

    def linearised(network: nn.Module) -> list[Reference]:
        return make_references(network, SHAPE, images=IMAGES, count=1)

    found = redesign(Residual(), SHAPE, natural_prior(SHAPE), 1.0, linearised)
    # One filter is broadcast over both channels; no stride fits.
    assert [a.kind for a in found] == ["filters"]
