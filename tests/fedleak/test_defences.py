"""Defences: pure, seeded, of the stated strength; what is known of their errors is true."""

from __future__ import annotations

import math
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedleak.defences import DEFENCES, DefenceSpec, defend, defend_examples, parse_defence
from fedleak.defences.accountant import epsilon
from fedleak.errors import InvalidInputError, UnknownNameError

#: One strength of every defence, and compositions.
STRENGTHS = (
    "noise:0.5", "laplace:0.5", "prune:0.5", "sparsify:0.5", "clip:1", "dp:clip=1,noise=0.1",
    "quantise:4", "quantise:4,rounding=stochastic", "sign:1", "sign:0.1,scale=fixed",
    "fixedclipping_mod:1", "LocalDpMod:clipping_norm=1,sensitivity=0.1,epsilon=1,delta=1e-5",
    "soteria:0.5", "withhold:b", "clip:1+noise:0.1", "prune:0.5+quantise:8+laplace:0.1",
)  # fmt: skip


def _update() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(200, 300, generator=g),
        "b": torch.randn(50, generator=g) * 1e-3,
        "count": torch.tensor(7),
    }


def test_every_defence_is_tested() -> None:
    assert {name for text in STRENGTHS for name in parse_defence(text).name.split("+")} == set(
        DEFENCES
    )


@pytest.mark.parametrize("name", ["none", *DEFENCES])
def test_strength_zero_changes_no_bit(name: str) -> None:
    update = _update()
    specs = [DefenceSpec(name, 0.0)]
    if name != "none":
        with pytest.raises(InvalidInputError, match=f"write {name}:STRENGTH"):
            parse_defence(name)
        specs += [parse_defence(f"{name}:0"), parse_defence(f"{name}:0+prune:0")]
    for spec in specs:
        assert spec.parts == ()
        for key, value in defend(update, spec, 0).items():
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
    assert not all(torch.equal(first[key], update[key]) for key in update)


@pytest.mark.parametrize("text", STRENGTHS)
def test_a_specification_can_be_written_and_read(text: str) -> None:
    spec = parse_defence(text)
    assert parse_defence(str(spec)) == spec == DefenceSpec(spec.name, spec.strength)
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", spec.label)


def _std(text: str, seed: int = 3) -> tuple[float, float]:
    """Return the sample deviation of what was added to ``a``, and the size of ``a``."""
    update = _update()
    noise = (defend(update, parse_defence(text), seed)["a"] - update["a"]).double()
    assert abs(noise.mean().item()) < 0.02 * noise.std().item()
    return noise.std().item(), update["a"].double().square().mean().sqrt().item()


@pytest.mark.parametrize("name", ["noise", "laplace"])
def test_noise_has_the_stated_standard_deviation(name: str) -> None:
    # 60000 draws: the sample deviation is within 2 % with overwhelming probability.
    made, size = _std(f"{name}:0.2")
    assert made == pytest.approx(0.2 * size, rel=0.02)
    update, other = _update(), parse_defence(f"{name}:0.2")
    assert not torch.equal(defend(update, other, 3)["a"], defend(update, other, 4)["a"])


def test_laplace_noise_is_no_gaussian() -> None:
    update = _update()
    noise = (defend(update, parse_defence("laplace:1"), 0)["a"] - update["a"]).double()
    kurtosis = (noise**4).mean() / noise.square().mean() ** 2
    assert kurtosis.item() == pytest.approx(6, rel=0.15)


def test_dp_noise_has_the_stated_standard_deviation() -> None:
    """In clips, whatever the size of the update; and the bound holds before it is added."""
    made, _ = _std("dp:clip=1e6,noise=1e-7")
    assert made == pytest.approx(0.1, rel=0.02)
    update, spec = _update(), parse_defence("dp:clip=2,noise=1e-9")
    sent = defend(update, spec, 0)
    norm = sum(sent[k].double().square().sum().item() for k in ("a", "b"))
    assert math.sqrt(norm) == pytest.approx(2, rel=1e-5)


def test_clipping_keeps_the_direction_and_what_is_small() -> None:
    update = _update()
    clipped = defend(update, parse_defence("clip:1"), 0)
    ratio = clipped["a"][0, 0] / update["a"][0, 0]
    torch.testing.assert_close(clipped["b"], ratio * update["b"])
    assert torch.equal(defend(update, parse_defence("clip:1e6"), 0)["a"], update["a"])


