"""Networks as graphs: what is known is true, on any of them, and the image follows from it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedleak import LocalTraining, laboratory
from fedleak.errors import UnsupportedModelError
from fedleak.graph.capture import Graph
from fedleak.graph.certificate import certify
from fedleak.graph.knowledge import Knowledge, Known, spread
from fedleak.graph.rules import RULES, bias_sums, gradient_rows, grouped_rows
from fedleak.graph.targets import BelowTargets, NearestTargets, parameter_gradients
from tests.conftest import photo_patches


class Block(nn.Module):
    """A residual block with batch normalisation."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out + self.shortcut(x))


def residual(width: int = 16) -> nn.Module:
    """Two stages, average pooling and a head: ResNet-18's way, in small."""
    model = nn.Sequential(
        nn.Conv2d(3, width, 4, 2, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        Block(width, width),
        Block(width, 4 * width, 2),
        Block(4 * width, 4 * width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, 10),
    )
    return model.eval()


def told(model: nn.Module, images: Tensor, labels: list[int]) -> tuple[Knowledge, dict]:
    """Return what an update tells before any rule, and the truth of every edge."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    loss = F.cross_entropy(model(images), torch.tensor(labels))
    gradient = torch.autograd.grad(loss, parameters)
    sent = {n: g.double() for n, g in zip(names, gradient, strict=True)}
    graph = Graph.capture(model, tuple(images.shape[1:]), len(images))
    return Knowledge(graph, sent), graph.run({graph.image: images.double()}, list(graph.nodes))


def true_cotangent(knowledge: Knowledge, values: dict, edge: str, labels: list[int]) -> Tensor:
    graph = knowledge.graph
    at = values[edge].clone().requires_grad_()
    known = {graph.image: values[graph.image], edge: at}
    logits = graph.run(known, [graph.logits])[graph.logits]
    return torch.autograd.grad(F.cross_entropy(logits, torch.tensor(labels)), at)[0]


NETWORKS = {
    "residual": residual,
    "pooled": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 10),
    ),
    "leaky": lambda: nn.Sequential(
        nn.Conv2d(3, 12, 3, 2, 1), nn.LeakyReLU(0.1), nn.Conv2d(12, 24, 3, 2, 1), nn.LeakyReLU(0.1),
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(96, 20), nn.Tanh(), nn.Linear(20, 10),
    ),
    "grouped": lambda: nn.Sequential(
        nn.Conv2d(3, 12, 4, 4), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.ReLU6(),
        nn.Conv2d(12, 24, 1), nn.ReLU(), nn.Flatten(), nn.Linear(384, 10),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_known_is_true(name: str) -> None:
    torch.manual_seed(3)
    model = NETWORKS[name]()
    knowledge, values = told(model, photo_patches(1, 16), [4])
    spread(knowledge, RULES)
    found = {e: k for e, k in knowledge.values.items() if k.by != "the model"}
    assert len(found) > 2
    for edge, known in found.items():
        off = known.value - values[edge]
        off = off if known.mask is None else off[known.mask]
        assert off.square().mean().sqrt() <= 30 * known.error, (edge, known.by)
    for edge, known in knowledge.cotangents.items():
        if edge not in knowledge.graph.parameters and edge in values:
            truth = true_cotangent(knowledge, values, edge, [4])
            assert (known.value - truth).square().mean().sqrt() <= 30 * known.error, edge


def test_a_graph_is_the_module() -> None:
    torch.manual_seed(0)
    model = residual().double()
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    graph = Graph.capture(model, (3, 16, 16), 2)
    assert torch.allclose(
        graph.run({graph.image: images}, [graph.logits])[graph.logits], model(images)
    )
    assert {n.kind.value for n in graph.nodes.values()} == {
        "image", "convolution", "scale", "pointwise", "add", "reshape", "linear", "dense",
    }  # fmt: skip


def test_a_module_without_a_fixed_graph_is_refused_by_name() -> None:
    class Twofold(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(12, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.flatten(1)) if x.sum() > 0 else self.fc(-x.flatten(1))

    with pytest.raises(UnsupportedModelError, match="Twofold cannot be captured"):
        Graph.capture(Twofold(), (3, 2, 2))


def test_a_residual_network_is_solved_from_one_update() -> None:
    torch.manual_seed(1)
    image = photo_patches(2, 16)[1:]
    (trial,) = laboratory.reconstruct(residual(), image, [2]).trials
    assert trial.quality.psnr_db > 100
    details = trial.reconstruction.details
    assert (details["by"], details["certified"], details["missed"]) == ("graph", True, {})
    assert {"blind convolution", "gradient rows"} <= set(details["rules"])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_images_that_clients_normalise_come_back_as_images(mode: str) -> None:
    torch.manual_seed(1)
    image = photo_patches(2, 16)[1:]
    client = LocalTraining(reply="gradient", mean=(0.5, 0.4, 0.45), std=(0.2,), norm=mode)
    (trial,) = laboratory.reconstruct(residual(24), image, [2], training=client).trials
    assert trial.quality.psnr_db > 80
    assert trial.reconstruction.details["by"] == "graph"


@pytest.mark.parametrize("without", ["nothing", "bias sums"])
def test_a_wrong_mask_is_mended_before_anything_below(without: str) -> None:
    torch.manual_seed(1)
    knowledge, values = told(residual(), photo_patches(1, 16), [2])
    block = "_4_relu_1"  # the output of the block before the last
    spread(knowledge, RULES)
    slopes = (values[block] > 0).double()
    wrong, least = slopes.clone(), values[block][values[block] > 0].min()
    wrong[values[block] == least] = 0
    knowledge.slopes[block] = wrong
    knowledge.values[block] = replace(knowledge.values[block], deviation=least / 4)
    knowledge.forget_below(knowledge.graph.nodes[block])
    knowledge.weighed.discard(block)
    for edge in knowledge.graph.below(block):
        knowledge.values.pop(edge, None)
    spread(knowledge, {k: r for k, r in RULES.items() if k != without})
    assert torch.equal(knowledge.slopes[block], slopes)
    assert knowledge.value("_3_relu_1") is not None


def test_a_unit_within_rounding_of_zero_does_not_cost_the_certificate() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU6(),
        nn.Flatten(), nn.Linear(288, 10),
    ).double()  # fmt: skip
    image, label = torch.rand(1, 3, 10, 10, dtype=torch.float64), torch.tensor([4])

    def gradient() -> dict[str, Tensor]:
        parameters = dict(model.named_parameters())
        loss = F.cross_entropy(model(image), label)
        made = torch.autograd.grad(loss, list(parameters.values()))
        return dict(zip(parameters, made, strict=True))

    with torch.no_grad():  # one unit lies at zero, on this side here and on that for the client
        model[2].bias[3] -= model[:3](image)[0, 3, 2, 4] - 1e-9
    here = gradient()
    with torch.no_grad():
        model[2].bias[3] -= 2e-9
    client = gradient()
    knowledge = Knowledge(Graph.capture(model, (3, 10, 10)), client)
    spread(knowledge, {"head": RULES["head"]})
    knowledge.values[knowledge.graph.image] = Known(image, 0.0, "told")
    assert certify(knowledge, here, {}).missed.keys() >= {"0.weight", "2.bias"}
    assert certify(knowledge, here, {}, image).certified
    assert not certify(knowledge, here, {}, image.flip(3)).certified


def test_the_error_of_an_observation_is_carried_along() -> None:
    torch.manual_seed(1)
    exact, values = told(residual(), photo_patches(1, 16), [2])
    sizes = {n: 1e-5 * float(g.square().mean().sqrt()) for n, g in exact.gradient.items()}
    noisy = {n: g + sizes[n] * torch.randn_like(g) for n, g in exact.gradient.items()}
    blocks = "_4_relu_1", "_3_relu_1"
    knowledge = Knowledge(exact.graph, noisy, sizes)
    spread(knowledge, RULES)
    for edge in blocks:
        known = knowledge.values[edge]
        off = (known.value - values[edge]).square().mean().sqrt()
        assert off <= 30 * known.error
        assert known.relative < 1e-2


@st.composite
def layers(draw: st.DrawFn) -> tuple[nn.Conv2d, int]:
    kernel, stride = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    padding, dilation = draw(st.integers(0, 1)), draw(st.integers(1, 2))
    conv = nn.Conv2d(
        draw(st.integers(1, 3)), draw(st.integers(20, 40)), kernel, stride, padding, dilation
    )
    return conv, draw(st.integers(5, 7))


@given(layers(), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_gradient_rows_against_a_dense_oracle(drawn: tuple[nn.Conv2d, int], seed: int) -> None:
    """They find the input where, and only where, the dense system of all rows has full rank."""
    conv, size = drawn
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Identity(), conv, nn.Flatten()).double()
    x = torch.randn(1, conv.in_channels, size, size, dtype=torch.float64)
    graph = Graph.capture(model, tuple(x.shape[1:]))
    node = graph.nodes["_1"]
    e = torch.randn(node.shape, dtype=torch.float64)
    sent = parameter_gradients(graph, node, x, e)
    knowledge = Knowledge(graph, sent)
    knowledge.learn_cotangent("_1", Known(e, 1e-12, "told"))
    gradient_rows.apply(knowledge)
    found = knowledge.value("_0")
    rows = torch.func.jacrev(lambda v: parameter_gradients(graph, node, v, e)["1.weight"])(x)
    dense = rows.reshape(-1, x.numel())
    values = torch.linalg.svdvals(dense)
    full = len(dense) >= x.numel() and values[-1] > 1e-9 * values[0]
    if not full:
        assert found is None
        assert "1" in knowledge.short["_1"]
    elif values[-1] > 1e-3 * values[0]:
        assert found is not None
        assert torch.allclose(found, x, atol=1e-6)


def test_targets_are_what_is_nearest_to_the_image() -> None:
    torch.manual_seed(3)
    knowledge, values = told(NETWORKS["pooled"](), photo_patches(1, 16), [4])
    spread(knowledge, RULES)
    for targets in (NearestTargets(knowledge), BelowTargets(knowledge)):
        made = targets.made(values[knowledge.graph.image])
        assert (made - targets.values).abs().max() < 1e-3
    assert all(edge not in knowledge.graph.below(edge) for edge in targets.edges)


def depthwise(width: int = 12) -> nn.Module:
    """Expansion, depthwise and projection, as MobileNetV2's blocks, at a few positions."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 4, 4), nn.ReLU(), nn.Conv2d(16, 6 * width, 1, bias=False),
        nn.BatchNorm2d(6 * width), nn.ReLU6(),
        nn.Conv2d(6 * width, 6 * width, 3, 1, 1, groups=6 * width, bias=False),
        nn.BatchNorm2d(6 * width), nn.ReLU6(), nn.Conv2d(6 * width, width, 1, bias=False),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 5),
    ).eval()  # fmt: skip


