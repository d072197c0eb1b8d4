"""One update, one attack, one score: the laboratory without a federation."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedleak import deadline, memory
from fedleak.attacks import Attack, Reconstruction, attack_for
from fedleak.attacks.base import cut_short
from fedleak.client.compute import example_gradients, gradient
from fedleak.client.loss import PLAIN
from fedleak.client.probe import probe
from fedleak.client.training import LocalTraining
from fedleak.defences import DefenceSpec, defend, defend_examples, parse_defence
from fedleak.errors import FedleakError, InvalidInputError
from fedleak.images import read_images
from fedleak.modules import copied, sentence, unwrapped
from fedleak.observation import Observation
from fedleak.quality import Quality, score_batch

__all__ = ["Trial", "Trials", "labels_of", "read_images", "reconstruct", "summary"]


@dataclass(frozen=True, eq=False)
class Trial:
    """What an attack made of one image, and how good it is.

    Attributes
    ----------
    reconstruction : Reconstruction
        Of the whole batch that the image was in.
    image : Tensor, shape (C, H, W)
        The reconstructed image that was matched with this one.
    quality : Quality
    label, label_inferred : int
        The true label, and the one that the attack gives the matched image.
    trusted : bool or None
        Whether the attacker, who does not see the quality, trusts this image of a batch;
        None where the attack does not say.
    """

    reconstruction: Reconstruction
    image: Tensor
    quality: Quality
    label: int
    label_inferred: int
    trusted: bool | None


@dataclass(frozen=True, eq=False)
class Trials:
    """The trials of one call.

    Attributes
    ----------
    trials : tuple of Trial
        In the order of the images.
    seconds : float
        What the attack took for all of them.
    """

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
    batch_size: int = 1,
    informed: bool = False,
    first: int = 0,
    training: LocalTraining | None = None,
    seconds: float = 0.0,
) -> Trials:
    """Compute gradients as clients would, defend them, attack them, score the images.

    Parameters
    ----------
    model : nn.Module
        With the weights at which the gradients are taken, in the mode of the client:
        ``model.eval()`` for running statistics in batch normalisation and no dropout.
    images : Tensor, shape (N, C, H, W)
        Values in [0, 1]. Every ``batch_size`` in a row are one client's.
    labels : sequence of int, length N
    attack : str or Attack
        The attack sees the model and the defended gradients, all together.
    defence : str or DefenceSpec
        ``"noise:0.1"`` for instance.
    labels_known : bool
        Whether the threat model grants the labels.
    seed : int
        Draws the defence's noise, and what an attack draws that is given by name.
    batch_size : int
        Images behind each gradient. The images of a batch come back in any order, and are
        matched with the true ones by least squared error before they are scored.
    informed : bool
        Whether the threat model grants the attacker the defence and its strength.
    first : int
        Place of the first update, where these are part of more: by their places and the seed
        updates are defended, and attacks that draw begin.
    training : LocalTraining, optional
        What clients minimise and how they normalise images, as ``LocalTraining(loss="bce")``; they
        share gradients, and the attack knows it.
    seconds : float
        Time for each update, all together; then the best so far, ``doubtful``. 0: no limit.

    Returns
    -------
    Trials

    Raises
    ------
    FedleakError
        Whatever the attack or the defence refuses.
    """
    spec = parse_defence(defence) if isinstance(defence, str) else defence
    run = attack_for(attack, {}, seed=seed) if isinstance(attack, str) else attack
    shape = (int(images.shape[1]), int(images.shape[2]), int(images.shape[3]))
    targets = torch.tensor([int(label) for label in labels])
    if len(targets) != len(images):
        raise InvalidInputError(f"{len(targets)} labels for {len(images)} images")
    if batch_size < 1 or len(images) % batch_size:
        raise InvalidInputError(
            f"{len(images)} images do not make batches of {batch_size}; attack "
            f"{len(images) // max(batch_size, 1) * batch_size} of them or change the batch size"
        )
    model = unwrapped(model)
    loss = PLAIN if training is None else training.criterion
    probe(model, shape, loss)  # refuses what cannot be attacked
    client = copied(model)  # batch statistics and spectral norm change in a client's hands
    kind = next(client.parameters())
    observations = []
    for n, (x, y) in enumerate(
        zip(images.split(batch_size), targets.split(batch_size), strict=True), first
    ):
        client.load_state_dict(model.state_dict())
        x, y = x.to(kind), y.to(kind.device)
        try:
            made = (example_gradients if spec.examples else gradient)(client, x, y, training)
            clean, _ = made
        except (RuntimeError, IndexError, ValueError) as error:
            if isinstance(error, FedleakError):
                raise
            raise InvalidInputError(
                f"the model cannot take images of shape {shape} with labels {y.tolist()}: "
                f"{sentence(error)}"
            ) from error
        sent = (defend_examples if spec.examples else defend)(clean, spec, seed + n)
        known = y.tolist() if labels_known else None
        told = spec if informed else None
        seen = Observation.from_gradient(
            model, sent, shape, batch_size, known, defence=told, training=training
        )
        observations.append(replace(seen, place=(n,)))
    begin = time.perf_counter()
    with deadline.limit(seconds * len(observations)) as allowed, memory.limit():
        results = [cut_short(r, allowed) for r in run(observations)]
    took = time.perf_counter() - begin
    trials = [
        trial
        for result, x, y in zip(
            results, images.split(batch_size), targets.split(batch_size), strict=True
        )
        for trial in _score(result, x, y)
    ]
    return Trials(tuple(trials), took)


def _score(result: Reconstruction, images: Tensor, labels: Tensor) -> list[Trial]:
    """Score a batch, in the order of its true images."""
    trials = []
    for one in score_batch(result.images, result.labels, images, labels):
        found = one.image, one.quality, one.label_inferred, one.place
        if found[0] is None or found[1] is None or found[2] is None or found[3] is None:
            raise InvalidInputError(
                f"the attack returned {len(result.images)} images for a batch of {len(images)}"
            )
        trust = result.details.get("head", {}).get("trusted")
        trusted = None if trust is None else trust[found[3]]
        trials.append(Trial(result, found[0], found[1], one.label, found[2], trusted))
    return trials


def labels_of(files: Sequence[Path], classes: int, seed: int) -> list[int]:
    """Return labels: the folders' order where there are several, else drawn with the seed.

    Parameters
    ----------
    files : sequence of Path
    classes : int
        Number of classes; more folders than that are no classes.
    seed : int

    Returns
    -------
    list of int
        One for each file.
    """
    folders = sorted({f.parent.name for f in files})
    if 1 < len(folders) <= classes:
        return [folders.index(f.parent.name) for f in files]
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(classes, (len(files),), generator=generator).tolist()


def summary(
    trials: Trials, files: Sequence[Path], attack: str, prior: str | None = None
) -> dict[str, Any]:
    """Return the trials as plain types, for JSON.

    Parameters
    ----------
    trials : Trials
    files : sequence of Path
        Where the images are from, in the order of the trials.
    attack : str
        The attack's name.
    prior : str, optional
        The prior's name.

    Returns
    -------
    dict of str to object
    """
    first, threat = trials.trials[0].reconstruction.details, trials.trials[0].reconstruction.threat
    return {
        "attack": attack,
        "prior": prior,
        "threat_model": None if threat is None else asdict(threat),
        "seconds": trials.seconds,
        "rank": [
            {k: layer[k] for k in ("name", "unknowns", "rank")} for layer in first.get("layers", ())
        ],
        "images": [
            {
                "file": str(file),
                "psnr_db": t.quality.psnr_db if t.quality.mse else None,
                "psnr_fitted_db": (
                    t.quality.psnr_fitted_db if math.isfinite(t.quality.psnr_fitted_db) else None
                ),
                "ssim": t.quality.ssim,
                "mse": t.quality.mse,
                "label_true": t.label,
                "label_inferred": t.label_inferred,
                "fit": t.reconstruction.fit,
                "status": t.reconstruction.status,
                "doubts": list(t.reconstruction.doubts),
                "notes": t.reconstruction.details.get("notes", []),
                "by": t.reconstruction.details.get("by"),
                "trusted": t.trusted,
                "head": t.reconstruction.details.get("head"),
                "why_not_linear": t.reconstruction.details.get("why_not_linear"),
            }
            for file, t in zip(files, trials.trials, strict=True)
        ],
    }
