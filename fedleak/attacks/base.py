"""What an attack is, and how attacks are found and run."""

from __future__ import annotations

import inspect
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fedleak import deadline, memory
from fedleak.attacks.suspicions.pixels import in_pixels
from fedleak.attacks.suspicions.unexplained import doubted
from fedleak.deadline import Deadline
from fedleak.errors import FedleakError
from fedleak.observation import Observation
from fedleak.priors import Prior, make_prior
from fedleak.registry import Registry, make
from fedleak.status import Status, status_of
from fedleak.threat import ThreatModel


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
        What of the update ``images`` leave unexplained, all that the attacker knows of its own
        success: near 0 at the truth, 1 where nothing is explained. The relative distance of
        their gradient to the observed one, root mean square over the tensors that say anything,
        at the factor between the two where the attacker does not know it, and beyond the noise
        that a known defence adds. With ``details["factor"]`` it was found to be multiplied.
    details : dict
        Plain values that say how it was done (ranks, residuals, noise level).
    threat : ThreatModel or None
        What the attacker was allowed to know and do.
    doubts : tuple of str
        What the update shows that the attack does not model: it is not what was declared; and
        that the images do not explain it.
    """

    images: Tensor = field(repr=False)
    labels: Tensor
    fit: float
    details: dict[str, Any] = field(default_factory=dict)
    threat: ThreatModel | None = None
    doubts: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What the update shows that is not as declared, and was taken into account."""
        return tuple(self.details.get("notes", ()))

    @property
    def certified(self) -> tuple[bool, ...]:
        """Whether the attack's own test proved each image; empty where it has none.

        A certificate of the whole update is one of all its images.
        """
        told = self.details.get("certified", ())
        each = [told] * len(self.images) if isinstance(told, bool) else list(told)
        return tuple(map(bool, each)) if len(each) == len(self.images) else ()

    @property
    def status(self) -> Status:
        """``ok``, or ``doubtful`` where there are :attr:`doubts`."""
        return status_of(True, bool(self.doubts))


class Attack(ABC):
    """Turns observations of one round into reconstructions, many at once."""

    def __call__(self, observations: Sequence[Observation]) -> list[Reconstruction]:
        """Attack observations that share one model; one reconstruction for each.

        Raises
        ------
        ForbiddenError
            If the attack needs more than the threat model of an observation allows.
        """
        if not observations:
            return []
        name = ATTACKS.name_of(type(self)) or type(self).__name__
        observations = placed(observations)
        for observation in observations:
            observation.threat.demand(self.needs(observation), f"attack {name!r}")
        results = self.reconstruct(observations)
        pixels = [in_pixels(r, o) for r, o in zip(results, observations, strict=True)]
        judged = doubted(pixels, observations, [r.images for r in results])
        return [replace(r, threat=o.threat) for r, o in zip(judged, observations, strict=True)]

    def needs(self, observation: Observation) -> set[str]:
        """Return what of :class:`ThreatModel` must be allowed to attack this observation."""
        return {"batch_size"} | (
            {"learning_rate", "local_steps"} if observation.shared == "weights" else set()
        )

    def image_prior(self, shape: tuple[int, int, int], device: torch.device | str) -> Prior:
        """Return what the attack expects of images where several rounds are solved as one.

        By default the data-free Gaussian prior; see :func:`fedleak.attacks.rounds.together`.
        """
        return make_prior("gaussian", shape, device)

    @abstractmethod
    def reconstruct(self, observations: Sequence[Observation]) -> list[Reconstruction]:
        """Attack observations that share one model, whose threat models allow it."""


def placed(observations: Sequence[Observation]) -> list[Observation]:
    """Return the observations, each with a place: where it has none, that in the sequence."""
    return [o if o.place else replace(o, place=(n,)) for n, o in enumerate(observations)]


#: Classes of attacks. Their constructor arguments are the options a user may set.
ATTACKS: Registry[type[Attack]] = Registry("attack", "fedleak.attacks")


def make_attack(name: str, **options: Any) -> Attack:
    """Make an attack by name.

    Parameters
    ----------
    name : str
        A registered name, as ``"hybrid"``.
    **options
        The attack's own, as ``steps=300``.

    Returns
    -------
    Attack

    Raises
    ------
    UnknownNameError
        If there is no such attack.
    InvalidInputError
        If the attack does not take an option or refuses its value.
    """
    made: Attack = make(ATTACKS, name, options)
    return made


def attack_for(
    name: str, options: Mapping[str, Any], device: str | None = None, seed: int | None = None
) -> Attack:
    """Make an attack with its own options, and the device and seed if it takes them.

    Parameters
    ----------
    name : str
        A registered name.
    options : mapping
        The attack's own; a device or seed among them stays.
    device : str, optional
        Where it computes.
    seed : int, optional
        Draws what it draws.

    Returns
    -------
    Attack

    Raises
    ------
    UnknownNameError, InvalidInputError
        As :func:`make_attack`.
    """
    taken = inspect.signature(ATTACKS[name]).parameters
    offered = {"device": device, "seed": seed}
    given = {k: v for k, v in offered.items() if v is not None and k in taken}
    return make_attack(name, **{**given, **options})


