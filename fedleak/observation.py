"""What the attacker holds: the model as sent and the update as received."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedleak.defences import DefenceSpec
from fedleak.errors import InvalidInputError, InvalidUpdateError
from fedleak.threat import HONEST, LocalTraining, ThreatModel

Shared = Literal["gradient", "weights"]


@dataclass(frozen=True, eq=False)
class Observation:
    """One client's update, as an honest-but-curious server sees it.

    This is all that an attack receives: no image, no clean gradient, and no label
    unless the threat model grants it.

    Attributes
    ----------
    model : nn.Module
        The model with the weights that were sent to the client.
    gradient : dict of str to Tensor
        Mean gradient of the loss over the client's batch, by parameter name; or its best
        estimate where the client sent weights.
    input_shape : tuple of int
        Shape (C, H, W) of one image.
    images : int
        Number of images behind the update, of all its clients.
    labels : tuple of int or None
        The labels, where the threat model says that the server knows them.
    threat : ThreatModel
        What the attacker knows and may do.
    training : LocalTraining or None
        How the clients trained, where they share weights and the attacker knows it.
    shared : {"gradient", "weights"}
        What the clients sent.
    clients : int
        Number of clients that the update is the mean of: above 1 under secure aggregation.
    buffers : dict of str to Tensor
        Statistics of batch normalisation that came along, where the threat model lets the
        attacker use them.
    defence : DefenceSpec or None
        The clients' defence, where the threat model says that the server knows it.
    errors : dict of str to Tensor
        Of an informed attacker: how far each entry of ``gradient`` may be from the true one,
        as a standard deviation; infinite where it says nothing. Empty otherwise.
    """

    model: nn.Module = field(repr=False)
    gradient: dict[str, Tensor] = field(repr=False)
    input_shape: tuple[int, int, int]
    images: int = 1
    labels: tuple[int, ...] | None = None
    threat: ThreatModel = HONEST
    training: LocalTraining | None = None
    shared: Shared = "gradient"
    clients: int = 1
    buffers: dict[str, Tensor] = field(default_factory=dict, repr=False)
    defence: DefenceSpec | None = None
    errors: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.labels is not None and not self.threat.labels:
            raise InvalidInputError(
                f"labels {self.labels} are given, but the threat model does not let the attacker "
                "know them; pass threat=ThreatModel(labels=True)"
            )
        if self.defence is not None and not self.threat.defence:
            raise InvalidInputError(
                f"defence {self.defence.label!r} is given, but the threat model does not let the "
                "attacker know it; pass threat=ThreatModel(defence=True)"
            )
        for name in ("images", "clients"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidInputError(f"{name} must be a whole number from 1, not {value!r}")
        if self.images % self.clients:
            raise InvalidInputError(
                f"{self.images} images cannot be those of {self.clients} clients alike"
            )
        if self.clients > 1 and self.threat.view != "sum":
            raise InvalidInputError(
                f"an update of {self.clients} clients is a sum; pass ThreatModel(view='sum')"
            )

    @classmethod
    def from_gradient(
        cls,
        model: nn.Module,
        gradient: Mapping[str, Any],
        input_shape: tuple[int, int, int],
        batch_size: int = 1,
        labels: Sequence[int] | None = None,
        threat: ThreatModel | None = None,
        defence: DefenceSpec | None = None,
    ) -> Observation:
        """Take a gradient that a client shared.

        Parameters
        ----------
        model : nn.Module
            The model as sent.
        gradient : mapping
            Arrays or tensors by parameter name. Entries that are no parameters (buffers)
            are left out.
        input_shape, labels
            See the attributes.
        batch_size : int
            Number of images in the batch.
        threat : ThreatModel, optional
            By default an honest-but-curious server; labels and a defence that are given are
            known.
        defence : DefenceSpec, optional
            What the client did to the gradient, where the attacker knows it.

        Raises
        ------
        InvalidUpdateError
            If a parameter is missing, misshapen or not finite, or all of them are zero.
        """
        channels, height, width = input_shape
        known = None if labels is None else tuple(int(y) for y in labels)
        checked = _checked(model, gradient)
        return cls(
            model,
            checked,
            (channels, height, width),
            batch_size,
            known,
            threat or ThreatModel(labels=known is not None, defence=defence is not None),
            defence=defence,
            errors={} if defence is None else _errors(defence, checked),
        )

    @classmethod
    def from_weights(
        cls,
        model: nn.Module,
        weights: Mapping[str, Any],
        training: LocalTraining,
        input_shape: tuple[int, int, int],
        images: int | None = None,
        labels: Sequence[int] | None = None,
        threat: ThreatModel | None = None,
        defence: DefenceSpec | None = None,
    ) -> Observation:
        """Take weights that a client shared after local training.

        ``gradient`` is the one-step view ``(sent - received) / (learning_rate * gain)``
        without the weight decay: exact, up to rounding, for one step; the mean over the
        steps otherwise. What the threat model does not let the attacker know is left out:
        then the gradient is known up to a factor.

        Parameters
        ----------
        model : nn.Module
            The model as sent.
        weights : mapping
            Arrays or tensors by name, as received; buffers may be among them.
        training : LocalTraining
            What the client does, as far as ``threat`` allows the attacker to know it.
        input_shape, labels, threat
            As for :meth:`from_gradient`.
        defence : DefenceSpec, optional
            What the client did to the change of its weights, where the attacker knows it.
        images : int, optional
            Images that the client trained on; by default one batch.

        Raises
        ------
        InvalidUpdateError
            As for :meth:`from_gradient`.
        """
        threat = threat or ThreatModel(labels=labels is not None, defence=defence is not None)
        count = training.batch_size if images is None else images
        rate = training.learning_rate if threat.learning_rate else 1.0
        gain = training.gain(count) if threat.local_steps else 1.0
        decay = training.weight_decay if threat.learning_rate and threat.local_steps else 0.0
        change, moved = {}, {}
        for name, parameter in model.named_parameters():
            if name in weights:
                received = _check(name, torch.as_tensor(weights[name]), tuple(parameter.shape))
                sent = parameter.detach().cpu().double()
                moved[name] = sent - received
                change[name] = moved[name] / (rate * gain) - decay * sent
        seen = cls.from_gradient(model, change, input_shape, count, labels, threat)
        buffers = {}
        for name, buffer in model.named_buffers() if threat.buffers else ():
            if name in weights and buffer.is_floating_point():
                buffers[name] = _check(name, torch.as_tensor(weights[name]), tuple(buffer.shape))
        told = training if threat.learning_rate and threat.local_steps else None
        errors = {} if defence is None else _errors(defence, moved)
        return replace(
            seen,
            training=told,
            shared="weights",
            buffers=buffers,
            defence=defence,
            errors={k: e / (rate * gain) for k, e in errors.items() if k in seen.gradient},
        )

    @classmethod
    def sum_of(cls, observations: Sequence[Observation]) -> Observation:
        """Return what is left under secure aggregation: the sum over clients alone.

        The attacker gets nothing else; the aggregation is simulated here, before anything
        is attacked. The sum is divided by the number of clients.

        Parameters
        ----------
        observations : sequence of Observation
            Of one model, with equally many images each.

        Raises
        ------
        InvalidInputError
            If they are not.
        """
        if not observations:
            raise InvalidInputError("a sum is over at least one client's update; there is none")
        first = observations[0]

        def kind(o: Observation) -> tuple[Any, ...]:
            return o.training, o.shared, o.threat, o.input_shape, o.defence

        if any(o.model is not first.model or kind(o) != kind(first) for o in observations):
            raise InvalidInputError(
                "a sum is over updates of one model, one local training, one threat model and one "
                "defence"
            )
        if any(o.images != first.images or o.clients != 1 for o in observations):
            raise InvalidInputError("a sum is over clients with equally many images each")
        count = len(observations)

        def mean(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
            return {k: torch.stack([p[k] for p in parts]).mean(0) for k in parts[0]}

        known = [o.labels for o in observations]
        labels = None if None in known else tuple(y for part in known for y in part or ())
        return replace(
            first,
            gradient=mean([o.gradient for o in observations]),
            images=count * first.images,
            labels=labels,
            threat=replace(first.threat, view="sum"),
            clients=count,
            buffers=mean([o.buffers for o in observations]),
            errors={
                k: torch.stack([o.errors[k] for o in observations]).square().sum(0).sqrt() / count
                for k in first.errors
            },
        )


def _errors(defence: DefenceSpec, received: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what an informed attacker knows of every entry, in full shape."""
    found = defence.errors(received)
    return {k: found[k].expand_as(v) for k, v in received.items()}


def _checked(model: nn.Module, gradient: Mapping[str, Any]) -> dict[str, Tensor]:
    checked: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name not in gradient:
            raise InvalidUpdateError(
                f"the update has no entry {name!r}; it has {', '.join(gradient) or 'none'}"
            )
        checked[name] = _check(name, torch.as_tensor(gradient[name]), tuple(parameter.shape))
    if not any(bool(g.any()) for g in checked.values()):
        raise InvalidUpdateError("every entry of the update is zero: it says nothing")
    return checked


def _check(name: str, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(value.shape) != shape:
        raise InvalidUpdateError(
            f"entry {name!r} of the update has shape {tuple(value.shape)}, the model has {shape}"
        )
    if value.is_complex():
        raise InvalidUpdateError(f"entry {name!r} of the update is complex")
    value = value.detach().cpu().double()
    if not bool(value.isfinite().all()):
        bad = int((~value.isfinite()).sum())
        raise InvalidUpdateError(
            f"entry {name!r} of the update has {bad} values that are NaN or infinite"
        )
    return value
