"""What candidate images must reproduce."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedleak.attacks.evidence import Evidence
from fedleak.attacks.targets.statistics import batch_statistics
from fedleak.systems import Affine
from fedleak.systems.dense import dense_system
from fedleak.tensors import per_update

if TYPE_CHECKING:  # attacks, which are what asks
    from fedleak.attacks.linear import LinearSolution

#: Relative error at which values count, at least, where there is no Jacobian, and where evidence
#: is weighed.
QUASI_LEVEL = 1e-2
#: Width of the soft sign, in mean magnitudes, and the error that signs count with.
SOFT, SOFT_ERROR = 0.5, 0.2


class Target(ABC):
    """What candidate images must reproduce, for N updates.

    Attributes
    ----------
    values : Tensor, shape (N, m)
        The known values, each tensor divided by its root mean square.
    errors : Tensor, shape (N, m)
        Standard deviations that they are known with, in the same units.
    """

    values: Tensor
    errors: Tensor
    #: Whether what images make is affine in them: one Jacobian is then enough.
    linear: bool = False
    #: Whether the errors are known, and not only estimated from the update.
    calibrated: bool = False
    #: Whether a Jacobian says enough to step by.
    dense: bool = True
    #: Unknowns of each update beside its images: standard normal before anything is known.
    hidden: int = 0
    #: Updates of different rounds that it is made of.
    rounds: int = 1

    def __len__(self) -> int:
        return len(self.values)

    def _known(self, values: list[Tensor], errors: list[Tensor]) -> None:
        """Set ``values`` and ``errors``; a tensor that is all zero says nothing.

        Nor does an entry of infinite error: what no update tells is left out.
        """
        told = [e.expand_as(v).flatten(1).isfinite() for e, v in zip(errors, values, strict=True)]
        sizes = [
            (torch.where(t, v.flatten(1), 0.0).square().sum(1, keepdim=True)
             / t.sum(1, keepdim=True).clamp_min(1)).sqrt()
            for t, v in zip(told, values, strict=True)
        ]  # fmt: skip
        self._sizes = [torch.where(s > 0, s, torch.inf) for s in sizes]
        any_told = torch.cat(told, 1).any(0)
        self._kept = None if bool(any_told.all()) else any_told.nonzero().flatten()
        self.values = self._joined(values)
        known = [
            torch.where(t, e.expand_as(v).flatten(1), 0.0)
            for t, e, v in zip(told, errors, values, strict=True)
        ]
        lost = self._joined(
            [
                torch.where(t, 0.0, torch.inf) * s.clamp(max=1.0)
                for t, s in zip(told, self._sizes, strict=True)
            ]
        ).nan_to_num(torch.inf)
        self.errors = self._joined(known) + lost

    def _joined(self, tensors: list[Tensor]) -> Tensor:
        rows = [t.flatten(1) / s for t, s in zip(tensors, self._sizes, strict=True)]
        joined = torch.cat(rows, 1)
        return joined if self._kept is None else joined[:, self._kept]

    def misfit(self, images: Tensor, precision: float) -> Tensor:
        """Return how far images are from the known values, in units of the errors, (N,)."""
        with torch.no_grad():
            rest = (self.made(images) - self.values) / self.errors.clamp_min(precision)
        return rest.square().mean(1).sqrt()

    def constant_jacobian(self) -> Tensor | None:
        """Return the Jacobian of :meth:`made`, shape (N, m, n), where it is known beforehand."""
        return None

    @abstractmethod
    def made(self, images: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Return what ``images``, shape (N, B, C, H, W), make of it, shape (N, m)."""

    @abstractmethod
    def subset(self, index: Tensor) -> Target:
        """Return the part of the updates in ``index``."""


class ChainTarget(Target):
    """Known values above the first ``depth`` layers of a chain, and the gradients below.

    With ``exact`` the backward pass starts from what is known there; else from the image's
    own logits.
    """

    def __init__(self, evidence: Evidence, solution: LinearSolution, depth: int, exact: bool):
        self.evidence, self.solution = evidence, solution
        self.depth, self.exact = depth, exact
        self.calibrated = evidence.defended and not exact
        self.linear = exact and depth <= evidence.chain.lead + 1
        names = {layer.name for layer in evidence.chain.layers[:depth]}
        self.names = [n for n in evidence.gradient if n.rpartition(".")[0] in names]
        gradients = [evidence.gradient[n] for n in self.names]
        noise = solution.noise_below(depth)

        def error(name: str) -> Tensor:
            g = evidence.gradient[name]
            if evidence.defended:
                return evidence.errors[name]
            size = g.flatten(1).square().mean(1).sqrt() * noise
            return per_update(size, g)

        self._known(
            [self._together(solution.values[depth]), *gradients],
            [self._together(solution.deviations[depth]), *(error(n) for n in self.names)],
        )

    def _together(self, each: Tensor) -> Tensor:
        """Return values of (N * B, ...) as (N, B, ...)."""
        return each.unflatten(0, (-1, self.evidence.num_images))

    def made(self, images: Tensor, hidden: Tensor | None = None) -> Tensor:
        chain = self.evidence.chain
        inputs = chain.features(images.flatten(0, 1), self.depth)
        if self.exact:
            above = self.solution.cotangents[self.depth]
        else:
            logits = chain.head.forward(inputs[-1])
            e = chain.loss.cotangent(self._together(logits), self.evidence.labels).flatten(0, 1)
            above = chain.head.backward(inputs[-1], logits, e)
        gradients = chain.backward(inputs, above).gradients
        shared = [self._together(gradients[n]).sum(1) for n in self.names]
        return self._joined([self._together(inputs[-1]), *shared])

    def constant_jacobian(self) -> Tensor | None:
        layer = self.evidence.chain.layers[0]
        alone = self.linear and self.depth == 1 and self.evidence.num_images == 1
        if not alone or not isinstance(layer, Affine) or len(layer.weight) > 1:
            return None
        systems = [dense_system(layer, e)[0] for e in self.solution.cotangents[1]]
        nothing = systems[0][0].new_zeros(layer.out_shape[0], layer.unknowns)
        parts = [torch.stack([a for a, _ in systems])]
        for name in self.names:  # a bias has the gradient that is known already
            is_weight = name == layer.weight_name
            parts.append(torch.stack([k if is_weight else nothing for _, k in systems]))
        rows = [p / s.unsqueeze(2) for p, s in zip(parts, self._sizes, strict=True)]
        joined = torch.cat(rows, 1)
        return joined if self._kept is None else joined[:, self._kept]

    def subset(self, index: Tensor) -> ChainTarget:
        part = self.evidence.subset(index), self.solution.subset(index)
        return ChainTarget(*part, self.depth, self.exact)


