"""What a client does, as the protocol says it: stated, never assumed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fedleak.client.loss import LOSSES, PLAIN, Loss
from fedleak.client.optimiser import OPTIMISERS, SGD, Optimiser
from fedleak.errors import InvalidInputError
from fedleak.spelling import parse, spell

Mode = Literal["", "train", "eval"]
Reply = Literal["weights", "change", "gradient"]
#: A rate; one for each round; a function of the round; or the name under which the server sends it.
LearningRate = float | tuple[float, ...] | Callable[[int], float] | str


@dataclass(frozen=True)
class LocalTraining:
    """What a client does with its images: the declaration that attack and simulation share.

    Clients take minibatch steps and reply with their weights, or compute the gradient of one
    batch. Each epoch draws a new order of the client's images and cuts it into batches; the last
    one may be smaller.

    Attributes
    ----------
    learning_rate : float, tuple of float, callable or str
        Constant; of each round, the last one for all that follow; a function of the round (from
        1); or the name under which the server's message holds it. See :meth:`at`.
    batch_size : int
    epochs : int
        Passes over the client's images.
    momentum, weight_decay : float
        Of SGD, where no optimiser is named.
    optimiser : Optimiser, str or None
        ``"adam"`` or ``Adam(weight_decay=0.01)``; None for SGD.
    loss : Loss or str
        ``"cross-entropy:label_smoothing=0.1"`` for instance; by default the mean cross-entropy.
    reply : {"weights", "change", "gradient"}
        What clients send: their weights, ``new - old``, or the gradient of one batch.
    mean, std : tuple of float
        The model sees ``(x - mean) / std``, of each channel or of all; empty for images as they
        are, in [0, 1].
    norm : {"", "train", "eval"}
        Whether batch and instance normalisation take the statistics of the batch (``train``) or
        the running ones; empty: as the mode of the model is.
    max_norm : float
        Euclidean norm that the gradient of every step is cut to, over all parameters (as
        ``torch.nn.utils.clip_grad_norm_`` does); 0 for none. How large it was before is not
        known: where one step is behind an update, that is a factor, found as any other.
    proximal_mu : float or str
        Weighs FedProx's term ``mu / 2 * ||w - w_sent||^2`` (Li et al. 2020, eq. 2) beside the
        loss, at the weights that were sent no gradient; or the name under which the server's
        message holds it, ``"proximal-mu"`` of Flower's ``FedProx``. See :meth:`at`.

    Clients that accumulate the gradients of ``k`` batches before a step take batches of
    ``k * batch_size``: declare that size. Where they do not divide the sum by ``k`` the update is
    ``k`` times as large, a factor that is found.
    """

    learning_rate: LearningRate = 1.0
    batch_size: int = 1
    epochs: int = 1
    momentum: float = 0.0
    weight_decay: float = 0.0
    optimiser: Optimiser | str | None = field(default=None, kw_only=True)
    loss: Loss | str = field(default=PLAIN, kw_only=True)
    reply: Reply = field(default="weights", kw_only=True)
    mean: tuple[float, ...] = field(default=(), kw_only=True)
    std: tuple[float, ...] = field(default=(), kw_only=True)
    norm: Mode = field(default="", kw_only=True)
    max_norm: float = field(default=0.0, kw_only=True)
    proximal_mu: float | str = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("epochs", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InvalidInputError(
                    f"{name} must be a whole number from {least}, not {value!r}"
                )
        for name in ("momentum", "weight_decay"):
            value = getattr(self, name)
            if not _is_number(value):
                raise InvalidInputError(f"{name} must be a number, not {value!r}")
        if isinstance(self.learning_rate, list):
            object.__setattr__(self, "learning_rate", tuple(self.learning_rate))
        for rate in self._rates():
            if not _is_number(rate):
                raise InvalidInputError(f"learning_rate must be a number, not {rate!r}")
            if not math.isfinite(rate) or rate <= 0:
                raise InvalidInputError(f"learning_rate ({rate}) must be above 0")
        if not _is_number(self.max_norm) or not 0 <= self.max_norm < math.inf:
            raise InvalidInputError(f"max_norm must be a number from 0, not {self.max_norm!r}")
        mu = self.proximal_mu
        if not isinstance(mu, str) and (not _is_number(mu) or not 0 <= mu < math.inf):
            raise InvalidInputError(f"proximal_mu must be a number from 0, not {mu!r}")
        rates = (self.momentum, self.weight_decay)
        if not all(math.isfinite(r) and r >= 0 for r in rates):
            raise InvalidInputError(
                f"momentum ({self.momentum}) and weight_decay ({self.weight_decay}) must be at "
                "least 0"
            )
        if self.momentum >= 1:
            raise InvalidInputError(f"momentum must be below 1, not {self.momentum}")
        if isinstance(self.loss, str):
            object.__setattr__(self, "loss", parse(LOSSES, self.loss))
        if isinstance(self.optimiser, str):
            object.__setattr__(self, "optimiser", parse(OPTIMISERS, self.optimiser))
        if self.optimiser is not None and any(rates):
            raise InvalidInputError(
                "momentum and weight_decay are those of SGD where no optimiser is named; give them "
                "to the optimiser, as sgd:momentum=0.9"
            )
        if self.reply not in get_args(Reply):
            raise InvalidInputError(
                f"reply must be one of {', '.join(get_args(Reply))}, not {self.reply!r}"
            )
        if self.norm not in get_args(Mode):
            raise InvalidInputError(f"norm must be 'train', 'eval' or empty, not {self.norm!r}")
        self._check_normalisation()

    def _rates(self) -> tuple[Any, ...]:
        if isinstance(self.learning_rate, str):  # a name, and no number in quotation marks
            return () if self.learning_rate[:1].isalpha() else (self.learning_rate,)
        if callable(self.learning_rate):
            return ()
        rates = self.learning_rate
        if rates == ():
            raise InvalidInputError("learning_rate lists no rate; give one for each round")
        return rates if isinstance(rates, tuple) else (rates,)

    def _check_normalisation(self) -> None:
        for name in ("mean", "std"):
            value = getattr(self, name)
            value = (value,) if isinstance(value, (int, float)) else tuple(value)
            if not all(_is_number(v) and math.isfinite(v) for v in value):
                raise InvalidInputError(
                    f"{name} must be numbers, one for each channel, not {value}"
                )
            object.__setattr__(self, name, tuple(float(v) for v in value))
        if bool(self.mean) != bool(self.std) or 1 < len(self.mean) != len(self.std) > 1:
            raise InvalidInputError(
                f"mean {self.mean} and std {self.std} must both be given, for as many channels"
            )
        if not all(s > 0 for s in self.std):
            raise InvalidInputError(f"std must be above 0, not {self.std}")

    @property
    def update_rule(self) -> Optimiser:
        """How clients step: the optimiser, or SGD with momentum and weight decay."""
        if isinstance(self.optimiser, Optimiser):
            return self.optimiser
        return SGD(self.momentum, self.weight_decay)

    @property
    def told_rule(self) -> Optimiser | None:
        """The optimiser, where its kind alone says what a reply is: signs."""
        return self.update_rule if self.update_rule.signs else None

    @property
    def criterion(self) -> Loss:
        """What clients minimise."""
        assert isinstance(self.loss, Loss)
        return self.loss

    @property
    def rate(self) -> float:
        """The learning rate, where it is one number.

        Raises
        ------
        InvalidInputError
            If it is another in each round: see :meth:`at`.
        """
        if isinstance(self.learning_rate, (int, float)):
            return self.learning_rate
        raise InvalidInputError("the learning rate depends on the round; take training.at(round)")

    def at(self, server_round: int, message: Mapping[str, Any] | None = None) -> LocalTraining:
        """Return what clients do in one round, with its learning rate and proximal weight.

        Parameters
        ----------
        server_round : int
            From 1.
        message : mapping, optional
            What the server sends along with the weights: its ``ConfigRecord``.

        Raises
        ------
        InvalidInputError
            If the message does not hold what is named.
        """

        def held(what: str, name: str) -> float:
            if message is None or not _is_number(message.get(name)):
                known = ", ".join(map(str, message or ())) or "nothing"
                raise InvalidInputError(
                    f"{what} is said to be {name!r} of the server's message, which holds {known}"
                )
            return float(message[name])

        mu, rate = self.proximal_mu, self.learning_rate
        if isinstance(mu, str):
            return replace(self, proximal_mu=held("proximal_mu", mu)).at(server_round, message)
        if isinstance(rate, str):
            rate = held("the learning rate", rate)
        elif isinstance(rate, tuple):
            rate = rate[min(max(server_round, 1), len(rate)) - 1]
        elif callable(rate):
            rate = float(rate(server_round))
        else:
            return self
        return replace(self, learning_rate=rate)

    @property
    def mu(self) -> float:
        """The weight of FedProx's term, where it is a number.

        Raises
        ------
        InvalidInputError
            If it is named only: see :meth:`at`.
        """
        if isinstance(self.proximal_mu, str):
            raise InvalidInputError("proximal_mu stands in the message; take training.at(round)")
        return self.proximal_mu

    @property
    def trains(self) -> bool:
        """Whether clients step before they reply."""
        return self.reply != "gradient"

    def steps(self, images: int) -> int:
        """Return how many steps a client with ``images`` images takes."""
        return self.epochs * math.ceil(images / self.batch_size) if self.trains else 1

    def gain(self, images: int) -> float:
        """Return by how much the weights move for a constant gradient, in learning rates.

        The number of steps; more with momentum: step ``s`` moves by
        ``1 + momentum + ... + momentum^(s - 1)``. Less with FedProx's term, which pulls back.
        """
        return sum(self._moves(self.steps(images)))

    def _moves(self, steps: int) -> list[float]:
        """Return how far a gradient moves the weights, by the number of steps since."""
        moves = self.update_rule.moves(steps)
        if not self.mu:
            return moves
        left = max(0.0, 1 - self.rate * self.mu)  # of each step's way after one step more
        return [move * left**s for s, move in enumerate(moves)]

    def pace(self, images: int) -> list[tuple[float, float]]:
        """Return, for each step, its part of the update and how far the weights had come.

        Both are parts of one, for a constant gradient: with momentum early steps move more, and
        the weights are slow at first.
        """
        steps, gain = self.steps(images), self.gain(images)
        moves = self._moves(steps)
        return [(moves[steps - 1 - s] / gain, sum(moves[:s]) / gain) for s in range(steps)]

    def seen(self, images: Tensor) -> Tensor:
        """Return what the model sees of images, shape (..., C, H, W), with values in [0, 1]."""
        if not self.mean:
            return images
        mean, std = (
            torch.tensor(v, dtype=images.dtype, device=images.device).reshape(-1, 1, 1)
            for v in (self.mean, self.std)
        )
        return (images - mean) / std

    def in_mode(self, model: nn.Module) -> nn.Module:
        """Put normalisation layers into the mode that is declared, in place; return the model."""
        for module in model.modules() if self.norm else ():
            if isinstance(module, nn.modules.batchnorm._NormBase):
                module.training = self.norm == "train"
        return model

    def check_channels(self, channels: int) -> None:
        """Refuse a normalisation of another number of channels."""
        for name, value in (("mean", self.mean), ("std", self.std)):
            if len(value) not in (0, 1, channels):
                raise InvalidInputError(
                    f"{name} {value} is of {len(value)} channels, the images have {channels}"
                )

    def as_gradient(self) -> LocalTraining | None:
        """Return what is left where rate and steps are not known; None where that is nothing.

        Loss and normalisation are: the update is then a gradient up to a factor.
        """
        left = LocalTraining(
            optimiser=self.told_rule, loss=self.loss, reply="gradient", mean=self.mean,
            std=self.std, norm=self.norm, max_norm=self.max_norm,
        )  # fmt: skip
        return None if left == LocalTraining(reply="gradient") else left

    def to_dict(self) -> dict[str, Any]:
        """Return plain types, for JSON: loss and optimiser as text, defaults left out.

        Raises
        ------
        InvalidInputError
            If the learning rate is a function, or loss or optimiser have no registered name.
        """
        plain: dict[str, Any] = {"learning_rate": self.rate}
        for item in fields(self)[1:]:
            value = getattr(self, item.name)
            if not item.kw_only or value != item.default:
                plain[item.name] = list(value) if isinstance(value, tuple) else value
        if "loss" in plain:
            plain["loss"] = spell(LOSSES, self.criterion)
        if "optimiser" in plain:
            plain["optimiser"] = spell(OPTIMISERS, self.update_rule)
        return plain

    def __str__(self) -> str:
        return ", ".join(f"{k} {v}" for k, v in self.to_dict().items())


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
