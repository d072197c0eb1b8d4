"""What an attack is, and how attacks are found and run."""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from fedleak.errors import FedleakError, InvalidInputError, UnsupportedModelError
from fedleak.observation import Observation
from fedleak.registry import Registry
from fedleak.systems import Chain, Gradients


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """What an attack made of one observation.

    Attributes
    ----------
    images : Tensor, float64, shape (B, C, H, W)
        On the CPU; values may lie outside [0, 1].
    labels : Tensor, int64, shape (B,)
        The inferred (or known) labels.
    fit : float
        Relative distance of the gradient of ``images`` to the observed one, root mean
        square over the parameter tensors: what the attacker knows of its own success.
    details : dict
        Plain values that say how it was done (ranks, residuals, noise level).
    """

    images: Tensor = field(repr=False)
    labels: Tensor
    fit: float
    details: dict[str, Any] = field(default_factory=dict)


class Attack(Protocol):
    """Turns observations of one round into reconstructions, many at once."""

    def __call__(self, observations: Sequence[Observation]) -> list[Reconstruction]:
        """Attack observations that share one model; one reconstruction for each."""
        ...


#: Classes of attacks. Their constructor arguments are the options a user may set.
ATTACKS: Registry[type[Attack]] = Registry("attack", "fedleak.attacks")


def make_attack(name: str, **options: Any) -> Attack:
    """Make an attack by name.

    Raises
    ------
    UnknownNameError
        If there is no such attack.
    InvalidInputError
        If the attack does not take an option or refuses its value.
    """
    kind = ATTACKS[name]
    try:
        return kind(**options)
    except TypeError as error:
        known = list(inspect.signature(kind).parameters)
        raise InvalidInputError(
            f"attack {name!r} does not take these options {options}: {error}. "
            f"Known: {', '.join(known) or 'none'}"
        ) from error


@dataclass(frozen=True)
class Outcome:
    """A reconstruction, or the reason why there is none, and the seconds it took."""

    reconstruction: Reconstruction | None
    reason: str
    seconds: float


def run_attack(attack: Attack, observations: Sequence[Observation]) -> list[Outcome]:
    """Attack all observations together; never raise.

    If the attack fails on all of them together, each is tried alone, so that one bad
    update costs only its own result.

    Returns
    -------
    list of Outcome
        One for each observation, in order; ``seconds`` is the shared time divided evenly.
    """
    if not observations:
        return []
    begin = time.perf_counter()
    try:
        done = list(attack(observations))
        if len(done) != len(observations):
            raise RuntimeError(f"{len(done)} results for {len(observations)} observations")
        for result, observation in zip(done, observations, strict=True):
            _check_result(result, observation)
    except Exception as error:  # whatever an attack does, the training must go on
        if len(observations) > 1:
            return [outcome for o in observations for outcome in run_attack(attack, [o])]
        expected = isinstance(error, FedleakError)
        reason = str(error) if expected else f"{type(error).__name__}: {error}"
        return [Outcome(None, reason, time.perf_counter() - begin)]
    share = (time.perf_counter() - begin) / len(observations)
    return [Outcome(r, "", share) for r in done]


def _check_result(result: Reconstruction, observation: Observation) -> None:
    if tuple(result.images.shape[1:]) != observation.input_shape:
        raise RuntimeError(
            f"the attack returned images of shape {tuple(result.images.shape[1:])}, not "
            f"{observation.input_shape}"
        )
    if not bool(result.images.isfinite().all()):
        raise RuntimeError("the attack diverged: its image holds NaN or infinite values")


@dataclass
class Evidence:
    """Observations of one model, stacked for batched work."""

    chain: Chain
    gradient: Gradients
    labels: Tensor

    @classmethod
    def gather(cls, observations: Sequence[Observation], device: str) -> Evidence:
        """Stack observations and infer the labels that are not known.

        With one image and softmax cross-entropy, the true class is the only one whose
        bias gradient ``p - 1`` is negative (iDLG, Zhao et al. 2020); under noise it is
        the smallest.

        Raises
        ------
        UnsupportedModelError
            If the model is no chain, has no biased head, or the batch is larger than 1.
        InvalidInputError
            If the observations are of different models.
        """
        first = observations[0]
        if any(o.model is not first.model for o in observations):
            raise InvalidInputError("the observations of one attack must share one model")
        most = max(o.images for o in observations)
        if most > 1:
            raise UnsupportedModelError(
                f"the update mixes {most} images (batch size times local steps); the linear "
                "systems cover one image for each update"
            )
        where = resolve_device(device)
        chain = Chain.read(first.model, first.input_shape).to(where)
        if chain.head.bias is None:
            raise UnsupportedModelError(
                f"head {chain.head.name!r} has no bias; its bias gradient is what the linear "
                "systems start from"
            )
        names = first.gradient
        gradient = {n: torch.stack([o.gradient[n] for o in observations]).to(where) for n in names}
        inferred = gradient[chain.head.bias_name].argmin(1)
        given = torch.tensor(
            [-1 if o.label is None else o.label for o in observations], device=where
        )
        return cls(chain, gradient, torch.where(given >= 0, given, inferred))

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, mask: Tensor) -> Evidence:
        """Return the observations where ``mask`` is true."""
        return Evidence(
            self.chain, {k: g[mask] for k, g in self.gradient.items()}, self.labels[mask]
        )

    def fit(self, images: Tensor) -> Tensor:
        """Return :attr:`Reconstruction.fit` of each image, shape (N,)."""
        with torch.no_grad():
            made = self.chain.trace(images, self.labels).gradients
        terms = [relative(made[k], g).square().sum(1) for k, g in self.gradient.items()]
        return torch.stack(terms).mean(0).sqrt()


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
