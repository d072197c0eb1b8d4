"""A fully connected first layer, and images read off the rows of its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fedleak import deadline
from fedleak.attacks.base import ATTACKS, Attack, Reconstruction
from fedleak.attacks.evidence import resolve_device
from fedleak.client.training import LocalTraining
from fedleak.errors import UnsupportedModelError
from fedleak.modules import copied
from fedleak.observation import Observation

#: Rounding of a sum over a batch in float32, relative to the largest entry that it is made of.
_SUM = 16 * 2.0**-24
#: How far the factor of an image may be from the one that its pixels and label predict,
#: relative: the client's forward pass and the difference of two sums are float32.
_AGREES = 2e-4
#: Error of a predicted factor, relative: the rounding of the client's forward pass.
_PREDICTED = 1e-6
#: How much of a row may be left, relative, where the images that explain it are taken out.
_EXPLAINED = 1e-4
#: How much may be left of a row that certifies an image, relative to the image's own part.
_LEFT = 1e-2
#: How far above its rounding a row must be to show an image: its factor is then known to 1e-3.
_CLEAR = 1e3
#: Pixels may leave [0, 1] by this much in a candidate.
_RANGE = 5e-3
#: Candidates looked at together: their pre-activations are held in memory.
_TOGETHER = 512


class _Seen(Exception):
    """All that matters of a forward pass has been seen."""


@dataclass(frozen=True)
class FirstLayer:
    """A fully connected layer on the pixels, its ReLU, and the fully connected layer after it.

    Attributes
    ----------
    first, second : str
        Names of the two layers.
    units : int
        Rows of the first one.
    """

    first: str
    second: str
    units: int

    @classmethod
    def of(cls, model: nn.Module, input_shape: tuple[int, int, int]) -> FirstLayer:
        """Find the layer in a model.

        Raises
        ------
        UnsupportedModelError
            If the model has none; the message says what it has instead.
        """
        seen: list[tuple[str, nn.Module, Tensor, Tensor]] = []
        model = copied(model).double().eval()

        def look(name: str, module: nn.Module, given: Any, made: Tensor) -> None:
            if not given or not isinstance(given[0], Tensor) or not isinstance(made, Tensor):
                return  # a parametrisation, which makes a weight: no layer
            seen.append((name, module, given[0].detach(), made.detach()))
            if len(seen) == 2 or not isinstance(module, nn.Linear):
                raise _Seen  # the rest of a deep network need not run

        handles = [
            module.register_forward_hook(partial(look, name))
            for name, module in model.named_modules()
            if next(module.parameters(recurse=False), None) is not None
        ]
        generator = torch.Generator().manual_seed(0)
        x = torch.rand(2, *input_shape, generator=generator, dtype=torch.float64)
        try:
            with torch.no_grad():
                model(x)
        except _Seen:
            pass
        except (RuntimeError, ValueError) as error:
            raise UnsupportedModelError(
                f"the model cannot take images of shape {input_shape}: {error}"
            ) from error
        finally:
            for handle in handles:
                handle.remove()
        if len(seen) < 2 and (not seen or isinstance(seen[0][1], nn.Linear)):
            raise UnsupportedModelError("the model has fewer than two layers with weights")
        name, layer, given, made = seen[0]
        after, following, hidden, _ = seen[-1]
        if not isinstance(layer, nn.Linear) or not torch.equal(given.flatten(1), x.flatten(1)):
            raise UnsupportedModelError(
                f"the first layer {name!r} ({type(layer).__name__}) is not fully connected to the "
                "pixels (nn.Linear after a Flatten)"
            )
        if layer.bias is None:
            raise UnsupportedModelError(f"the first layer {name!r} has no bias")
        if not isinstance(following, nn.Linear) or not torch.equal(hidden, made.relu()):
            raise UnsupportedModelError(
                f"the first layer {name!r} is not followed by a ReLU and a fully connected layer, "
                f"but by {after!r} ({type(following).__name__})"
            )
        return cls(name, after, layer.out_features)


@ATTACKS.register("rows")
@dataclass(frozen=True)
class RowsAttack(Attack):
    """Images read off the rows of a fully connected first layer with ReLU, and peeled off.

    A unit that only one image of the batch activates has that image in its gradient: the
    weight's row divided by the bias' entry. So has the difference of two units with equal
    weights, where one image lies between their thresholds. An image that is known, with its
    label, is taken out of all other rows, where more images come to stand alone. Few images on
    an honest network have units of their own; a server that tampers (:mod:`fedleak.tampers`)
    makes more.

    An image is taken only where pixels and label predict the factor that it was observed with,
    and *certified* where in the end two rows with it are explained entirely. Images that no row
    shows alone are left out, so fewer come back than the batch has.

    Parameters
    ----------
    device : str
        ``auto``, ``cpu`` or ``cuda``.

    Notes
    -----
    Rows of single images: Phong et al. 2017; Boenisch et al. 2021 (arXiv 2112.02918).
    Differences of thresholds: Fowl et al. 2022 (Robbing the Fed, ICLR).
    """

    device: str = "auto"

    def reconstruct(self, observations: Sequence[Observation]) -> list[Reconstruction]:
        return [_Rows(o, resolve_device(self.device)).reconstruction() for o in observations]


def whole_batch(seen: Observation, device: str = "auto") -> Reconstruction | None:
    """Read a batch off the rows of the first layer, if these show all of it, certified."""
    if seen.num_images == 1 or seen.errors or seen.terms.steps > 1:
        return None
    try:
        found = _Rows(seen, resolve_device(device)).reconstruction()
    except UnsupportedModelError:
        return None
    whole = len(found.images) == seen.num_images and all(found.details["certified"])
    return found if whole else None


class _Rows:
    """The rows of one update, from which known images are taken out."""

    def __init__(self, seen: Observation, device: torch.device):
        layer = FirstLayer.of(seen.model, seen.input_shape)
        self.seen, self.images = seen, seen.num_images
        self.client = seen.training or LocalTraining()
        if self.client.update_rule.signs:
            raise UnsupportedModelError(
                f"the clients' optimiser {self.client.update_rule} leaves signs of the gradient "
                "only, and rows need its size"
            )
        probe = torch.zeros(1, dtype=torch.int64)
        if self.client.criterion.counted(probe) is not None:
            raise UnsupportedModelError(
                f"under the loss {self.client.criterion} an image's part depends on the others' "
                "labels: rows cannot be predicted"
            )
        self.model = copied(seen.model).double().to(device).eval()
        self.layer: nn.Linear = self.model.get_submodule(layer.first)  # type: ignore[assignment]
        weights = self.layer.weight.detach()
        combined = _combinations(weights, self.layer.bias.detach())
        gradient = {k: v.to(device).double() for k, v in seen.gradient.items()}
        g = gradient[f"{layer.first}.bias"]
        self.combined = combined
        self.rows = combined(gradient[f"{layer.first}.weight"])
        self.factors = combined(g.unsqueeze(1)).squeeze(1)
        # What float32, and then what is taken out inexactly, leaves of a row without images.
        self.base = _SUM * combined.largest(g.abs())
        self.error = self.base
        self.whole = self.rows
        self.observed = self.rows.norm(dim=1)
        # What one image's loss counts in the batch's.
        self.part = 1.0 if self.client.criterion.reduction == "sum" else 1 / seen.num_images
        self.found: list[Tensor] = []
        self.labels: list[int] = []
        self.taken: list[Tensor] = []

    def reconstruction(self) -> Reconstruction:
        known = -1
        while known < len(self.found) < self.images:
            known = len(self.found)
            while len(self.found) < self.images and self._peel():
                pass
            if self.found:
                self._polish()  # errors have added up: with less of them, more may stand alone
        shape = (len(self.found), *self.seen.input_shape)
        images = torch.zeros(0).double()
        if self.found:
            images = self._images(torch.stack(self.found).flatten(1)).cpu()
        whole = self.observed.norm().clamp_min(1e-300)
        left = float(self.rows.norm() / whole)
        details = {
            "by": "rows",
            "layers": [],
            "recovered": len(self.found),
            "certified": self._certified(),
        }
        labels = torch.tensor(self.labels, dtype=torch.int64)
        return Reconstruction(images.reshape(shape), labels, left, details)

    def _images(self, pixels: Tensor) -> Tensor:
        """Return images in [0, 1] of what the model sees of them, shape (N, n)."""
        if not self.client.mean:
            return pixels
        shaped = pixels.reshape(-1, *self.seen.input_shape)
        zero, one = (self.client.seen(torch.full_like(shaped, v)) for v in (0.0, 1.0))
        return ((shaped - zero) / (one - zero)).flatten(1)

    def _peel(self) -> bool:
        """Take out every image that a row shows alone; return whether there was one."""
        places = (self.factors.abs() > _CLEAR * self.error).nonzero().flatten()
        candidates = self.rows[places] / self.factors[places].unsqueeze(1)
        images = self._images(candidates)
        inside = (images.amin(1) > -_RANGE) & (images.amax(1) < 1 + _RANGE)
        places, candidates = places[inside], candidates[inside]
        before = len(self.found)
        for part, pixels in zip(places.split(_TOGETHER), candidates.split(_TOGETHER), strict=True):
            if deadline.passed():
                return False
            factors = self._factors(pixels)
            observed = self.factors[part]
            own = factors[:, torch.arange(len(part)), part]
            off = (own - observed).abs() / observed.abs()
            off, label = off.min(0)
            agrees = off < _AGREES + self.error[part] / observed.abs()
            for n in agrees.nonzero().flatten().tolist():
                self._take(int(part[n]), pixels[n], factors[label[n], n], int(label[n]))
                if len(self.found) == self.images:
                    return True
        return len(self.found) > before

    def _take(self, place: int, pixels: Tensor, factors: Tensor, label: int) -> None:
        """Take one image out of all rows, if its own still shows it and others do not object."""
        if abs(self.factors[place]) <= self.error[place]:
            return  # taken already: another row showed it
        if self.error[place] < 1e-5 * self.factors[place].abs():
            # What was observed is surer than what a client's float32 makes of the prediction.
            factors = factors * (self.factors[place] / factors[place])
        left = self.rows - factors.unsqueeze(1) * pixels
        there = factors.abs() > self.error
        before = self.rows.norm(dim=1)
        noise = self.error * pixels.norm()
        empty = there & (before <= noise)  # rows that should show it, and show nothing
        if bool(empty.any()):
            return
        off = self.error[place] / self.factors[place].abs() + _PREDICTED
        self.rows, self.factors = left, self.factors - factors
        self.error = self.error + off * factors.abs()
        self.found.append(pixels.reshape(self.seen.input_shape))
        self.labels.append(label)
        self.taken.append(factors)

    def _polish(self) -> None:
        """Solve for all images at once in the rows that they explain: peeling adds errors up."""
        kept = self.rows.norm(dim=1) <= _EXPLAINED * self.observed + 10 * self.error
        factors = torch.stack(self.taken, 1)
        if int(kept.sum()) < len(self.found):
            return
        # Factors that were predicted are off by rounding: rows of few images say most.
        error = self.base + _PREDICTED * factors.abs().sum(1)
        weight = 1 / error[kept].clamp_min(1e-300).unsqueeze(1)
        system, right = weight * factors[kept], weight * self.whole[kept]
        pixels = torch.linalg.lstsq(system, right).solution
        left = self.whole - factors @ pixels
        if bool(pixels.isfinite().all()) and left.norm() < self.rows.norm():
            self.found = [p.reshape(self.seen.input_shape) for p in pixels]
            self.rows, self.error = left, error

    def _certified(self) -> list[bool]:
        """Return of each image whether two rows hold it and, beside it, nothing unexplained."""
        left = self.rows.norm(dim=1)
        out = []
        for pixels, factors in zip(self.found, self.taken, strict=True):
            own, size = factors.abs() * pixels.norm(), pixels.norm()
            shown = (own > 10 * self.error * size) & (left < _LEFT * own)
            out.append(int(shown.sum()) > 1)
        return out

    def _factors(self, pixels: Tensor) -> Tensor:
        """Return the factors of images in all rows, for every label, shape (C, R, rows)."""
        kept: list[Tensor] = []

        def keep(module: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
            made.retain_grad()
            kept.append(made)

        handle = self.layer.register_forward_hook(keep)
        try:
            logits = self.model(pixels.reshape(-1, *self.seen.input_shape))
        finally:
            handle.remove()
        out = []
        for label in range(self.client.criterion.classes(logits.shape[1])):
            target = torch.full((len(pixels),), label, device=pixels.device)
            loss = self.client.criterion.each(logits, target).sum() * self.part
            (cotangent,) = torch.autograd.grad(loss, kept[0], retain_graph=True)
            out.append(self.combined(cotangent.T).T)
        return torch.stack(out)


class _Combinations:
    """Rows of units, and differences of neighbouring thresholds of units with equal weights."""

    def __init__(self, singles: Tensor, pairs: Tensor):
        self.singles, self.pairs = singles, pairs

    def __call__(self, rows: Tensor) -> Tensor:
        lower, upper = self.pairs
        return torch.cat([rows[self.singles], rows[lower] - rows[upper]])

    def largest(self, sizes: Tensor) -> Tensor:
        """Return the larger of the sizes that each row is made of."""
        lower, upper = self.pairs
        return torch.cat([sizes[self.singles], sizes[lower].maximum(sizes[upper])])


def _combinations(weights: Tensor, bias: Tensor) -> _Combinations:
    """Group units of equal weights; the one with the highest threshold of each stands alone."""
    _, group = torch.unique(weights, dim=0, return_inverse=True)
    order = torch.argsort(bias, descending=True, stable=True)
    order = order[torch.argsort(group[order], stable=True)]
    same = group[order][1:] == group[order][:-1]
    last = torch.cat([~same, torch.ones(1, dtype=torch.bool, device=same.device)])
    return _Combinations(order[last], torch.stack([order[:-1][same], order[1:][same]]))
