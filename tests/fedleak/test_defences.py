"""Defences: pure, seeded, of the stated strength."""

from __future__ import annotations

import pytest
import torch

from fedleak.defences import DEFENCES, DefenceSpec, defend, parse_defence
from fedleak.errors import InvalidInputError, UnknownNameError

#: One strength of every defence, and compositions.
STRENGTHS = (
    "noise:0.5", "laplace:0.5", "prune:0.5", "sparsify:0.5", "clip:1", "dp:clip=1,noise=0.1",
    "quantise:4", "quantise:4,rounding=stochastic", "sign:1", "sign:0.1,scale=fixed",
    "soteria:0.5", "withhold:b", "clip:1+noise:0.1", "prune:0.5+quantise:8+laplace:0.1",
)  # fmt: skip


def _update() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(200, 300, generator=g),
        "b": torch.randn(50, generator=g) * 1e-3,
        "count": torch.tensor(7),
    }


@pytest.mark.parametrize("name", ["none", *DEFENCES])
def test_strength_zero_changes_no_bit(name: str) -> None:
    update = _update()
    for key, value in defend(update, DefenceSpec(name, 0.0), 0).items():
        assert torch.equal(value, update[key])


@pytest.mark.parametrize("text", STRENGTHS)
def test_defences_are_pure_and_seeded(text: str) -> None:
    update, before, spec = _update(), _update(), parse_defence(text)
    first = defend(update, spec, 1)
    for key, value in update.items():
        assert torch.equal(value, before[key])
        assert first[key].dtype == value.dtype
        assert first[key].shape == value.shape
        assert torch.equal(first[key], defend(update, spec, 1)[key])
    assert torch.equal(first["count"], update["count"])


def test_noise_has_the_stated_standard_deviation() -> None:
    update = _update()
    noisy = defend(update, DefenceSpec("noise", 0.2), 3)
    noise = (noisy["a"] - update["a"]).double()
    expected = 0.2 * update["a"].double().square().mean().sqrt()
    # 60000 draws: the sample deviation is within 2 % with overwhelming probability.
    assert noise.std().item() == pytest.approx(expected.item(), rel=0.02)
    assert abs(noise.mean().item()) < 0.02 * expected.item()
    assert not torch.equal(noisy["a"], defend(update, DefenceSpec("noise", 0.2), 4)["a"])


@pytest.mark.parametrize("strength", [0.3, 0.9, 0.999, 0.99999999])
def test_pruning_keeps_the_largest(strength: float) -> None:
    update = _update()
    pruned = defend(update, DefenceSpec("prune", strength), 0)
    for key in ("a", "b"):
        n = update[key].numel()
        dropped = pruned[key] == 0
        assert int(dropped.sum()) == min(int(strength * n), n - 1)
        assert update[key].abs()[dropped].max() <= update[key].abs()[~dropped].min()
        assert torch.equal(pruned[key][~dropped], update[key][~dropped])


def test_specs_are_read_and_checked() -> None:
    assert parse_defence("noise:0.1") == DefenceSpec("noise", 0.1)
    assert parse_defence("none") == DefenceSpec()
    assert DefenceSpec("prune", 0.99).label == "prune-0.99"
    with pytest.raises(UnknownNameError, match="did you mean 'noise'"):
        parse_defence("nosie:0.1")
    for text in ("prune:1", "prune:1.5", "noise:-1", "prune:nan"):
        with pytest.raises(InvalidInputError, match="strength"):
            parse_defence(text)
    with pytest.raises(InvalidInputError, match="'much' is not a number"):
        parse_defence("noise:much")
    with pytest.raises(InvalidInputError, match="has no strength"):
        parse_defence("none:1")


@pytest.mark.parametrize("text", ["none", "noise:0", "prune:0", "noise:0+prune:0"])
def test_no_defence_leaves_every_entry_exact(text: str) -> None:
    received = defend(_update(), parse_defence(text), 0)
    errors = parse_defence(text).errors(received)
    assert set(errors) == {"a", "b"}
    assert all(not bool(e.any()) for e in errors.values())


def test_an_informed_attacker_knows_the_noise() -> None:
    update, spec = _update(), DefenceSpec("noise", 0.5)
    received = defend(update, spec, 1)
    for key in ("a", "b"):
        made = (received[key] - update[key]).double().std().item()
        assert spec.errors(received)[key].item() == pytest.approx(made, rel=0.25)
    assert spec.errors(received)["a"].item() == pytest.approx(
        (received["a"] - update["a"]).std().item(), rel=0.02
    )


def test_an_informed_attacker_knows_what_was_pruned() -> None:
    """What is kept is exact, what is dropped within three standard deviations of zero."""
    update, spec = _update(), DefenceSpec("prune", 0.9)
    received = defend(update, spec, 1)
    for key, error in spec.errors(received).items():
        dropped = received[key] == 0
        assert not error[~dropped].any()
        bound = error[dropped] * 3**0.5
        assert (update[key][dropped].abs() <= bound * (1 + 1e-6)).all()
        assert (bound <= received[key][~dropped].abs().min() * (1 + 1e-6)).all()