def test_what_arrives_at_idle_depthwise_channels_is_not_needed_below() -> None:
    torch.manual_seed(2)
    knowledge, values = told(depthwise(), photo_patches(1, 8), [2])
    spread(knowledge, RULES)
    assert knowledge.values["_1"].by == "gradient rows"
    for edge in ("_1", "_4", "_7"):
        assert torch.allclose(knowledge.values[edge].value, values[edge], atol=1e-5), edge
    assert "_5" in {*knowledge.short, *knowledge.checked}


@st.composite
def grouped(draw: st.DrawFn) -> tuple[nn.Conv2d, int, int]:
    groups, kernel = draw(st.integers(2, 4)), draw(st.integers(1, 3))
    own, out = draw(st.integers(1, 2)), draw(st.integers(1, 8))
    stride, padding = draw(st.integers(1, 2)), draw(st.integers(0, 1))
    conv = nn.Conv2d(own * groups, out * groups, kernel, stride, padding, groups=groups, bias=False)
    return conv, draw(st.integers(3, 4)), draw(st.integers(1, 2))


@given(grouped(), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_grouped_rows_against_a_dense_oracle(drawn: tuple[nn.Conv2d, int, int], seed: int) -> None:
    """They find exactly the entries that the dense system of all rows determines."""
    conv, size, batch = drawn
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Identity(), conv, nn.Flatten()).double()
    x = torch.randn(batch, conv.in_channels, size, size, dtype=torch.float64)
    graph = Graph.capture(model, tuple(x.shape[1:]), batch)
    node = graph.nodes["_1"]
    e = torch.randn(node.shape, dtype=torch.float64)
    e[:, 0] = 0  # a channel whose units are all inactive
    knowledge = Knowledge(graph, parameter_gradients(graph, node, x, e))
    knowledge.learn_cotangent("_1", Known(e, 1e-12, "told"))
    grouped_rows.apply(knowledge)
    found = knowledge.values.get("_0")
    rows = torch.func.jacrev(lambda v: parameter_gradients(graph, node, v, e)["1.weight"])(x)
    _, s, vh = torch.linalg.svd(rows.reshape(-1, x.numel()))
    rank = int((s > 1e-9 * s[0]).sum()) if len(s) else 0
    told_ = (vh[rank:].square().sum(0) < 1e-9).reshape(x.shape)
    if rank and s[rank - 1] < 1e-3 * s[0]:
        return
    if found is None:
        assert not told_.any()
    else:
        mask = torch.ones_like(told_) if found.mask is None else found.mask
        assert torch.equal(mask, told_)
        assert torch.allclose(found.value[mask], x[mask], atol=1e-6)


