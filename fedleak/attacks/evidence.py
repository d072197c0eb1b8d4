"""Observations of one model, stacked for batched work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedleak.attacks.labels import infer_labels
from fedleak.attacks.statistics import received_statistics
from fedleak.errors import InvalidInputError, UnsupportedModelError
from fedleak.local_training import LocalReplay, typical_on_the_way
from fedleak.observation import Observation
from fedleak.replay import Replay
from fedleak.systems import Chain, Gradients
from fedleak.threat import LocalTraining

#: Standard deviation of the rounding of a float32 weight after a step, relative to the weight.
_ULP = 4e-8


@dataclass
class Evidence:
    """Observations of one model, stacked for batched work.

    Attributes
    ----------
    model : nn.Module
    input_shape : tuple of int
        Shape (C, H, W) of one image.
    gradient : dict
        Observed gradients by parameter name, float64, shape (N, *parameter).
    labels : Tensor, int64, shape (N, B)
        Known, or inferred from the head's gradient.
    replay : Replay
        The client's step on any torch module, float64.
    granted : Tensor of bool, shape (N,)
        Whether the labels were known beforehand.
    training : LocalTraining or None
        How the clients trained, where that is known and they share weights.
    clients : int
        Number of clients that each update is the mean of.
    simulated : LocalReplay or None
        All steps of the clients, where they take several and the attack simulates them;
        else one step is taken for the whole.
    plan : Tensor or None
        Shares of the images in the simulated steps, see :class:`LocalReplay`.
    statistics : dict
        Statistics of batch normalisation over the batch, shape (N, channels), where they
        are known: see :func:`fedleak.attacks.statistics.received_statistics`.
    """

    model: nn.Module
    input_shape: tuple[int, int, int]
    gradient: Gradients
    labels: Tensor
    replay: Replay
    granted: Tensor
    training: LocalTraining | None = None
    clients: int = 1
    simulated: LocalReplay | None = None
    plan: Tensor | None = None
    statistics: Gradients = field(default_factory=dict)

    @classmethod
    def gather(
        cls,
        observations: Sequence[Observation],
        device: str,
        infer: bool = True,
        simulate: bool = False,
    ) -> Evidence:
        """Stack observations and infer the labels that are not known.

        Without ``infer`` the attack finds the labels itself: all are set to 0 until then.
        With ``simulate`` several local steps are simulated as such.

        Raises
        ------
        UnsupportedModelError
            If the labels are neither known nor inferable.
        InvalidInputError
            If the observations are of different models or batch sizes.
        """
        first = observations[0]
        if any(o.model is not first.model for o in observations):
            raise InvalidInputError("the observations of one attack must share one model")
        kinds = {(o.images, o.clients, o.training) for o in observations}
        if len(kinds) > 1:
            raise InvalidInputError(
                "the observations of one attack must have one number of images, of clients and "
                f"one local training, not {sorted(kinds, key=str)}"
            )
        where = resolve_device(device)
        names = first.gradient
        gradient = {n: torch.stack([o.gradient[n] for o in observations]).to(where) for n in names}
        replay = Replay(first.model, first.input_shape, device=where)
        if infer:
            labels = _labels(observations, gradient, replay)
        else:
            labels = torch.zeros(len(observations), first.images, dtype=torch.int64, device=where)
        granted = torch.tensor([o.labels is not None for o in observations], device=where)
        training, own = first.training, first.images // first.clients
        simulated = None
        if simulate and training is not None and training.steps(own) > 1:
            # Without recomputation torch.func can transform it; one image needs no memory.
            simulated = LocalReplay(replay, training, first.clients, first.images > 1)
        return cls(
            first.model,
            first.input_shape,
            gradient,
            labels,
            replay,
            granted,
            training,
            first.clients,
            simulated,
            statistics=received_statistics(observations, replay),
        )

    @cached_property
    def _chain(self) -> Chain | UnsupportedModelError:
        if self.simulated is not None:
            return UnsupportedModelError(
                "the update mixes several local steps; the linear systems cover one step"
            )
        try:
            chain = Chain.read(self.model, self.input_shape).to(self.replay.device)
        except UnsupportedModelError as error:
            return error
        reason = self._why_not_demixed(chain) if self.images > 1 else ""
        return UnsupportedModelError(reason) if reason else chain

    def _why_not_demixed(self, chain: Chain) -> str:
        """Return why the images of a batch cannot be told apart at the head."""
        count, head = self.images, chain.head
        steps = 1 if self.training is None else self.training.steps(count // self.clients)
        features, classes = head.in_shape[0], head.out_shape[0]
        if steps > 1:
            return f"the update is the sum of {steps} local steps; the linear systems cover one"
        if count > min(classes - 1, features):
            return (
                f"the update mixes {count} images; the head's gradient, with {classes} classes and "
                f"{features} features, tells at most {min(classes - 1, features)} apart"
            )
        if head.bias is None:
            return f"the update mixes {count} images, and the head has no bias to tell them apart"
        return ""

    @property
    def is_chain(self) -> bool:
        """Whether the linear systems cover this model, batch size and local training."""
        return isinstance(self._chain, Chain)

    @property
    def why_not_chain(self) -> str:
        """Why the linear systems do not cover this; empty where they do."""
        return "" if isinstance(self._chain, Chain) else str(self._chain)

    @property
    def chain(self) -> Chain:
        """The model as a chain of layers with linear systems.

        Raises
        ------
        UnsupportedModelError
            If the model is no such chain, or an update mixes more than it tells apart.
        """
        if isinstance(self._chain, UnsupportedModelError):
            raise self._chain
        return self._chain

    @property
    def images(self) -> int:
        """Number of images B behind each update."""
        return self.labels.shape[1]

    @property
    def steps(self) -> int:
        """Number of local steps that are simulated."""
        if self.simulated is None:
            return 1
        return self.simulated.training.steps(self.images // self.clients)

    def rounding(self, name: str) -> float:
        """Return the standard deviation of rounding in the entries of a parameter's gradient.

        Where it is a difference of float32 weights, beside the gradient's own; else 0.
        """
        if self.training is None:
            return 0.0
        scale = self.training.learning_rate * self.training.gain(self.images // self.clients)
        return _ULP * float(self.replay.parameters[name].square().mean().sqrt()) / scale

    @property
    def floor(self) -> Tensor:
        """What rounding of the weights alone makes of :meth:`fit`, shape (N,)."""
        parts = [
            self.rounding(k) / g.flatten(1).square().mean(1).sqrt().clamp_min(1e-300)
            for k, g in self.gradient.items()
        ]
        return torch.stack(parts).square().mean(0).sqrt()

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, mask: Tensor) -> Evidence:
        """Return the observations where ``mask`` is true."""
        part = replace(
            self,
            gradient={k: g[mask] for k, g in self.gradient.items()},
            labels=self.labels[mask],
            granted=self.granted[mask],
            plan=None if self.plan is None else self.plan[mask],
            statistics={k: v[mask] for k, v in self.statistics.items()},
        )
        part.__dict__["_chain"] = self._chain  # read once
        return part

    def with_labels(self, labels: Tensor) -> Evidence:
        """Return the same observations with other labels, shape (N, B)."""
        other = replace(self, labels=labels)
        other.__dict__["_chain"] = self._chain  # read once
        return other

    def fit(self, images: Tensor) -> Tensor:
        """Return :attr:`Reconstruction.fit` of each update, shape (N,).

        Parameters
        ----------
        images : Tensor, shape (N, C, H, W) or (N, B, C, H, W)
        """
        if images.dim() == 4:
            images = images.unsqueeze(1)
        with torch.no_grad():
            if self.is_chain and self.images == 1:
                made = self.chain.trace(images[:, 0], self.labels[:, 0]).gradients
            elif self.simulated is not None:
                made = self.simulated(images, self.labels, self.plan).gradients
            else:
                made = self.replay(images, self.labels).gradients
        terms = [relative(made[k], g).square().sum(1) for k, g in self.gradient.items()]
        # A tensor that is zero was withheld or pruned away: it says nothing.
        told = torch.stack([g.flatten(1).any(1) for g in self.gradient.values()])
        squares = torch.where(told, torch.stack(terms), 0.0).sum(0)
        return (squares / told.sum(0).clamp_min(1)).sqrt()


def _labels(observations: Sequence[Observation], gradient: Gradients, replay: Replay) -> Tensor:
    images = observations[0].images
    known = [o.labels for o in observations]
    for labels in known:
        if labels is not None and len(labels) != images:
            raise InvalidInputError(f"{len(labels)} labels are known of {images} images")
        if labels is not None and not all(0 <= y < replay.classes for y in labels):
            raise InvalidInputError(
                f"known labels {labels} do not lie in 0 ... {replay.classes - 1}"
            )
    if all(labels is not None for labels in known):
        inferred = torch.zeros(len(known), images, dtype=torch.int64)
    else:
        prefix = f"{replay.head}." if replay.head else ""
        bias = gradient.get(f"{prefix}bias") if replay.head is not None else None
        weight = gradient.get(f"{prefix}weight") if replay.head is not None else None
        typical = typical_probabilities(replay)
        first = observations[0]
        own = first.images // first.clients
        if first.training is not None and first.training.steps(own) > 1:
            typical = typical_on_the_way(replay, gradient, first.training, own, grey(replay))
        inferred = infer_labels(bias, weight, images, typical)
        # Which client of a sum had which label is not known: spread them.
        inferred = inferred.reshape(len(known), -1, first.clients).mT.flatten(1)
    rows = [
        torch.tensor(y, device=inferred.device) if y is not None else inferred[n]
        for n, y in enumerate(known)
    ]
    return torch.stack(rows).to(replay.device)


def typical_probabilities(replay: Replay) -> Tensor:
    """Return the class probabilities to expect: half those of smooth random images, half even.

    Of 18 batches of a trained network, the true label counts were by the 44th candidate with
    such a mixture; with the model's probabilities of grey images alone, by the 104th.
    """
    channels, *size = replay.input_shape
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(64, channels, 4, 4, generator=generator).to(replay.device, replay.dtype)
    images = F.interpolate(coarse, tuple(size), mode="bilinear")
    with torch.no_grad():
        p = replay.model(images).softmax(1).mean(0)
    return 0.5 * p + 0.5 / len(p)


def grey(replay: Replay) -> Tensor:
    """Return grey images of every brightness, shape (9, C, H, W)."""
    levels = torch.linspace(0, 1, 9, dtype=replay.dtype, device=replay.device)
    return levels.reshape(-1, 1, 1, 1).expand(-1, *replay.input_shape)


def relative(value: Tensor, target: Tensor) -> Tensor:
    """Return ``(value - target) / ||target||`` of each update, flattened to (N, n)."""
    flat = target.flatten(1)
    return (value.flatten(1) - flat) / flat.norm(dim=1, keepdim=True).clamp_min(1e-300)


def resolve_device(device: str) -> torch.device:
    """Return the torch device for ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises
    ------
    InvalidInputError
        If the name is unknown or CUDA is asked for and not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise InvalidInputError(f"device {device!r} is not one of auto, cpu, cuda") from error
    if found.type not in ("cpu", "cuda"):
        raise InvalidInputError(f"device {device!r} is not one of auto, cpu, cuda")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise InvalidInputError("device 'cuda' is not available here; use 'auto' or 'cpu'")
    return found