class ModuleTarget(Target):
    """Every gradient of any torch module, and the head's input where it is known."""

    def __init__(self, evidence: Evidence):
        self.evidence = evidence
        self.names = list(evidence.gradient)
        known = list(evidence.gradient.values())
        self.features = None if evidence.signs else _head_input(evidence)
        known += [] if self.features is None else [self.features]
        known += [] if evidence.signs else evidence.statistics.values()
        errors = [torch.zeros_like(k) for k in known]
        self.calibrated = evidence.defended
        if evidence.defended:
            errors[: len(self.names)] = [evidence.errors[n] for n in self.names]
        errors[: len(self.names)] = without_silent(evidence, errors[: len(self.names)])
        self._known(known, errors)

    def made(self, images: Tensor, hidden: Tensor | None = None) -> Tensor:
        replayed = self.evidence.replay(images, self.evidence.labels)
        made = [replayed.gradients[n] for n in self.names]
        if self.features is not None:
            assert replayed.head_input is not None
            made.append(replayed.head_input)
        names = list(self.evidence.statistics)
        if names:
            made += batch_statistics(self.evidence.replay, images, names).values()
        joined = self._joined(made)
        if not self.evidence.rescales:
            return joined
        weight = self.errors.clamp_min(QUASI_LEVEL) ** -2
        factor = (weight * joined * self.values).sum(1) / (weight * joined.square()).sum(1)
        return joined * factor.clamp_min(1e-12).unsqueeze(1)  # that of clipping, unknown

    def subset(self, index: Tensor) -> ModuleTarget:
        return ModuleTarget(self.evidence.subset(index))


def without_silent(evidence: Evidence, errors: list[Tensor]) -> list[Tensor]:
    """Return errors of the gradients, infinite of what is rounding only."""
    return [
        torch.where(per_update(evidence.silent[n], e), torch.inf, e)
        for n, e in zip(evidence.gradient, errors, strict=True)
    ]


class SignTarget(ModuleTarget):
    """The signs of every gradient, where a defence leaves no more.

    Of images' own gradient, each tensor is divided by its mean magnitude, so that no scale is
    compared, and a soft step takes the place of the sign: entries near zero may well have the
    other one.
    """

    dense = False

    def __init__(self, evidence: Evidence):
        super().__init__(evidence)
        self.values = self.values.sign()
        self.errors = torch.full_like(self.values, SOFT_ERROR)

    def _joined(self, tensors: list[Tensor]) -> Tensor:
        sizes = [t.flatten(1).abs().mean(1, keepdim=True).clamp_min(1e-300) for t in tensors]
        rows = [(t.flatten(1) / s / SOFT).tanh() for t, s in zip(tensors, sizes, strict=True)]
        joined = torch.cat(rows, 1)
        return joined if self._kept is None else joined[:, self._kept]

    def made(self, images: Tensor, hidden: Tensor | None = None) -> Tensor:
        replay = self.evidence.replay
        made = replay(images, self.evidence.labels).gradients
        taken, sent = replay.client.update_rule.taken, replay.parameters
        return self._joined([taken(made[n], sent[n]) for n in self.names])

    def subset(self, index: Tensor) -> SignTarget:
        return SignTarget(self.evidence.subset(index))


def _head_input(evidence: Evidence) -> Tensor | None:
    """Return the input of a fully connected head, exact for one image: ``G = g x^T``."""
    head = evidence.replay.head
    if head is None or evidence.num_images > 1 or evidence.defended:
        return None
    bias = evidence.gradient.get(f"{head}.bias")
    weight = evidence.gradient.get(f"{head}.weight")
    if bias is None or weight is None:
        return None
    total = bias.square().sum(1, keepdim=True).clamp_min(1e-300)
    return (torch.einsum("nc,ncf->nf", bias, weight) / total).unsqueeze(1)
