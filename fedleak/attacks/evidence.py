"""Observations of one model, stacked for batched work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from fedleak import events
from fedleak.attacks.fit import compare, compare_signs, silent_tensors
from fedleak.attacks.head import informed
from fedleak.attacks.head.stacked import head_of, observed_labels
from fedleak.attacks.suspicions import Seen
from fedleak.attacks.suspicions.examination import examine
from fedleak.attacks.targets.statistics import received_statistics
from fedleak.client.local_replay import LocalReplay
from fedleak.client.loss import CanonicalLoss, Loss
from fedleak.client.replay import Replay
from fedleak.errors import InvalidInputError, UnsupportedModelError
from fedleak.observation import Observation
from fedleak.precision import WEIGHT
from fedleak.systems import Chain, Gradients
from fedleak.tensors import per_update
from fedleak.terms import Terms


@dataclass
class Evidence:
    """Observations of one model, stacked for batched work.

    Attributes
    ----------
    model : nn.Module
    terms : Terms
        Of all of them, without their labels.
    gradient : dict
        Observed gradients by parameter name, float64, shape (N, *parameter).
    labels : Tensor, int64, shape (N, B)
        Known, or inferred from the head's gradient.
    replay : Replay
        The client's step on any torch module, float64.
    granted : Tensor of bool, shape (N,)
        Whether the labels were known beforehand.
    simulated : LocalReplay or None
        All steps of the clients, where they take several and the attack simulates them;
        else one step is taken for the whole.
    plan : Tensor or None
        Shares of the images in the simulated steps, see :class:`LocalReplay`.
    errors : dict
        Standard deviation of every entry of ``gradient``, alike, where the attacker knows the
        defence; else empty.
    rescales : {"", "update", "tensor"}
        What of ``gradient`` is known up to a factor only, see :class:`Defence`.
    seen : list of Seen
        What each update shows that is not as declared.
    statistics : dict
        Statistics of batch normalisation over the batch, shape (N, channels), where they
        are known: see :func:`fedleak.attacks.statistics.received_statistics`.
    """

    model: nn.Module
    terms: Terms
    gradient: Gradients
    labels: Tensor
    replay: Replay
    granted: Tensor
    simulated: LocalReplay | None = None
    plan: Tensor | None = None
    statistics: Gradients = field(default_factory=dict)
    errors: Gradients = field(default_factory=dict)
    rescales: str = ""
    seen: list[Seen] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.seen = self.seen or [Seen()] * len(self.labels)

    @classmethod
    def gather(
        cls,
        observations: Sequence[Observation],
        device: str,
        infer: bool = True,
        simulate: bool = False,
        heavy: bool = True,
    ) -> Evidence:
        """Stack observations and infer the labels that are not known.

        Without ``infer`` the attack finds the labels itself: all are set to 0 until then.
        With ``simulate`` several local steps are simulated as such. An attack that is not
        ``heavy`` stays on the processor by default where there are few pixels.

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
        kinds = {(o.num_images, o.clients, o.training, o.defence) for o in observations}
        if len(kinds) > 1:
            raise InvalidInputError(
                "the observations of one attack must have one number of images, of clients, one "
                f"local training and one known defence, not {sorted(kinds, key=str)}"
            )
        pixels = first.num_images * math.prod(first.input_shape)
        where = resolve_device(device, None if heavy else len(observations) * pixels)
        names = first.gradient
        gradient = {n: torch.stack([o.gradient[n] for o in observations]).to(where) for n in names}
        errors = {
            n: torch.stack([o.errors[n] for o in observations]).to(where) for n in first.errors
        }
        rescales: str = "" if first.defence is None else first.defence.rescales
        replay = Replay(first.model, first.input_shape, device=where, client=first.training)
        if first.defence is not None and first.num_images > 1:
            replay = replay.clipped(first.defence.example_norm)
        seen = [Seen()] * len(observations)
        if not errors:
            gradient, seen, replay = examine(observations, gradient, replay)
        if infer:
            labels = observed_labels(observations, gradient, errors, replay)
            events.tell("labels", labels=labels.tolist())  # long before there are images
        else:
            labels = torch.zeros(
                len(observations), first.num_images, dtype=torch.int64, device=where
            )
        granted = torch.tensor([o.labels is not None for o in observations], device=where)
        simulated = None
        trained = first.terms.trained
        signs = trained is not None and trained.update_rule.signs
        # A replay of steps that are nearly signs has hardly a derivative: signs are matched.
        if simulate and trained is not None and first.terms.steps > 1 and not signs:
            # Without recomputation torch.func can transform it; one image needs no memory.
            simulated = LocalReplay(replay, trained, first.clients, first.num_images > 1)
        if rescales == "update" and infer and first.num_images == 1:
            gradient, errors, rescales = _unscaled(gradient, errors, labels, replay)
        return cls(
            first.model,
            replace(first.terms, labels=None),
            gradient,
            labels,
            replay,
            granted,
            simulated,
            statistics=received_statistics(observations, replay),
            errors=errors,
            rescales=rescales,
            seen=seen,
        )

    @cached_property
    def _chain(self) -> Chain | UnsupportedModelError:
        if self.simulated is not None:
            return UnsupportedModelError(
                "the update mixes several local steps; the linear systems cover one step"
            )
        try:
            chain = Chain.read(self.model, self.terms.input_shape, self.replay.client)
            chain.to(self.replay.device)
        except UnsupportedModelError as error:
            return error
        reason = self._why_not_demixed(chain) if self.num_images > 1 else ""
        return UnsupportedModelError(reason) if reason else chain

    def _why_not_demixed(self, chain: Chain) -> str:
        """Return why the images of a batch cannot be told apart at the head."""
        count, steps, head = self.num_images, self.terms.steps, chain.head
        features, classes = head.in_shape[0], head.out_shape[0]
        if steps > 1:
            return f"the update is the sum of {steps} local steps; the linear systems cover one"
        if not isinstance(chain.loss, CanonicalLoss):
            return (
                f"the update mixes {count} images, and under the loss {type(chain.loss).__name__} "
                "the head's gradient does not tell them apart"
            )
        apart = min(chain.loss.independent(classes), features)
        if count > apart:
            return (
                f"the update mixes {count} images; the head's gradient, with {classes} classes and "
                f"{features} features, tells at most {apart} apart"
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
    def num_images(self) -> int:
        """Number of images B behind each update."""
        return self.labels.shape[1]

    @property
    def steps(self) -> int:
        """Number of local steps that are simulated."""
        return 1 if self.simulated is None else self.terms.steps

    @property
    def signs(self) -> bool:
        """Whether only the signs of ``gradient`` are known to mean anything."""
        return self.terms.signs(bool(self.errors))

    def rounding(self, name: str) -> float:
        """Return the standard deviation of rounding in the entries of a parameter's gradient.

        Where it is a difference of float32 weights, beside the gradient's own; else 0.
        """
        training = self.terms.trained
        if training is None:
            return 0.0
        scale = training.rate * training.gain(self.terms.own)
        return WEIGHT * float(self.replay.parameters[name].square().mean().sqrt()) / scale

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
            errors={k: v[mask] for k, v in self.errors.items()},
            seen=[s for s, kept in zip(self.seen, _chosen(mask, len(self)), strict=True) if kept],
        )
        part.__dict__["_chain"] = self._chain  # read once
        part.__dict__["silent"] = {k: v[mask] for k, v in self.silent.items()}
        return part

    def divided(self, found: Sequence[Seen]) -> Evidence:
        """Return the same updates divided by factors that were found, which are known then."""
        factor = torch.tensor([f.factor for f in found]).to(next(iter(self.gradient.values())))
        if bool((factor == 1).all()) and not any(f.notes or f.doubts for f in found):
            return self

        def of(parts: Gradients, size: Tensor) -> Gradients:
            return {k: v / size.reshape(-1, *[1] * (v.dim() - 1)) for k, v in parts.items()}

        other = replace(
            self,
            gradient=of(self.gradient, factor),
            errors=of(self.errors, factor.abs()),
            # Where each image is clipped, a common factor is not the whole of it.
            rescales="" if self.rescales == "update" and not self.replay.clip else self.rescales,
            seen=[a.and_(b) for a, b in zip(self.seen, found, strict=True)],
        )
        other.__dict__["_chain"], other.__dict__["silent"] = self._chain, self.silent
        return other

    def with_images(self, images: int) -> Evidence:
        """Return the same observations as of another number of images, labels unknown."""
        labels = torch.zeros(len(self), images, dtype=torch.int64, device=self.labels.device)
        other = replace(self, labels=labels, terms=replace(self.terms, num_images=images))
        other.__dict__["silent"] = self.silent
        return other

    def with_loss(self, loss: Loss) -> Evidence:
        """Return the same observations as of clients with another loss."""
        other = replace(self, replay=self.replay.with_loss(loss))
        other.__dict__["silent"] = self.silent
        return other

    def with_errors(self, errors: Gradients) -> Evidence:
        """Return the same observations with other errors; what is silent stays what it is."""
        other = replace(self, errors=errors)
        other.__dict__["silent"] = self.silent
        return other

    def with_labels(self, labels: Tensor) -> Evidence:
        """Return the same observations with other labels, shape (N, B)."""
        other = replace(self, labels=labels)
        other.__dict__["_chain"], other.__dict__["silent"] = self._chain, self.silent
        return other

    def fit(self, images: Tensor) -> Tensor:
        """Return :attr:`Reconstruction.fit` of each update, shape (N,).

        Parameters
        ----------
        images : Tensor, shape (N, C, H, W) or (N, B, C, H, W)
        """
        return self.compare(images)[0]

    def compare(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return :meth:`fit`, and by what the update is larger than what images make, (N,)."""
        made = self.made(images)
        counted = {k: ~s for k, s in self.silent.items()}
        if self.signs:
            fit = compare_signs(made, self.gradient, counted)
            return fit, torch.ones_like(fit)
        return compare(made, self.gradient, counted, self.errors, self.told, self.scale)

    @property
    def scale(self) -> str:
        """Of what the factor is not known: ``update``, ``tensor`` or nothing."""
        unknown = self.terms.shared == "weights" and self.terms.trained is None
        return self.rescales or ("update" if unknown else "")

    @cached_property
    def silent(self) -> dict[str, Tensor]:
        """Whether tensors hold rounding only, whatever the images, masks of (N,) by name."""
        rounding = {k: self.rounding(k) for k in self.gradient}
        return silent_tensors(self.gradient, self.replay, self.num_images, rounding)

    def made(self, images: Tensor) -> Gradients:
        """Return what clients would have sent for these images, undefended."""
        if images.dim() == 4:
            images = images.unsqueeze(1)
        with torch.no_grad():
            if self.is_chain and self.num_images == 1:
                return self.chain.trace(images[:, 0], self.labels[:, 0]).gradients
            if self.simulated is not None:
                return self.simulated(images, self.labels, self.plan).gradients
            return self.replay(images, self.labels).gradients

    @cached_property
    def defended(self) -> bool:
        """Whether the attacker knows of errors in the update beyond rounding."""
        return bool(self.rescales) or any(
            bool((e.flatten(1).amax(1) > 1e-6 * g.flatten(1).abs().amax(1)).any())
            for e, g in zip(self.errors.values(), self.gradient.values(), strict=False)
        )

    @property
    def told(self) -> Gradients:
        """Where entries are not known to be dropped, masks by name; empty where unaware."""
        return {
            k: e.isfinite() & ((self.gradient[k] != 0) | (e == 0)) for k, e in self.errors.items()
        }

    @cached_property
    def whole(self) -> Tensor:
        """Whether every tensor is known exactly or not at all, as far as is known, (N,)."""
        if not self.errors:
            return torch.ones(len(self), dtype=torch.bool, device=self.labels.device)
        if self.rescales:
            return torch.zeros(len(self), dtype=torch.bool, device=self.labels.device)
        parts = []
        for name, error in self.errors.items():
            size = self.gradient[name].flatten(1).abs().amax(1, keepdim=True)
            exact, lost = error.flatten(1) <= 1e-6 * size, error.flatten(1).isinf()
            parts.append(exact.all(1) | lost.all(1))
        return torch.stack(parts).all(0)

    def misfit(self, images: Tensor, precision: float) -> Tensor:
        """Return how far the images' gradient is from the observed one, in known errors, (N,).

        Root mean square over what says anything; about 1 at the truth.

        Parameters
        ----------
        images : Tensor, shape (N, C, H, W) or (N, B, C, H, W)
        precision : float
            Error of an exact entry, relative to its tensor's root mean square.
        """
        total = count = torch.zeros(len(self), device=self.labels.device)
        made = self.made(images)
        for name, g in self.gradient.items():
            error, m = self.errors[name].flatten(1), made[name].flatten(1)
            told = error.isfinite()
            target = torch.where(told, g.flatten(1), 0.0)
            size = (target.square().sum(1) / told.sum(1).clamp_min(1)).sqrt().unsqueeze(1)
            weight = torch.where(told, 1 / error.maximum(precision * size).clamp_min(1e-300), 0.0)
            if self.rescales:
                factor = (weight**2 * m * target).sum(1) / (weight * m).square().sum(1)
                m = m * factor.nan_to_num(0.0).unsqueeze(1)
            total = total + ((m - target) * weight).square().sum(1)
            count = count + told.sum(1)
        return (total / count.clamp_min(1)).sqrt()


def _chosen(mask: Tensor, count: int) -> list[bool]:
    """Return which of so many a mask or an index chooses."""
    chosen = torch.zeros(count, dtype=torch.bool, device=mask.device)
    chosen[mask] = True
    return chosen.tolist()


def _unscaled(
    gradient: Gradients, errors: Gradients, labels: Tensor, replay: Replay
) -> tuple[Gradients, Gradients, str]:
    """Divide by the factor of clipping, where the head tells it."""
    head = head_of(gradient, errors, replay)
    if head is None or not bool(head.bias_errors.isfinite().any(1).all()):
        return gradient, errors, "update"
    factor = informed.scale(head, labels[:, 0])

    def divided(parts: Gradients) -> Gradients:
        return {k: v / per_update(factor, v) for k, v in parts.items()}

    return divided(gradient), divided(errors), ""


def relative(value: Tensor, target: Tensor) -> Tensor:
    """Return ``(value - target) / ||target||`` of each update, flattened to (N, n)."""
    flat = target.flatten(1)
    return (value.flatten(1) - flat) / flat.norm(dim=1, keepdim=True).clamp_min(1e-300)


#: Pixels up to which a card is slower than a processor for linear systems: one image of 32x32.
_FEW_PIXELS = 4096


def resolve_device(device: str, pixels: int | None = None) -> torch.device:
    """Return the torch device for a name.

    Parameters
    ----------
    device : str
        ``auto`` (CUDA where there is one), ``cpu``, ``cuda`` or ``cuda:N``.
    pixels : int, optional
        Of all images, for work that is a few small steps each: ``auto`` takes the processor for
        one small image, which would wait for a card's launches most of the time.

    Returns
    -------
    torch.device

    Raises
    ------
    InvalidInputError
        If the name is unknown or CUDA is asked for and not there.
    """
    if device == "auto":
        few = pixels is not None and pixels <= _FEW_PIXELS
        return torch.device("cuda" if torch.cuda.is_available() and not few else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise InvalidInputError(f"device {device!r} is not one of auto, cpu, cuda") from error
    if found.type not in ("cpu", "cuda"):
        raise InvalidInputError(f"device {device!r} is not one of auto, cpu, cuda")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise InvalidInputError("device 'cuda' is not available here; use 'auto' or 'cpu'")
    return found
