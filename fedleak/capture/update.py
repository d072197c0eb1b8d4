"""What a server received, before anything is computed from it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from fedleak.errors import InvalidUpdateError
from fedleak.observation import Observation
from fedleak.terms import Terms, WithTerms


@dataclass(frozen=True, eq=False)
class Update(WithTerms):
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
    terms : Terms
        Number and shape of the images, what clients share and did, what the attacker knows;
        each of these can be read from the update itself, as ``images``.
    summed : bool
        Whether ``received`` is the mean gradient over all ``nodes``, as
        :meth:`Observation.sum_of` makes it, and not one client's message.
    place : int
        Of its client among those asked in the round, or 0 of a sum.
    """

    server_round: int
    nodes: tuple[int, ...]
    sent: dict[str, Tensor] = field(repr=False)
    received: dict[str, Tensor] = field(repr=False)
    terms: Terms
    summed: bool = False
    place: int = 0

    @classmethod
    def of_sum(
        cls, server_round: int, nodes: tuple[int, ...], sent: dict[str, Tensor], total: Observation
    ) -> Update:
        """Return the update that is left under secure aggregation: the sum alone.

        What a defence did to the parts is not known of their sum.
        """
        terms = replace(total.terms, threat=replace(total.threat, defence=False), defence=None)
        received = {**total.gradient, **total.buffers}
        return cls(server_round, nodes, sent, received, terms, summed=True)

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
        return replace(self._observe(model), place=(self.server_round, self.place))

    def _observe(self, model: nn.Module) -> Observation:
        if not self.summed:
            return Observation.of(model, self.received, self.terms)
        # The sum of weights was made into one of gradients before.
        seen = Observation.of(model, self.received, replace(self.terms, shared="gradient"))
        buffers = {n: self.received[n] for n, _ in model.named_buffers() if n in self.received}
        return replace(seen, terms=self.terms, buffers=buffers)


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
