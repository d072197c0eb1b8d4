"""Is the client's image one of those that the server has already?"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fedleak import Attack, Observation, Reconstruction
from fedleak.attacks import Evidence
from fedleak.errors import InvalidInputError
from fedleak.images import read_images


@dataclass(frozen=True)
class GalleryAttack(Attack):
    """Return the image of a folder whose gradient is nearest to the observed one.

    Parameters
    ----------
    gallery : str
        The folder.
    device : str
        ``auto``, ``cpu`` or ``cuda``.
    """

    gallery: str
    device: str = "auto"

    def needs(self, observation: Observation) -> set[str]:
        return super().needs(observation) | {"public_images"}

    def reconstruct(self, observations: Sequence[Observation]) -> list[Reconstruction]:
        evidence = Evidence.gather(observations, self.device)  # infers the labels
        if evidence.num_images > 1:
            raise InvalidInputError("attack 'gallery' looks for single images, not for batches")
        channels, *size = evidence.terms.input_shape
        files, images = read_images([Path(self.gallery)], channels, size=size)
        fits = []
        for image in images.to(evidence.replay.device).double():
            one = image.expand(len(evidence), 1, *image.shape)  # for every update
            fits.append(evidence.fit(one))
        best = torch.stack(fits).min(0)
        return [
            Reconstruction(
                images[n].double().unsqueeze(0),
                evidence.labels[i].cpu(),
                float(best.values[i]),
                {"by": "gallery", "file": files[n].name},
            )
            for i, n in enumerate(best.indices.tolist())
        ]
