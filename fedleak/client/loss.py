"""What clients minimise: the loss of a batch, and what the attack has to know of it.

A loss says what it is of given logits and labels, and how it changes with the logits. Attacks,
metric, simulations and laboratory ask it; nothing else in fedleak spells a loss.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, hessian, vmap

from fedleak.errors import InvalidInputError
from fedleak.registry import Registry

Reduction = Literal["mean", "sum"]


class Loss(ABC):
    """The loss of a batch, from its logits and labels.

    One of your own is a frozen dataclass, whose fields are its options, with :meth:`each`.
    Labels are classes, int64, or class probabilities, with one more dimension.

    Attributes
    ----------
    reduction : {"mean", "sum"}
        How the losses of the images become that of the batch.
    """

    reduction: Reduction = "mean"

    @abstractmethod
    def each(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of each image, shape (B,), for logits of shape (B, outputs)."""

    def counted(self, labels: Tensor) -> Tensor | None:
        """Return how much each image counts in the mean, like ``labels``; None: all alike."""
        return None

    def value(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of a batch, of logits of shape (B, outputs)."""
        each, counted = self.each(logits, labels), self.counted(labels)
        if self.reduction == "sum":
            return each.sum()
        return each.mean() if counted is None else each.sum() / counted.sum()

    def shared(self, logits: Tensor, labels: Tensor, shares: Tensor, count: int) -> Tensor:
        """Return the loss of a batch that images belong to in part.

        Parameters
        ----------
        logits, labels
            As for :meth:`value`.
        shares : Tensor, shape (B,)
            The part of each image in the batch; they sum to one.
        count : int
            Number of images of the batch.
        """
        total = (shares * self.each(logits, labels)).sum()
        counted = self.counted(labels)
        if self.reduction == "sum":
            return count * total
        return total if counted is None else total / (shares * counted).sum()

    def cotangent(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return ``dL/dlogits`` of batches; differentiable.

        Parameters
        ----------
        logits : Tensor, shape (..., B, outputs)
        labels : Tensor, int64, shape (..., B), or probabilities, shape (..., B, classes)

        Returns
        -------
        Tensor, shape (..., B, outputs)
        """
        flat = logits.reshape(-1, *logits.shape[-2:])
        own = labels.reshape(len(flat), *labels.shape[logits.dim() - 2 :])
        return vmap(grad(self.value))(flat, own).reshape(logits.shape)

    def alone(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return ``dL/dlogits`` of images that are a batch of their own each, (N, outputs)."""
        return self.cotangent(logits.unsqueeze(1), labels.unsqueeze(1)).squeeze(1)

    def curvature(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return how fast each entry of :meth:`alone` changes with its own logit, (N, outputs)."""

        def second(z: Tensor, y: Tensor) -> Tensor:
            return hessian(lambda v: self.value(v.unsqueeze(0), y.unsqueeze(0)))(z).diagonal()

        return vmap(second)(logits, labels)

    def classes(self, outputs: int) -> int:
        """Return how many labels there are for a model with so many outputs."""
        return outputs


class CanonicalLoss(Loss):
    """A loss whose derivative is a probability minus a target: the images of a batch can be told.

    ``dL/dlogits = (mass * link(logits) - targets) / divisor``, in which mass, targets and divisor
    are functions of the labels alone. With the logits ``W x + b`` of a fully connected head that is
    what demixing, the scale of a head without bias and the counting of labels rest on.
    """

    @abstractmethod
    def link(self, logits: Tensor) -> Tensor:
        """Return the probabilities that the model gives, over the last dimension."""

    @abstractmethod
    def unlink(self, p: Tensor) -> Tensor:
        """Return logits that give the probabilities ``p``."""

    @abstractmethod
    def slope(self, p: Tensor, change: Tensor) -> Tensor:
        """Return how ``p = link(z)`` changes where ``z`` changes by ``change``."""

    def slopes(self, p: Tensor, directions: Tensor) -> Tensor:
        """Return :meth:`slope` in each of k directions, shape (..., outputs, k).

        Parameters
        ----------
        p : Tensor, shape (..., outputs)
        directions : Tensor, shape (k, outputs)
        """
        return self.slope(p.unsqueeze(-2), directions).mT

    def independent(self, outputs: int) -> int:
        """Return how many entries of an image's ``dL/dlogits`` do not follow from the others."""
        return outputs

    @abstractmethod
    def targets(self, labels: Tensor, outputs: int) -> Tensor:
        """Return the targets of labels of shape (...), float64, shape (..., outputs)."""

    def mass(self, labels: Tensor, outputs: int) -> Tensor | None:
        """Return what the probabilities of each image are multiplied by, (..., 1); None: 1."""
        return None

    @abstractmethod
    def divisor(self, labels: Tensor, outputs: int) -> Tensor | float:
        """Return what batches of labels, shape (..., B), are divided by, shape (..., 1, 1)."""

    @abstractmethod
    def counts(
        self, bias: Tensor, images: int, typical: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Estimate how often each label is in a batch.

        Parameters
        ----------
        bias : Tensor, shape (outputs,)
            Sum of ``dL/dlogits`` over the batch: the gradient of the head's bias.
        images : int
        typical : Tensor, shape (outputs,)
            Mean probabilities to be expected.

        Returns
        -------
        expected : Tensor, shape (classes,)
        least : Tensor, shape (classes,)
            What probabilities above zero alone demand, without rounding up.
        unit : Tensor, shape (classes,), or None
            How much of a count one image's worth of probability is; None: 1.
        """

    def cotangent(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.from_probabilities(self.link(logits), labels)

    def from_probabilities(self, p: Tensor, labels: Tensor) -> Tensor:
        """Return ``dL/dlogits`` for probabilities ``p``, shape (..., B, outputs)."""
        mass = self.mass(labels, p.shape[-1])
        e = (p if mass is None else mass.to(p) * p) - self.targets(labels, p.shape[-1]).to(p)
        return self._divided(e, labels)

    def pushed(self, p: Tensor, change: Tensor, labels: Tensor) -> Tensor:
        """Return how ``dL/dlogits`` changes where logits change, like ``p``."""
        mass, moved = self.mass(labels, p.shape[-1]), self.slope(p, change)
        return self._divided(moved if mass is None else mass.to(p) * moved, labels)

    def _divided(self, e: Tensor, labels: Tensor) -> Tensor:
        divisor = self.divisor(labels, e.shape[-1])
        if isinstance(divisor, Tensor):
            return e / divisor.to(e)
        return e if divisor == 1 else e / divisor


#: Classes of losses.
LOSSES: Registry[type[Loss]] = Registry("loss", "fedleak.losses")


def _alone(loss: CanonicalLoss, change: Tensor, labels: Tensor) -> Tensor:
    """Return what a change of probabilities is of ``dL/dlogits``, of images alone."""
    own = labels.unsqueeze(1)
    mass = loss.mass(own, change.shape[-1])
    moved = change.unsqueeze(1) if mass is None else mass.to(change) * change.unsqueeze(1)
    return loss._divided(moved, own).squeeze(1)


def _one_hot(labels: Tensor, outputs: int) -> Tensor:
    """Return targets of classes, also where ``torch.func`` transforms it."""
    places = torch.arange(outputs, device=labels.device)
    return (labels.unsqueeze(-1) == places).double()


def _demand_reduction(reduction: str) -> None:
    if reduction not in get_args(Reduction):
        raise InvalidInputError(f"reduction must be 'mean' or 'sum', not {reduction!r}")


@LOSSES.register("cross-entropy")
@dataclass(frozen=True)
class CrossEntropy(CanonicalLoss):
    """Softmax cross-entropy, as ``torch.nn.functional.cross_entropy``.

    Parameters
    ----------
    label_smoothing : float
        In [0, 1): this part of the target is spread over all classes.
    weight : tuple of float
        Of each class; empty for none.
    reduction : {"mean", "sum"}
        With weights the mean is divided by those of the batch's labels.
    """

    label_smoothing: float = 0.0
    weight: tuple[float, ...] = ()
    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        _demand_reduction(self.reduction)
        smoothing = self.label_smoothing
        if not (isinstance(smoothing, (int, float)) and 0 <= smoothing < 1):
            raise InvalidInputError(f"label_smoothing must be in [0, 1), not {smoothing!r}")
        object.__setattr__(self, "weight", tuple(float(w) for w in self.weight))
        if not all(math.isfinite(w) and w > 0 for w in self.weight):
            raise InvalidInputError(f"class weights must be above 0, not {self.weight}")

    @property
    def plain(self) -> bool:
        """Whether it is the mean without smoothing or weights."""
        return self == PLAIN

    def _weight(self, outputs: int, like: Tensor) -> Tensor | None:
        if not self.weight:
            return None
        if len(self.weight) != outputs:
            raise InvalidInputError(
                f"{len(self.weight)} class weights for a model with {outputs} outputs"
            )
        dtype = like.dtype if like.is_floating_point() else torch.float64
        return torch.tensor(self.weight, dtype=dtype, device=like.device)

    def _torch(self, logits: Tensor, labels: Tensor, reduction: str) -> Tensor:
        weight = self._weight(logits.shape[1], logits)
        return F.cross_entropy(
            logits, labels, weight, reduction=reduction, label_smoothing=self.label_smoothing
        )

    def each(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self._torch(logits, labels, "none")

    def counted(self, labels: Tensor) -> Tensor | None:
        # Of class probabilities, torch takes the plain mean.
        if not self.weight or labels.is_floating_point():
            return None
        weight = self._weight(len(self.weight), labels)
        assert weight is not None
        return weight[labels]

    def value(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self._torch(logits, labels, self.reduction)

    def link(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)

    def unlink(self, p: Tensor) -> Tensor:
        return p.log()

    def slope(self, p: Tensor, change: Tensor) -> Tensor:
        return p * (change - (p * change).sum(-1, keepdim=True))

    def slopes(self, p: Tensor, directions: Tensor) -> Tensor:
        return p.unsqueeze(-1) * (directions.mT - (p @ directions.mT).unsqueeze(-2))

    def classes(self, outputs: int) -> int:
        if outputs == 1:
            raise InvalidInputError(
                "the model has one output, of which a softmax has no gradient; say what clients "
                "minimise, as loss='bce'"
            )
        return outputs

    def curvature(self, logits: Tensor, labels: Tensor) -> Tensor:
        p = self.link(logits)
        return _alone(self, (1 - p) * p, labels)

    def independent(self, outputs: int) -> int:
        return outputs - 1  # they sum to zero

    def targets(self, labels: Tensor, outputs: int) -> Tensor:
        own = labels if labels.is_floating_point() else _one_hot(labels, outputs)
        if self.label_smoothing:
            own = (1 - self.label_smoothing) * own + self.label_smoothing / outputs
        weight = self._weight(outputs, own)
        return own if weight is None else own * weight

    def mass(self, labels: Tensor, outputs: int) -> Tensor | None:
        return self.targets(labels, outputs).sum(-1, keepdim=True) if self.weight else None

    def divisor(self, labels: Tensor, outputs: int) -> Tensor | float:
        if self.reduction == "sum":
            return 1.0
        counted = self.counted(labels)
        if counted is not None:
            return counted.sum(-1)[..., None, None]
        return labels.shape[-2 if labels.is_floating_point() else -1]

    def counts(
        self, bias: Tensor, images: int, typical: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if self.plain:
            return images * (typical - bias), -images * bias, None
        # D g_c = p_c sum_b mass_b - kept w_c n_c - spread w_c, with p_c alike for every image
        # and sum_b mass_b = kept S + spread sum_c w_c, S = sum_c w_c n_c; D is S or 1.
        outputs, smoothing = len(bias), self.label_smoothing
        weight = self._weight(outputs, bias)
        weight = torch.ones_like(bias) if weight is None else weight
        kept, spread = 1 - smoothing, images * smoothing / outputs
        mean = self.reduction == "mean"
        by_s = (typical * kept - (bias if mean else 0.0)) / (kept * weight)
        rest = spread * (typical * weight.sum() - weight) - (0.0 if mean else bias)
        rest = rest / (kept * weight)
        # Counts sum to the number of images, which is the one equation for S.
        low, high = images * weight.min(), images * weight.max()
        total = by_s.sum()
        s = (images - rest.sum()) / torch.where(total.abs() > 1e-12, total, 1e-12)
        s = torch.minimum(torch.maximum(s, low), high)
        # The divisor is S, at least that of the lightest labels, or one.
        least = (-bias * (low if mean else 1.0) - spread * weight) / (kept * weight)
        unit = (kept * s + spread * weight.sum()) / (kept * weight * images)
        return by_s * s + rest, least, unit


#: What is assumed where nothing else is said: the mean, without smoothing or weights.
PLAIN = CrossEntropy()


@LOSSES.register("bce")
@dataclass(frozen=True)
class BinaryCrossEntropy(CanonicalLoss):
    """Binary cross-entropy with logits, as ``torch.nn.BCEWithLogitsLoss``.

    With one output the label is 0 or 1. With several, the output of the label's class has the
    target 1 and all others 0. The mean is over images and outputs.

    Parameters
    ----------
    reduction : {"mean", "sum"}
    """

    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        _demand_reduction(self.reduction)

    def each(self, logits: Tensor, labels: Tensor) -> Tensor:
        own = self.targets(labels, logits.shape[1]).to(logits)
        losses = F.binary_cross_entropy_with_logits(logits, own, reduction="none")
        return losses.sum(1) if self.reduction == "sum" else losses.mean(1)

    def classes(self, outputs: int) -> int:
        return 2 if outputs == 1 else outputs

    def link(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()

    def unlink(self, p: Tensor) -> Tensor:
        return p.logit()

    def slope(self, p: Tensor, change: Tensor) -> Tensor:
        return p * (1 - p) * change

    def curvature(self, logits: Tensor, labels: Tensor) -> Tensor:
        p = self.link(logits)
        return _alone(self, (1 - p) * p, labels)

    def targets(self, labels: Tensor, outputs: int) -> Tensor:
        if labels.is_floating_point():
            return labels[..., 1:] if outputs == 1 and labels.shape[-1] == 2 else labels
        if outputs == 1:
            return labels.unsqueeze(-1).double()
        return _one_hot(labels, outputs)

    def divisor(self, labels: Tensor, outputs: int) -> Tensor | float:
        if self.reduction == "sum":
            return 1.0
        return outputs * labels.shape[-2 if labels.is_floating_point() else -1]

    def counts(
        self, bias: Tensor, images: int, typical: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        divisor = 1 if self.reduction == "sum" else images * len(bias)
        expected, least = images * typical - divisor * bias, -divisor * bias
        if len(bias) > 1:
            return expected, least, None
        # Probabilities below one bound the zeros from below.
        zeros = torch.stack([images - expected[0], expected[0]])
        return zeros, torch.stack([divisor * bias[0], least[0]]), None