def test_dp_on_single_images() -> None:
    """Each gradient is clipped on its own; noise and its error are divided by their number."""
    g = torch.Generator().manual_seed(1)
    sizes = torch.tensor([1, 10, 1e-9, 1])[:, None, None]
    examples = {"a": torch.randn(4, 100, 200, generator=g) * sizes}
    spec = parse_defence("dp:clip=1,noise=0.5,examples=4")
    made = defend_examples(examples, spec, 0)["a"]
    clipped = sum(v / max(v.norm().item(), 1.0) for v in examples["a"]) / 4
    assert (made - clipped).std().item() == pytest.approx(0.5 / 4, rel=0.03)
    assert spec.errors({"a": made})["a"].item() == pytest.approx(0.5 / 4)
    with pytest.raises(InvalidInputError, match="gradients of 3 images"):
        defend_examples({"a": examples["a"][:3]}, spec, 0)
    with pytest.raises(InvalidInputError, match="this update is their mean"):
        defend({"a": examples["a"][0]}, spec, 0)
    plain, mean = parse_defence("prune:0.5"), {"a": examples["a"].mean(0)}
    assert torch.equal(defend_examples(examples, plain, 0)["a"], defend(mean, plain, 0)["a"])


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


def test_sparsification_keeps_random_entries() -> None:
    update = _update()
    first, second = (defend(update, DefenceSpec("sparsify", 0.7), s)["a"] for s in (0, 1))
    for made in (first, second):
        assert int((made == 0).sum()) == 42000
        assert torch.equal(made[made != 0], update["a"][made != 0])
    assert ((first == 0) & (second == 0)).double().mean().item() == pytest.approx(0.49, abs=0.02)


@pytest.mark.parametrize("bits", [2, 3, 8, 12])
def test_quantised_values_lie_on_the_grid(bits: int) -> None:
    update = _update()
    for rounding in ("nearest", "stochastic"):
        made = defend(update, parse_defence(f"quantise:{bits},rounding={rounding}"), 0)["a"]
        assert made.abs().max() == update["a"].abs().max()
        assert len(made.unique()) <= 2**bits - 1
        step = update["a"].abs().max().item() / (2 ** (bits - 1) - 1)
        assert (made - update["a"]).abs().max() <= step * (0.5001 if rounding == "nearest" else 1)
        if rounding == "stochastic":
            assert (made - update["a"]).mean().abs().item() < 0.02 * step


def test_signs() -> None:
    update = _update()
    for key in ("a", "b"):
        made = defend(update, parse_defence("sign:1"), 0)[key]
        assert made.abs().mean().item() == pytest.approx(update[key].abs().mean().item(), rel=1e-5)
        assert torch.equal(made.sign(), update[key].sign())
        fixed = defend(update, parse_defence("sign:0.5,scale=fixed"), 0)[key]
        assert torch.equal(fixed, 0.5 * update[key].sign())


def test_soteria_leaves_out_whole_features() -> None:
    """Those with the largest representation, in the last fully connected layer or the named one."""
    x = torch.linspace(-1, 1, 20)
    g = torch.randn(10, generator=torch.Generator().manual_seed(0))
    update = {"fc1.weight": torch.ones(4, 5), "fc2.weight": g[:, None] * x, "fc2.bias": g}
    made = defend(update, parse_defence("soteria:0.4"), 0)
    lost = (made["fc2.weight"] == 0).all(0)
    assert int(lost.sum()) == 8
    assert x.abs()[lost].min() > x.abs()[~lost].max()
    assert torch.equal(made["fc2.bias"], g)
    assert torch.equal(made["fc1.weight"], update["fc1.weight"])
    named = defend(update, parse_defence("soteria:0.4,layer=fc1"), 0)
    assert (named["fc1.weight"] == 0).all(0).sum() == 2
    with pytest.raises(UnknownNameError, match="did you mean 'fc"):
        defend(update, parse_defence("soteria:0.4,layer=fc"), 0)


