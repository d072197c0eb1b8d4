"""One update, one attack, one score: the laboratory without a federation."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedleak.attacks import Attack, Reconstruction, make_attack
from fedleak.data import read_images
from fedleak.defences import DefenceSpec, defend, parse_defence
from fedleak.errors import InvalidInputError
from fedleak.observation import Observation
from fedleak.quality import Quality, score

__all__ = ["Trial", "Trials", "labels_of", "read_images", "reconstruct", "summary"]


@dataclass(frozen=True, eq=False)
class Trial:
    """What an attack made of one image's update, and how good it is.

    Attributes
    ----------
    reconstruction : Reconstruction
    quality : Quality
    label : int
        The true label.
    """

    reconstruction: Reconstruction
    quality: Quality
    label: int


@dataclass(frozen=True, eq=False)
class Trials:
    """The trials of one call, and the seconds that the attack took for all of them."""

    trials: tuple[Trial, ...]
    seconds: float

    @property
    def psnr_db(self) -> list[float]:
        """PSNR of every image, in dB."""
        return [t.quality.psnr_db for t in self.trials]


def reconstruct(
    model: nn.Module,
    images: Tensor,
    labels: Sequence[int] | Tensor,
    attack: str | Attack = "hybrid",
    defence: str | DefenceSpec = "none",
    labels_known: bool = False,
    seed: int = 0,
) -> Trials:
    """Compute each image's gradient as a client would, defend it, attack it, score it.

    Parameters
    ----------
    model : nn.Module
        With the weights at which the gradients are taken.
    images : Tensor, shape (N, C, H, W)
        Values in [0, 1]. Each is a client of its own, with batch size 1.
    labels : sequence of int, length N
    attack : str or Attack
        The attack sees the model and the defended gradients, all N together.
    defence : str or DefenceSpec
        ``"noise:0.1"`` for instance.
    labels_known : bool
        Whether the threat model grants the labels.
    seed : int
        Draws the defence's noise.

    Returns
    -------
    Trials

    Raises
    ------
    FedleakError
        Whatever the attack or the defence refuses.
    """
    spec = parse_defence(defence) if isinstance(defence, str) else defence
    run = make_attack(attack) if isinstance(attack, str) else attack
    shape = (int(images.shape[1]), int(images.shape[2]), int(images.shape[3]))
    targets = [int(label) for label in labels]
    names, parameters = zip(*model.named_parameters(), strict=True)
    observations = []
    for n, label in enumerate(targets):
        try:
            loss = F.cross_entropy(model(images[n : n + 1]), torch.tensor([label]))
        except (RuntimeError, IndexError) as error:
            raise InvalidInputError(
                f"the model cannot take an image of shape {shape} with label {label}: {error}"
            ) from error
        gradient = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
        sent = defend(gradient, spec, seed + n)
        observations.append(
            Observation.from_gradient(model, sent, shape, labels=[label] if labels_known else None)
        )
    begin = time.perf_counter()
    results = run(observations)
    seconds = time.perf_counter() - begin
    trials = [Trial(r, score(r.images[0], images[n]), targets[n]) for n, r in enumerate(results)]
    return Trials(tuple(trials), seconds)


def labels_of(files: Sequence[Path], classes: int, seed: int) -> list[int]:
    """Return labels: the folders' order where there are several, else drawn with the seed."""
    folders = sorted({f.parent.name for f in files})
    if 1 < len(folders) <= classes:
        return [folders.index(f.parent.name) for f in files]
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(classes, (len(files),), generator=generator).tolist()


def summary(trials: Trials, files: Sequence[Path], attack: str) -> dict[str, Any]:
    """Return the trials as plain types, for JSON."""
    first = trials.trials[0].reconstruction.details
    return {
        "attack": attack,
        "seconds": trials.seconds,
        "rank": [
            {k: layer[k] for k in ("name", "unknowns", "rank")} for layer in first.get("layers", ())
        ],
        "images": [
            {
                "file": str(file),
                "psnr_db": t.quality.psnr_db if t.quality.mse else None,
                "ssim": t.quality.ssim,
                "mse": t.quality.mse,
                "label_true": t.label,
                "label_inferred": int(t.reconstruction.labels[0]),
                "fit": t.reconstruction.fit,
            }
            for file, t in zip(files, trials.trials, strict=True)
        ],
    }
