"""One cell of the comparison: an attack on a network, and what came of it."""

from __future__ import annotations

import math
import re
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedleak import laboratory
from fedleak.attacks import ATTACKS, Attack, attack_for
from fedleak.errors import FedleakError, InvalidInputError
from fedleak.spelling import literal, pairs

#: Attacks that take minutes: they are run on the first ``--slow-limit`` images.
SLOW = frozenset({"cosine", "dlg", "hybrid-paper", "idlg"})
#: Every network's logits.
CLASSES = 10


@dataclass(frozen=True)
class AttackSpec:
    """An attack and its options, as given on the command line.

    Attributes
    ----------
    name : str
    options : dict
        Given by the user; nothing that fedleak adds.
    text : str
        The options as they were written, ``"steps=4000"``.
    """

    name: str
    options: dict[str, Any] = field(hash=False)
    text: str

    @property
    def label(self) -> str:
        """``"cosine:steps=4000"``, as on the command line."""
        return f"{self.name}:{self.text}" if self.text else self.name

    @property
    def slow(self) -> bool:
        return self.name in SLOW

    def make(self, device: str, seed: int, public: Tensor | None = None) -> Attack:
        """Make the attack, with the device, seed and public images that it takes.

        Raises
        ------
        InvalidInputError
            If it does not take an option, or needs public images and there are none.
        """
        options = dict(self.options)
        if str(options.get("prior", "")).endswith(":learned"):
            if public is None:
                raise InvalidInputError(
                    f"attack {self.label!r} learns its prior; give public images with --public"
                )
            options["public"] = public
        return attack_for(self.name, options, device, seed)


def parse_attack(text: str) -> AttackSpec:
    """Read ``NAME`` or ``NAME:key=value,...``.

    Values are Python literals where they can be read as such, else text.

    Raises
    ------
    UnknownNameError, InvalidInputError
        If there is no such attack, or the options are not of this form.
    """
    name, _, rest = text.partition(":")
    ATTACKS[name]  # refuses a name that is not known
    read = pairs(rest.split(","), f"attack {text!r}", f"{name}:KEY=VALUE,...")
    options = {key: literal(value) for key, value in read.items()}
    return AttackSpec(name, options, ",".join(p.strip() for p in rest.split(",")) if rest else "")


@dataclass(frozen=True, eq=False)
class Images:
    """The images to attack, their names and labels."""

    names: list[str]
    pixels: Tensor
    labels: list[int]

    def __len__(self) -> int:
        return len(self.names)

    def first(self, count: int) -> Images:
        """Return the first ``count`` images."""
        return Images(self.names[:count], self.pixels[:count], self.labels[:count])


Row = dict[str, Any]


def run_cell(
    network: str,
    model: nn.Module,
    spec: AttackSpec,
    attack: Attack,
    images: Images,
    seed: int,
    first: int = 0,
) -> tuple[list[Row], np.ndarray]:
    """Attack all images together; one by one if that fails.

    Returns
    -------
    rows : list of dict
        One for each image, with :data:`COLUMNS`. ``seconds`` is the time of the whole call,
        which ``images_together`` images shared.
    made : ndarray, float32, shape (N, C, H, W)
        The reconstructions, NaN where there is none.
    """
    base: Row = {"network": network, "attack": spec.name, "options": spec.text}
    begin = time.perf_counter()
    try:
        trials = laboratory.reconstruct(
            model, images.pixels, images.labels, attack, seed=seed, first=first
        )
        if any(not bool(t.reconstruction.images.isfinite().all()) for t in trials.trials):
            raise FedleakError("the attack diverged: its image holds NaN or infinite values")
    except Exception as error:  # whatever an attack does, the other cells must go on
        if len(images) > 1:
            parts = [
                run_cell(network, model, spec, attack, single, seed, first + n)
                for n, single in enumerate(_one_by_one(images))
            ]
            return [r for rows, _ in parts for r in rows], np.concatenate([m for _, m in parts])
        expected = isinstance(error, FedleakError)
        reason = str(error) if expected else f"{type(error).__name__}: {error}"
        row = base | dict.fromkeys(("psnr_db", "ssim", "fit"), math.nan)
        row |= {"image": images.names[0], "label_true": images.labels[0], "label_inferred": ""}
        row |= {"seconds": time.perf_counter() - begin, "images_together": 1}
        row |= {"status": "failed", "reason": " ".join(reason.split())}
        return [row], np.full(tuple(images.pixels.shape), np.nan, np.float32)
    rows = [
        base
        | {
            "image": name,
            "psnr_db": trial.quality.psnr_db,
            "ssim": trial.quality.ssim,
            "fit": trial.reconstruction.fit,
            "label_true": trial.label,
            "label_inferred": int(trial.reconstruction.labels[0]),
            "seconds": trials.seconds,
            "images_together": len(images),
            "status": "ok",
            "reason": "",
        }
        for name, trial in zip(images.names, trials.trials, strict=True)
    ]
    made = torch.stack([t.reconstruction.images[0] for t in trials.trials])
    return rows, made.float().numpy()


def _one_by_one(images: Images) -> Sequence[Images]:
    return [
        Images([name], images.pixels[n : n + 1], [images.labels[n]])
        for n, name in enumerate(images.names)
    ]


def pictures_of(folder: Path, network: str, attack: str, options: str) -> Path:
    """Return the file with the reconstructions of one cell."""
    # A factory's path and options may hold anything; a checksum is a name that every file
    # system takes.
    name = re.sub(r"[^\w.-]", "_", f"{network}.{attack}")
    mark = f"-{zlib.crc32(f'{network} {options}'.encode()):08x}"
    return folder / "reconstructions" / f"{name}{mark}.npz"