def test_a_bias_below_tells_which_unit_is_on_the_wrong_side() -> None:
    change = torch.tensor([0.5, -0.3, 0.2, 0.7], dtype=torch.float64)
    assert bias_sums._turned(change, 0.2, 1e-9).tolist() == [False, False, True, False]
    assert bias_sums._turned(change, 1.2, 1e-9).tolist() == [True, False, False, True]
    assert bias_sums._turned(change, 0.1, 1e-9) is None
    assert bias_sums._turned(change, 0.9, 1e-9) is None  # two ways


def test_what_a_model_changes_in_place_is_read_or_refused() -> None:
    class Block(nn.Module):
        def __init__(self, again: bool) -> None:
            super().__init__()
            self.conv, self.fc, self.again = nn.Conv2d(3, 4, 3), nn.Linear(144, 5), again

        def forward(self, x: Tensor) -> Tensor:
            made = self.conv(x)
            out = F.relu(made, inplace=True)
            return self.fc((out + made if self.again else out).flatten(1))

    torch.manual_seed(0)
    images = torch.rand(1, 3, 8, 8, dtype=torch.float64)
    graph = Graph.capture(Block(again=False), (3, 8, 8))
    values = graph.run({graph.image: images}, list(graph.nodes))
    assert (values["conv"] < 0).any()
    with pytest.raises(UnsupportedModelError, match="in place"):
        Graph.capture(Block(again=True), (3, 8, 8))