@dataclass(frozen=True)
class Outcome:
    """A reconstruction, or the reason why there is none, and the seconds it took.

    Attributes
    ----------
    reconstruction : Reconstruction or None
    reason : str
        Why there is none, or why it is doubtful: also that the time limit cut it short. Else
        empty.
    seconds : float
    """

    reconstruction: Reconstruction | None
    reason: str
    seconds: float


def run_attack(
    attack: Attack,
    observations: Sequence[Observation],
    seconds: float = deadline.DEFAULT_SECONDS,
    memory_gib: float = 0.0,
) -> list[Outcome]:
    """Attack all observations together; never raise.

    If the attack fails on all of them together, each is tried alone, so that one bad
    update costs only its own result.

    Parameters
    ----------
    attack : Attack
    observations : sequence of Observation
    seconds : float
        Allowed for each observation; 0: no limit. What is attacked together has the sum. An
        attack ends at the limit with the best it has by then (:mod:`fedleak.deadline`); it has
        failed where that explains nothing of the update.
    memory_gib : float
        Memory that may be taken beyond what is in use; 0: most of what is free
        (:mod:`fedleak.memory`).

    Returns
    -------
    list of Outcome
        One for each observation, in order; ``seconds`` is the shared time divided evenly.

    Raises
    ------
    InvalidInputError
        If ``seconds`` is negative or no number.
    """
    if not observations:
        return []
    observations = placed(observations)  # whoever is tried alone keeps its place
    with deadline.limit(seconds * len(observations)) as allowed, memory.limit(memory_gib):
        return _attempt(attack, observations, allowed)


def _attempt(
    attack: Attack, observations: Sequence[Observation], allowed: Deadline
) -> list[Outcome]:
    """Attack all observations together, else each alone."""
    begin = time.perf_counter()
    try:
        deadline.check()
        done = list(attack(observations))
        if len(done) != len(observations):
            raise RuntimeError(f"{len(done)} results for {len(observations)} observations")
        for result, observation in zip(done, observations, strict=True):
            _check_result(result, observation)
    except Exception as error:  # whatever an attack does, the training must go on
        if len(observations) > 1:
            return list(_each_alone(attack, observations))
        expected = isinstance(error, FedleakError)
        reason = str(error) if expected else f"{type(error).__name__}: {error}"
        if memory.exhausted(error):
            reason = f"memory: the attack takes more than is allowed or free ({error})"
        return [Outcome(None, reason, time.perf_counter() - begin)]
    share = (time.perf_counter() - begin) / len(observations)
    return [_outcome(r, allowed, share, len(done)) for r in done]


def _outcome(result: Reconstruction, allowed: Deadline, seconds: float, updates: int) -> Outcome:
    """Return what came of an attack, which its time limit may have stopped."""
    cut = cut_short(result, allowed, updates)
    if cut is not result and not result.fit < 1:
        labels = ", ".join(map(str, result.labels.tolist()))
        limit = _limit(allowed, updates)
        return Outcome(None, f"time: no image in {limit}; labels {labels}", seconds)
    return Outcome(cut, "; ".join(cut.doubts), seconds)


def _limit(allowed: Deadline, updates: int) -> str:
    """Return a time limit in words: that of updates which are attacked together is their sum."""
    return f"{allowed.seconds:.3g} s" + (f" for {updates} updates" if updates > 1 else "")


def cut_short(result: Reconstruction, allowed: Deadline, updates: int = 1) -> Reconstruction:
    """Return a reconstruction, with a doubt where the time limit stopped the attack."""
    if not allowed.hit and not result.details.get("cut_short"):
        return result
    cut = f"time: stopped at the limit of {_limit(allowed, updates)}, the best so far"
    return replace(result, doubts=(cut, *result.doubts))


def _each_alone(attack: Attack, observations: Sequence[Observation]) -> Iterator[Outcome]:
    for n, observation in enumerate(observations):
        with deadline.part(1 / (len(observations) - n)) as allowed:
            yield from _attempt(attack, [observation], allowed)


def _check_result(result: Reconstruction, observation: Observation) -> None:
    if tuple(result.images.shape[1:]) != observation.input_shape:
        raise RuntimeError(
            f"the attack returned images of shape {tuple(result.images.shape[1:])}, not "
            f"{observation.input_shape}"
        )
    if not bool(result.images.isfinite().all()):
        raise RuntimeError("the attack diverged: its image holds NaN or infinite values")
    if not math.isfinite(result.fit):
        raise RuntimeError(
            f"the attack diverged: the gradient of its image is no number (fit {result.fit})"
        )
