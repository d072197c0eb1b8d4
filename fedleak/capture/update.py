"""What a server received, before anything is computed from it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from fedleak.defences import DefenceSpec
from fedleak.errors import InvalidUpdateError
from fedleak.observation import Observation, Shared
from fedleak.threat import HONEST, LocalTraining, ThreatModel


@dataclass(frozen=True, eq=False)
class Update:
    """One update as it came, with what the attacker knows of it.

    A live attack and one from a capture both make their observation here, so that they see
    the same, bit for bit.

    Attributes
    ----------
    server_round : int
    nodes : tuple of int
        Who sent it; above one where the server sees a sum.
    sent : dict of str to Tensor
        The state of the model that was sent, by name.
    received : dict of str to Tensor
        What came back, by name, in the type in which it came.
    input_shape, images, labels, threat, training
        As in :class:`Observation`; ``training`` is what clients that share weights do.
    summed : bool
        Whether ``received`` is the mean gradient over all ``nodes``, as
        :meth:`Observation.sum_of` makes it, and not one client's message.
    shared : {"gradient", "weights"}
        What clients sent, where only the sum of it is left.
    defence : DefenceSpec or None
        What clients did to it, where the attacker knows that. Of a sum alone it does not tell
        the errors, and so is not known.
    """

    server_round: int
    nodes: tuple[int, ...]
    sent: dict[str, Tensor] = field(repr=False)
    received: dict[str, Tensor] = field(repr=False)
    input_shape: tuple[int, int, int]
    images: int = 1
    labels: tuple[int, ...] | None = None
    threat: ThreatModel = HONEST
    training: LocalTraining | None = None
    summed: bool = False
    shared: Shared = "gradient"
    defence: DefenceSpec | None = None

    @classmethod
    def of_sum(
        cls, server_round: int, nodes: tuple[int, ...], sent: dict[str, Tensor], total: Observation
    ) -> Update:
        """Return the update that is left under secure aggregation: the sum alone."""
        return cls(
            server_round,
            nodes,
            sent,
            {**total.gradient, **total.buffers},
            total.input_shape,
            total.images,
            total.labels,
            replace(total.threat, defence=False),
            total.training,
            summed=True,
            shared=total.shared,
        )

    def observe(self, model: nn.Module) -> Observation:
        """Return what the attacker sees.

        Parameters
        ----------
        model : nn.Module
            Holds ``sent``; see :func:`load_sent`.

        Raises
        ------
        InvalidUpdateError
            If the update cannot be used: missing, misshapen or not finite.
        """
        if self.training is not None and not self.summed:
            return Observation.from_weights(
                model, self.received, self.training, self.input_shape, self.images,
                self.labels, self.threat, self.defence,
            )  # fmt: skip
        seen = Observation.from_gradient(
            model,
            self.received,
            self.input_shape,
            self.images,
            self.labels,
            self.threat,
            self.defence,
        )
        if not self.summed:
            return seen
        buffers = {n: self.received[n] for n, _ in model.named_buffers() if n in self.received}
        return replace(
            seen,
            training=self.training,
            shared=self.shared,
            clients=len(self.nodes),
            buffers=buffers,
        )


def load_sent(model: nn.Module, sent: dict[str, Tensor]) -> nn.Module:
    """Load what was sent into ``model``, in place, and return it.

    Raises
    ------
    InvalidUpdateError
        If names or shapes differ.
    """
    try:
        model.load_state_dict(sent)
    except RuntimeError as error:
        raise InvalidUpdateError(
            f"what the server sends does not fit the attacker's model: {error}"
        ) from error
    return model
