"""What is said of clients before they reply, and their replies read by it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Message
from torch import Tensor, nn

from fedleak.capture import Update
from fedleak.client.training import LocalTraining
from fedleak.defences import DefenceSpec, parse_defence
from fedleak.errors import InvalidInputError, InvalidUpdateError
from fedleak.terms import Terms, needs_gradients
from fedleak.threat import ThreatModel

#: What the server's message to a client holds beside the weights.
Config = Mapping[str, object]

Defended = DefenceSpec | str | None

#: Images of one update that a reply may claim.
_MANY = 100_000


@dataclass(frozen=True, eq=False)
class Declared:
    """What a server takes its clients to do: the same for all, or said of each by a callable.

    Parameters
    ----------
    input_shape, training, num_images, threat, labels_of, defence
        As for :class:`strategies.MaliciousServer`.

    Raises
    ------
    InvalidInputError
        If a value is none, the threat model grants what is not named here, or the defence does
        not go with what clients reply.
    """

    input_shape: tuple[int, int, int]
    training: LocalTraining | Callable[[int, int, Config], LocalTraining | None] | None
    num_images: int | Callable[[int, int, Config], int]
    threat: ThreatModel
    labels_of: Callable[[int, int], Sequence[int]] | None
    defence: DefenceSpec | Callable[[int, int, Config], Defended] | None

    def __post_init__(self) -> None:
        shape = self.input_shape
        sizes = tuple(shape) if isinstance(shape, Sequence) and not isinstance(shape, str) else ()
        if len(sizes) != 3 or not all(_counts(size) for size in sizes):
            raise InvalidInputError(
                f"input_shape must be (channels, height, width) of one image, not {shape!r}"
            )
        object.__setattr__(self, "input_shape", sizes)
        if not callable(self.num_images) and not _counts(self.num_images):
            raise InvalidInputError(
                f"num_images must be a whole number from 1, or a function, not {self.num_images!r}"
            )
        if not (self.training is None or callable(self.training)
                or isinstance(self.training, LocalTraining)):  # fmt: skip
            raise InvalidInputError(
                f"training must say what clients do, as LocalTraining(0.1), not {self.training!r}"
            )
        if self.threat.labels and self.labels_of is None:
            raise InvalidInputError("the threat model grants the labels; name them by labels_of")
        if self.threat.defence and self.defence is None:
            raise InvalidInputError("the threat model grants the defence; name it by defence")
        if isinstance(self.training, LocalTraining) and self.training.trains:
            # Here, not in the first round.
            needs_gradients(None if callable(self.defence) else self.defence)
        # Whoever names the defence grants it.
        object.__setattr__(self, "threat", replace(self.threat, defence=self.defence is not None))

    def of(
        self, server_round: int, node: int, config: Config
    ) -> tuple[LocalTraining | None, int, DefenceSpec | None]:
        """Return what one client does in one round, its number of images, and its defence."""

        def said(value: Any) -> Any:
            return value(server_round, node, config) if callable(value) else value

        training, defence = said(self.training), said(self.defence)
        if isinstance(defence, str):
            defence = parse_defence(defence)
        training = None if training is None else training.at(server_round, config)
        return training, said(self.num_images), defence

    def update(
        self,
        server_round: int,
        node: int,
        reply: Message | None,
        config: Config,
        sent: Mapping[str, Tensor],
        model: nn.Module,
    ) -> Update:
        """Return one client's update, read from its reply.

        Parameters
        ----------
        server_round, node : int
        reply : Message or None
            None if the client did not reply.
        config : dict
            What the client was told beside the weights.
        sent : dict of str to Tensor
            The weights that it was sent.
        model : nn.Module
            With these weights.

        Raises
        ------
        InvalidUpdateError
            If there is no update in it.
        InvalidInputError
            If what is declared cannot be.
        """
        received = _arrays(reply)
        training, images, defence = self.of(server_round, node, config)
        trains = training is not None and training.trains
        labels = None
        if self.threat.labels and self.labels_of is not None:
            labels = tuple(int(y) for y in self.labels_of(server_round, node))
        if self.threat.batch_size and not callable(self.num_images):
            images = _num_examples(reply) or images  # a reply knows its own better
        terms = Terms(
            input_shape=self.input_shape,
            num_images=images,
            labels=labels,
            threat=self.threat,
            training=training,
            shared="weights" if trains else "gradient",
            defence=defence,
        )
        like = model.state_dict() if trains else dict(model.named_parameters())
        return Update(server_round, (node,), dict(sent), named(to_tensors(received), like), terms)


def _counts(value: object) -> bool:
    """Whether a value is a whole number from 1."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def _arrays(reply: Message | None) -> ArrayRecord:
    """Return the arrays of a reply, or say why there are none."""
    if reply is None:
        raise InvalidUpdateError("the client did not reply")
    if reply.has_error():
        raise InvalidUpdateError(f"the client replied with an error: {reply.error.reason}")
    record = next(iter(reply.content.array_records.values()), None)
    if not record:
        raise InvalidUpdateError("the client's reply holds no arrays")
    return record


def _num_examples(reply: Message | None) -> int | None:
    """Return what the metrics of a reply say of its number of images, if anything."""
    for metrics in reply.content.metric_records.values() if reply is not None else ():
        told = metrics.get("num-examples")
        if not isinstance(told, (int, float)) or not 1 <= told <= _MANY:  # also no NaN
            continue
        if told == int(told):
            return int(told)
    return None


def named(arrays: dict[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name arrays that came as a plain list (``"0"``, ``"1"``, ...) after ``like``."""
    numbered = [str(i) for i in range(len(arrays))]
    if list(arrays) == numbered and len(arrays) == len(like) and set(arrays) != set(like):
        return dict(zip(like, arrays.values(), strict=True))
    return arrays


def to_tensors(record: ArrayRecord) -> dict[str, Tensor]:
    """Return the arrays of a record as tensors of their own."""
    return {name: torch.from_numpy(np.array(array.numpy())) for name, array in record.items()}