def test_withheld_layers_are_zero() -> None:
    update = {f"{layer}.{part}": torch.ones(2, 2) for layer in ("net.0", "net.2", "fc")
              for part in ("weight", "bias")}  # fmt: skip
    for text, gone in (
        ("withhold:first", {"net.0.weight", "net.0.bias"}),
        ("withhold:last,net.0.bias", {"fc.weight", "fc.bias", "net.0.bias"}),
        ("withhold:net", {k for k in update if k.startswith("net")}),
    ):
        spec = parse_defence(text)
        made = defend(update, spec, 0)
        assert {k for k, v in made.items() if not v.any()} == gone
        assert {k for k, e in spec.errors(made).items() if e.isinf().all()} == gone
    with pytest.raises(UnknownNameError, match="unknown layer to withhold 'conv1'"):
        defend(update, parse_defence("withhold:conv1"), 0)
    with pytest.raises(InvalidInputError, match="leaves nothing"):
        defend(update, parse_defence("withhold:net,fc"), 0)


@pytest.mark.parametrize("text", STRENGTHS)
def test_an_informed_attacker_knows_the_errors(text: str) -> None:
    """In units of the stated standard deviation the errors are 1, and 0 where they are 0."""
    update, spec = _update(), parse_defence(text)
    received = defend(update, spec, 1)
    if spec.rescales:  # exact up to a factor
        factor = 0.1 / update["a"].abs().double().mean() if spec.signs else None
        factors = {k: (received[k].double().norm() if factor is None else factor) for k in ("a",)}
        norm = torch.stack([update[k].double().square().sum() for k in ("a", "b")]).sum().sqrt()
        update = {"a": update["a"] * (factors["a"] if spec.signs else 1 / norm)}
    for key in ("a", "b"):
        if key not in update:
            continue
        std = spec.errors(received)[key].expand_as(received[key])
        error = (received[key].double() - update[key].double()).abs()
        told = std.isfinite()
        assert error[told & (std == 0)].sum() < 1e-5 * update[key].abs().sum()
        some = told & (std > 0)
        if int(some.sum()) > 1000:
            ratio = (error[some] / std[some]).square().mean().sqrt().item()
            # Uniform errors are assumed of what pruning drops: of a normal's middle less.
            assert 0.75 < ratio < 1.25 if "prune" not in text else 0.6 < ratio < 1.3


@pytest.mark.parametrize("text", ["none", "noise:0", "prune:0", "noise:0+prune:0"])
def test_no_defence_leaves_every_entry_exact(text: str) -> None:
    received = defend(_update(), parse_defence(text), 0)
    errors = parse_defence(text).errors(received)
    assert set(errors) == {"a", "b"}
    assert all(not bool(e.any()) for e in errors.values())


def test_an_informed_attacker_knows_what_was_pruned() -> None:
    """What is kept is exact; what is dropped is no larger than the least of that."""
    update, spec = _update(), DefenceSpec("prune", 0.9)
    received = defend(update, spec, 1)
    for key, error in spec.errors(received).items():
        dropped = received[key] == 0
        assert not error[~dropped].any()
        bound = error[dropped] * 3**0.5
        assert (update[key][dropped].abs() <= bound * (1 + 1e-6)).all()
        assert (bound <= received[key][~dropped].abs().min() * (1 + 1e-6)).all()


def test_several_are_applied_in_order() -> None:
    update = _update()
    both = defend(update, parse_defence("prune:0.5+quantise:4"), 0)
    step = defend(defend(update, parse_defence("prune:0.5"), 0), parse_defence("quantise:4"), 0)
    assert all(torch.equal(both[k], step[k]) for k in update)
    noisy = parse_defence("noise:0.3+laplace:0.4")
    received = defend(update, noisy, 0)
    std = (received["a"] - update["a"]).double().std().item()
    assert noisy.errors(received)["a"].item() == pytest.approx(std, rel=0.05)
    assert parse_defence("clip:1e+3+noise:1e-3").label == "clip-1000+noise-0.001"


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.sampled_from([s for s in STRENGTHS if "+" not in s]), min_size=1, max_size=3),
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    size=st.sampled_from([0.0, 1e-30, 1.0, 1e12]),
    seed=st.integers(0, 5),
)
def test_no_composition_breaks_an_update(
    texts: list[str], shape: list[int], size: float, seed: int
) -> None:
    """Whatever is sent is finite, and every error is a number from 0, infinity among them."""
    g = torch.Generator().manual_seed(seed)
    update = {"a.weight": size * torch.randn(shape, generator=g), "fc.weight": torch.ones(2, 3),
              "b": torch.randn(3, generator=g)}  # fmt: skip
    try:
        spec = parse_defence("+".join(texts))
    except InvalidInputError:
        assume(False)
    received = defend(update, spec, seed)
    errors = spec.errors(received)
    for key, value in received.items():
        assert value.isfinite().all()
        assert not errors[key].isnan().any()
        assert (errors[key] >= 0).all()
        assert errors[key].expand_as(value).shape == value.shape


