"""Batches on a graph: labels unknown, mixtures resolved."""

from __future__ import annotations

import pytest
import torch

from fedleak import laboratory
from fedleak.graph.knowledge import spread
from fedleak.graph.rules import RULES
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
