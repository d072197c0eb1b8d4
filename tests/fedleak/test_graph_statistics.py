"""Layers that are normalised by their own statistics: batch normalisation as clients train it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedleak import laboratory
from fedleak.graph.capture import Graph
from fedleak.graph.kinds import Kind
from fedleak.graph.knowledge import spread
from fedleak.graph.rules import RULES, own_statistics
from tests.conftest import photo_patches
from tests.fedleak.test_graph import residual, told, true_cotangent


def test_buffers_are_neither_read_nor_written() -> None:
    torch.manual_seed(0)
    model = residual().train().double()
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    before = {n: b.clone() for n, b in model.named_buffers()}
    graph = Graph.capture(model, (3, 16, 16), 2)
    assert sum(n.kind is Kind.NORMALISATION for n in graph.nodes.values()) == 8
    made = graph.run({graph.image: images}, [graph.logits])[graph.logits]
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    assert torch.allclose(made, model(images))


def grouped(width: int = 16) -> nn.Module:
    """The same with group normalisation."""
    model = residual(width)
    for block in model.modules():
        for name, module in list(block.named_children()):
            if isinstance(module, nn.BatchNorm2d):
                setattr(block, name, nn.GroupNorm(4, module.num_features))
    return model


def test_group_normalisation_in_a_graph_is_torchs() -> None:
    torch.manual_seed(0)
    model = grouped().double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    graph = Graph.capture(model, (3, 16, 16), 2)
    made = graph.run({graph.image: images}, [graph.logits])[graph.logits]
    assert torch.allclose(made, model(images))


@pytest.mark.parametrize(
    ("norm", "images", "least"), [("batch", 1, 20), ("batch", 2, 16), ("group", 2, 16)]
)
def test_what_is_known_in_training_mode_is_true(norm: str, images: int, least: int) -> None:
    torch.manual_seed(1)
    labels = [2, 3][:images]
    model = residual().train() if norm == "batch" else grouped(24)
    knowledge, values = told(model, photo_patches(images, 16), labels)
    spread(knowledge, RULES)
    logits = knowledge.cotangents[knowledge.graph.logits]
    truth = true_cotangent(knowledge, values, knowledge.graph.logits, labels)
    order = torch.cdist(logits.value, truth).argmin(1)
    assert sorted(order.tolist()) == list(range(images))
    found = {e: k for e, k in knowledge.values.items() if k.by != "the model"}
    assert len(found) >= least
    for edge, known in found.items():
        off = known.value - values[edge][order]
        off = off if known.mask is None else off[known.mask]
        assert off.square().mean().sqrt() <= 30 * known.error, (edge, known.by)
    for edge, known in knowledge.cotangents.items():
        if edge not in knowledge.graph.parameters:
            truth = true_cotangent(knowledge, values, edge, labels)[order]
            assert (known.value - truth).square().mean().sqrt() <= 30 * known.error, edge


@pytest.mark.parametrize("padding", [0, 1])
def test_an_image_comes_back_from_training_mode(padding: int) -> None:
    torch.manual_seed(1)
    image = photo_patches(2, 16)[1:]
    model = residual(24).train()
    model[0] = nn.Conv2d(3, 24, 4, 2, padding, bias=False)
    (trial,) = laboratory.reconstruct(model, image, [2]).trials
    # Without padding few taps see the pixels at the border, which the update leaves open.
    assert trial.quality.psnr_fitted_db > (80 if padding else 40)
    found = trial.reconstruction
    assert (found.details["by"], found.details["certified"]) == ("graph", True)
    assert "own statistics" in found.details["rules"]
    if padding:  # what is beyond the border is black: brightness is told
        assert trial.quality.psnr_db > 80
    else:
        assert "brightness" in found.details["notes"][0]
        assert 0 <= found.images.min() <= found.images.max() <= 1


def test_an_image_comes_back_from_group_normalisation() -> None:
    torch.manual_seed(1)
    image = photo_patches(2, 16)[1:]
    (trial,) = laboratory.reconstruct(grouped(24), image, [2]).trials
    assert trial.quality.psnr_db > 80
    assert trial.reconstruction.details["certified"]


def test_the_bias_below_mends_a_mask() -> None:
    """One equation for each channel: a unit on the wrong side of zero is flipped back."""
    torch.manual_seed(0)
    full = torch.randn(1, 6, 5, 5, dtype=torch.float64)
    slopes = (torch.rand(1, 6, 5, 5) > 0.5).double()
    off = -full[0, 2, 1, 1]  # it is active, the equation says it is not
    near = torch.zeros(1, 5, 5, dtype=torch.bool)
    near[0, 1, 1] = near[0, 3, 3] = True
    slopes[0, 2, 1, 1] = 1
    mended = own_statistics._mended(off, full[:, 2], slopes[:, 2], near, 1e-6)
    assert mended is not None
    assert mended[0, 1, 1] == 0
    assert int((mended != slopes[:, 2]).sum()) == 1
    assert own_statistics._mended(off + 1, full[:, 2], slopes[:, 2], near, 1e-6) is None


def test_scales_that_nothing_tells_are_refused() -> None:
    """Without an affine normalisation below there is no equation, and the rule stands still."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 4, 2, 1, bias=False), nn.BatchNorm2d(16, affine=False), nn.ReLU(),
        nn.Conv2d(16, 64, 3, 2, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    ).train()  # fmt: skip
    knowledge, _ = told(model, photo_patches(1, 16), [2])
    spread(knowledge, RULES)
    assert not [k for k in knowledge.values.values() if k.by == "own statistics"]
