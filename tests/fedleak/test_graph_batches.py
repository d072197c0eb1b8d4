"""Batches on a graph: labels unknown, mixtures resolved."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedleak import laboratory
from fedleak.graph.knowledge import Known, spread
from fedleak.graph.rules import RULES
from fedleak.graph.targets import NearestTargets
from tests.conftest import photo_patches
from tests.fedleak.test_graph import residual, told, true_cotangent

LABELS = [2, 2]


@pytest.mark.slow
def test_of_a_batch_what_is_known_is_true() -> None:
    torch.manual_seed(1)
    knowledge, values = told(residual(), photo_patches(2, 16), LABELS)
    spread(knowledge, RULES)
    logits = knowledge.cotangents[knowledge.graph.logits]
    assert logits.by == "batch"
    truth = true_cotangent(knowledge, values, knowledge.graph.logits, LABELS)
    order = torch.cdist(logits.value, truth).argmin(1)
    assert sorted(order.tolist()) == [0, 1]
    found = {e: k for e, k in knowledge.values.items() if k.by != "the model"}
    assert len(found) > 5
    for edge, known in found.items():
        off = known.value - values[edge][order]
        off = off if known.mask is None else off[known.mask]
        assert off.square().mean().sqrt() <= 30 * known.error, (edge, known.by)


@pytest.mark.slow
def test_two_images_of_one_label_come_back() -> None:
    torch.manual_seed(1)
    images = photo_patches(2, 16)
    trials = laboratory.reconstruct(residual(), images, LABELS, batch_size=2)
    assert min(t.quality.psnr_db for t in trials.trials) > 40
    details = trials.trials[0].reconstruction.details
    assert details["by"] == "graph"


def test_a_chain_with_flat_layers_gives_back_its_batch_from_the_demixed_head() -> None:
    torch.manual_seed(2)
    model = nn.Sequential(
        nn.Conv2d(3, 24, 3, 2, 1), nn.ReLU(), nn.Conv2d(24, 48, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(48 * 9, 10),
    )  # fmt: skip
    trials = laboratory.reconstruct(model, photo_patches(2, 6), [7, 2], batch_size=2).trials
    details = trials[0].reconstruction.details
    assert (details["by"], details["certified"]) == ("graph", True)
    assert details["head"]["trusted"] == [True, True]
    assert min(t.quality.psnr_db for t in trials) > 80
    assert [t.label_inferred for t in trials] == [7, 2]


@pytest.mark.parametrize("normalised", [False, True])
def test_images_are_matched_apart_where_nothing_couples_them(normalised: bool) -> None:
    torch.manual_seed(0)
    between = nn.BatchNorm2d(4) if normalised else nn.Softplus()
    model = nn.Sequential(nn.Conv2d(3, 4, 3), between, nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    knowledge, values = told(model, photo_patches(3, 8), [0, 1, 2])
    edge = knowledge.graph.nodes[knowledge.graph.logits].inputs[0]
    knowledge.learn_value(edge, Known(values[edge], 1e-6, "test"))
    targets = NearestTargets(knowledge, rows=False)
    assert targets.apart is not normalised
    images = values[knowledge.graph.image]
    changed = torch.cat([images[:1].flip(3), images[1:]])
    off = (targets.made(changed) - targets.values).abs().amax(1) > 1e-6
    assert off.tolist() == ([True] if normalised else [True, False, False])