def test_specs_are_read_and_checked() -> None:
    assert parse_defence("noise:0.1") == DefenceSpec("noise", 0.1)
    assert parse_defence("none") == DefenceSpec()
    assert DefenceSpec("prune", 0.99).label == "prune-0.99"
    assert parse_defence("clip:1 + noise:0.1") == DefenceSpec("clip+noise", "1+0.1")
    assert parse_defence("withhold:conv1,fc.bias").strength == "conv1,fc.bias"
    sequential = {f"{n}.weight": torch.ones(2) for n in (0, 2, 4)}
    for text, gone in (("withhold:2", "2"), ("withhold:0,4", "04"), ("withhold:2+clip:9", "2")):
        made = defend(sequential, parse_defence(text), 0)
        assert [k[0] for k, v in made.items() if not v.any()] == list(gone)
    with pytest.raises(UnknownNameError, match="did you mean 'noise'"):
        parse_defence("nosie:0.1")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prune:1", r"strength 1.0 is not in \[0, 1.0\)"),
        ("prune:1.5", "strength"),
        ("noise:-1", "strength"),
        ("prune:nan", "strength"),
        ("noise:inf", "strength inf"),
        ("noise:much", "'much' is not a number"),
        ("none:1", "has no strength"),
        ("none+noise:1", "'none' cannot be combined"),
        ("sign+noise:0.1", "'sign' has no strength; write sign:STRENGTH"),
        ("sign:0.01,scale=fixed+noise:0.1", "size of each tensor, which is lost before it"),
        ("sign:1+prune:0.5", "signs are all of one size"),
        ("dp:1", "needs noise"),
        ("dp:clip=0,noise=1", "clip is 0"),
        ("dp:clip=1,nois=1", "did you mean 'noise'"),
        ("noise:0.1+dp:clip=1,noise=1,examples=4", "must come first"),
        ("quantise:1", "one bit for an entry is sign:1"),
        ("quantise:2.5", "not a whole number"),
        ("quantise:25", r"\[0, 24\]"),
        ("quantise:4,rounding=up", "unknown value"),
    ],
)
def test_bad_input(text: str, words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        parse_defence(text)


def test_epsilon_is_that_of_the_accountants_own_example() -> None:
    """Opacus, tests/accountants_test.py: noise 1.5, rate 0.04, 90 / 0.04 steps, delta 1e-5."""
    spec = parse_defence("dp:clip=1,noise=1.5")
    assert epsilon(spec, 2250, 0.04, 1e-5) == pytest.approx(7.32911117143, rel=1e-9)
    # What is done to the result costs nothing more.
    after = parse_defence("dp:clip=1,noise=1.5+prune:0.5")
    assert epsilon(after, 2250, 0.04, 1e-5) == epsilon(spec, 2250, 0.04, 1e-5)
    more, less = (epsilon(spec, n) for n in (20, 10))
    assert more is not None
    assert less is not None
    assert 0 < less < more
    assert epsilon(spec, 0) == 0
    assert epsilon(parse_defence("clip:1+noise:0.5"), 10) is None
    with pytest.raises(InvalidInputError, match="sampling"):
        epsilon(spec, 10, sampling=1.5)


def test_the_accountant_is_not_imported_before_it_is_asked() -> None:
    code = "import sys, fedleak; sys.exit(any(m in sys.modules for m in ('opacus', 'flwr', 'ray')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_accountant_is_quiet() -> None:
    """Importing Opacus sets up the root logger, which would print every event of ours."""
    code = (
        "import logging, warnings; warnings.simplefilter('error', UserWarning)\n"
        "from fedleak.defences import parse_defence\n"
        "from fedleak.defences.accountant import epsilon\n"
        "print(epsilon(parse_defence('dp:clip=1,noise=0.02'), 60) > 1000)\n"
        "print(logging.getLogger().handlers)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["True", "[]"], done.stderr
