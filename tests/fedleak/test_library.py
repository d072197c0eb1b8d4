"""Quality, models, data, priors, registries, and what an import costs."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fedleak.data import load_data
from fedleak.errors import DataUnavailableError, InvalidInputError, UnknownNameError
from fedleak.models import build_model
from fedleak.priors import GaussianPrior
from fedleak.quality import pair, score
from fedleak.registry import Registry


def test_brightness_and_contrast_are_fitted() -> None:
    y = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    scale, offset = torch.tensor([0.3, 5.0, 1.0]), torch.tensor([0.4, -2.0, 0.1])
    found = score(y * scale[:, None, None] + offset[:, None, None], y)
    assert found.psnr_db < 15
    assert found.psnr_fitted_db > 100
    assert score(y, y).psnr_fitted_db == math.inf
    flat = score(torch.full_like(y, 0.5), y)  # a grey image becomes the mean, and no more
    spread = float(y.double().flatten(1).var(1, correction=0).mean())
    assert flat.psnr_fitted_db == pytest.approx(-10 * math.log10(spread))
    negative = score(1 - y, y)
    assert negative.psnr_fitted_db == pytest.approx(-10 * math.log10(spread))


def test_import_needs_neither_flower_nor_ray() -> None:
    code = (
        "import sys, fedleak, fedleak.attacks, fedleak.metric, fedleak.defences, fedleak.models, "
        "fedleak.data; print([m for m in ('flwr', 'ray') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_psnr_has_peak_one_and_clamps() -> None:
    truth = torch.full((3, 8, 8), 0.5)
    assert score(truth + 0.1, truth).psnr_db == pytest.approx(20.0, abs=1e-4)
    assert score(truth, truth).psnr_db == math.inf
    white = torch.ones(3, 8, 8)
    assert score(white + 5, white).mse == 0.0
    assert score(white, white).ssim == pytest.approx(1.0)
    with pytest.raises(ValueError, match="differ in shape"):
        score(torch.ones(1, 8, 8), truth)


def test_small_images_have_a_ssim() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.rand(1, 4, 4, generator=g)
    assert score(x, x).ssim == pytest.approx(1.0)
    assert score(x, 1 - x).ssim < 0.5
    assert math.isnan(score(x[:, :2, :2], x[:, :2, :2]).ssim)


def test_reconstructions_are_matched_whatever_their_order() -> None:
    g = torch.Generator().manual_seed(0)
    truth = torch.rand(5, 1, 4, 4, generator=g)
    order = [3, 0, 4]
    assert pair(truth[order] + 0.01, truth) == [(0, 3), (1, 0), (2, 4)]


def test_digits_are_split_once_and_for_all() -> None:
    train, test = load_data("digits")
    assert train.shape == (1, 8, 8)
    assert (len(train), len(test), train.classes) == (1438, 359, 10)
    x, y = train.batch([0, 5])
    assert x.dtype == torch.float32
    assert 0 <= float(x.min()) <= float(x.max()) <= 1
    assert y.shape == (2,)
    bigger, _ = load_data("digits", size=16)
    assert bigger.shape == (1, 16, 16)


def test_missing_data_gives_three_ways_out(tmp_path: Path) -> None:
    with pytest.raises(DataUnavailableError) as caught:
        load_data("CIFAR10", str(tmp_path))
    for way in ("data.download=true", "data.root", "data.name='digits'"):
        assert way in str(caught.value)
    with pytest.raises(DataUnavailableError, match="no folder"):
        load_data("folder", str(tmp_path / "nowhere"))
    with pytest.raises(DataUnavailableError, match="holds no folders"):
        load_data("folder", str(tmp_path))
    with pytest.raises(UnknownNameError, match="did you mean 'CIFAR10'"):
        load_data("cifar-10")


def test_a_folder_of_images(tmp_path: Path) -> None:
    from torchvision.io import write_png

    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        for i in range(5):
            pixels = torch.randint(0, 256, (3, 20, 24), dtype=torch.uint8)
            write_png(pixels, str(tmp_path / label / f"{i}.png"))
    train, test = load_data("folder", str(tmp_path), size=16)
    assert (len(train), len(test), train.classes, train.shape) == (8, 2, 2, (3, 16, 16))
    assert train.batch([0])[0].shape == (1, 3, 16, 16)


def test_a_torchvision_data_set(tmp_path: Path) -> None:
    """MNIST in its original format, made here."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split, count in (("train", 6), ("t10k", 3)):
        pixels = bytes(torch.randint(0, 256, (count * 784,), dtype=torch.uint8).tolist())
        head = b"\x00\x00\x08\x03" + b"".join(n.to_bytes(4, "big") for n in (count, 28, 28))
        (raw / f"{split}-images-idx3-ubyte").write_bytes(head + pixels)
        head = b"\x00\x00\x08\x01" + count.to_bytes(4, "big")
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(head + bytes(range(count)))
    train, test = load_data("MNIST", str(tmp_path))
    assert (len(train), len(test), train.classes, train.shape) == (6, 3, 6, (1, 28, 28))


