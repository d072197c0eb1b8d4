"""What a server received, before anything is computed from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from fedleak.errors import InvalidUpdateError
from fedleak.modules import renamed, unwrapped
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
    """Load what was sent into ``model``, in place, and return what is inside its wrappers.

    Names may have a wrapper's prefix. What is frozen, or statistics that the clients' mode does
    not use, may be missing: then the model's own are the clients'.

    Raises
    ------
    InvalidUpdateError
        If names or shapes differ.
    """
    model = unwrapped(model)
    state = model.state_dict()
    fitting = renamed(sent, state)
    absent = _unknown(model, state, fitting)
    foreign = [n for n in fitting if n not in state]
    if absent or foreign:
        what = f"{absent[0]!r} is not sent" if absent else f"{foreign[0]!r} is not in the model"
        more = len(absent) + len(foreign) - 1
        raise InvalidUpdateError(
            f"what the server sends does not fit the attacker's model: {what}"
            + (f" ({more} more)" if more else "")
            + (
                ". What stays with the clients is not known to the server; what stays as the "
                "model has it is to be frozen there"
                if absent
                else ""
            )
        )
    try:
        model.load_state_dict(fitting, strict=False)
    except RuntimeError as error:
        shapes = " ".join(str(error).split())
        raise InvalidUpdateError(
            f"what the server sends does not fit the attacker's model: {shapes}"
        ) from error
    return model


def _unknown(
    model: nn.Module, state: Mapping[str, Tensor], sent: Mapping[str, Tensor]
) -> list[str]:
    """Return what is missing of what was sent, and is needed to know the clients' model."""
    own = {n for n, p in model.named_parameters() if not p.requires_grad}
    for name, module in model.named_modules():
        if module.training or not hasattr(module, "running_mean"):
            own |= {f"{name}.{b}".lstrip(".") for b in ("running_mean", "running_var")}
    tied = {t.data_ptr() for n, t in state.items() if n in sent and t.numel()}
    return [
        n
        for n, t in state.items()
        if n not in sent
        and n not in own
        and t.data_ptr() not in tied
        and not n.endswith("num_batches_tracked")
    ]