def test_models_are_drawn_with_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = build_model("cnn3-v1", (1, 16, 16), 10, seed=5).state_dict()
    here = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(here, torch.rand(1))
    again = build_model("cnn3-v1", (1, 16, 16), 10, seed=5).state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)


def test_models_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from torch import nn\n"
        "def net(classes): return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))\n"
        "def nothing(): return 3\n"
    )
    assert build_model(f"{file}:net", (1, 8, 8), 4)[1].out_features == 4  # type: ignore[index]
    for spec, words in (
        (f"{file}:nett", "cannot be loaded"),
        (f"{file}:nothing", "made a int"),
        (f"{tmp_path}/other.py:net", "there is no file"),
        ("no.such.module:net", "cannot be loaded"),
    ):
        with pytest.raises(InvalidInputError, match=words):
            build_model(spec, (1, 8, 8), 4)


def test_small_images_and_deep_models() -> None:
    with pytest.raises(InvalidInputError, match="'cnn4-v2' does not fit images"):
        build_model("cnn4-v2", (1, 8, 8), 10)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_checkpoints(tmp_path: Path, suffix: str) -> None:
    source = build_model("cnn2-v1", (1, 8, 8), 10, seed=3)
    path = tmp_path / f"weights{suffix}"
    save: Callable[..., None] = save_file if suffix == ".safetensors" else torch.save
    save(source.state_dict(), path)
    loaded = build_model("cnn2-v1", (1, 8, 8), 10, seed=4, weights=path)
    assert torch.equal(loaded.state_dict()["fc.weight"], source.state_dict()["fc.weight"])
    with pytest.raises(InvalidInputError, match=r"'fc.weight' has shape \(10, 216\)"):
        build_model("cnn2-v1", (1, 9, 9), 10, weights=path)
    with pytest.raises(InvalidInputError, match="is missing"):
        build_model("cnn3-v1", (1, 8, 8), 10, weights=path)
    path.write_bytes(b"nonsense")
    with pytest.raises(InvalidInputError, match="cannot be read"):
        build_model("cnn2-v1", (1, 8, 8), 10, weights=path)
    with pytest.raises(InvalidInputError, match="does not exist"):
        build_model("cnn2-v1", (1, 8, 8), 10, weights=tmp_path / "gone.pt")


def test_a_pickled_checkpoint_runs_no_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "ran",))  # type: ignore[return-value]

    torch.save({"fc.weight": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(InvalidInputError, match="cannot be read"):
        build_model("cnn2-v1", (1, 8, 8), 10, weights=tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 6, 9), (2, 5, 4)])
def test_prior_root_against_the_dense_covariance(shape: tuple[int, int, int]) -> None:
    """B B^T is sigma^2 C kron rho^r, and the adjoint is the adjoint."""
    prior = GaussianPrior(shape, rho=0.8, power=1.0, colour=0.6, sigma=0.3, floor=0.0)
    size = math.prod(prior.latent_shape)
    basis = torch.eye(size, dtype=torch.float64).reshape(size, *prior.latent_shape)
    b = prior.root(basis).flatten(1).T
    rows, columns = torch.meshgrid(torch.arange(shape[1]), torch.arange(shape[2]), indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()], 1).double()
    between = 0.8 ** torch.cdist(places, places)
    colours = torch.full((shape[0], shape[0]), 0.6, dtype=torch.float64).fill_diagonal_(1.0)
    expected = 0.3**2 * torch.kron(colours, between)
    # The torus wraps the longest correlations: small, and never the near ones.
    torch.testing.assert_close(b @ b.T, expected, atol=0.03 * 0.3**2, rtol=0)
    u = torch.randn(1, *prior.latent_shape, dtype=torch.float64)
    x = torch.randn(1, *shape, dtype=torch.float64)
    torch.testing.assert_close((prior.root(u) * x).sum(), (u * prior.root_adjoint(x)).sum())


def test_registries_take_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    point = EntryPoint("mine", "torch.nn:Tanh", "fedleak.things")
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [point])
    things: Registry[object] = Registry("thing", "fedleak.things")
    things.register("ours")(1)
    assert list(things) == ["mine", "ours"]
    assert "mine" in things
    assert things["mine"] is nn.Tanh
    with pytest.raises(UnknownNameError, match="unknown thing 'min'; did you mean 'mine'"):
        things["min"]
    with pytest.raises(ValueError, match="registered twice"):
        things.register("ours")(2)
