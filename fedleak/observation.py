"""What the attacker holds: the model as sent and the update as received."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fedleak.client.loss import PLAIN
from fedleak.client.optimiser import SGD
from fedleak.client.probe import probe
from fedleak.client.training import LocalTraining
from fedleak.defences import DefenceSpec
from fedleak.errors import InvalidInputError, InvalidUpdateError
from fedleak.modules import renamed, unwrapped
from fedleak.terms import Terms, WithTerms
from fedleak.threat import ThreatModel

#: Part of the entries below which sizes say less than the signs of all.
_FEW = 0.02
#: Largest entry that is attacked: float32 ends below it, and squares of more overflow.
_MOST = 1e100


@dataclass(frozen=True, eq=False)
class Observation(WithTerms):
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
    terms : Terms
        Number and shape of the images, what clients share and did, what the attacker knows;
        each of these can be read from the observation itself, as ``images``.
    buffers : dict of str to Tensor
        Statistics of batch normalisation that came along, where the threat model lets the
        attacker use them.
    errors : dict of str to Tensor
        Of an informed attacker: how far each entry of ``gradient`` may be from the true one,
        as a standard deviation; infinite where it says nothing. Empty otherwise.
    place : tuple of int
        Where the update stands among others, as (round, place in it): an attack that draws
        draws by it and its seed, so that the same update begins the same on every machine.
        Empty: its place among those that are attacked with it.
    """

    model: nn.Module = field(repr=False)
    gradient: dict[str, Tensor] = field(repr=False)
    terms: Terms
    buffers: dict[str, Tensor] = field(default_factory=dict, repr=False)
    errors: dict[str, Tensor] = field(default_factory=dict, repr=False)
    place: tuple[int, ...] = ()

    @classmethod
    def of(cls, model: nn.Module, received: Mapping[str, Any], terms: Terms) -> Observation:
        """Take what a client shared under ``terms``, and leave out what they do not grant.

        Parameters
        ----------
        model : nn.Module
            The model as sent; what wraps it (DataParallel, torch.compile, Opacus) is taken off.
        received : mapping
            Arrays or tensors by name: of a gradient, or of the weights after local training.
            Names may have a wrapper's prefix.
        terms : Terms
            ``training`` is what the client does, whether or not the attacker knows it.

        Raises
        ------
        InvalidInputError, UnsupportedModelError
            If the model is none that is attacked; see :func:`fedleak.client.probe.probe`.
        InvalidUpdateError
            If a parameter is missing, misshapen or not finite, or all of them are zero. What
            is frozen, unused or known to be withheld may be missing.
        """
        model = unwrapped(model)
        loss = PLAIN if terms.training is None else terms.training.criterion
        used = probe(model, terms.input_shape, loss).used
        received = {**_withheld(model, used, terms), **renamed(received, model.state_dict())}
        if terms.shared == "weights":
            return cls._of_weights(model, used, received, terms)
        checked = _checked(model, used, received)
        errors = {} if terms.defence is None else _errors(terms.defence, checked)
        return cls(model, checked, terms, errors=errors)

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
        training: LocalTraining | None = None,
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
        training : LocalTraining, optional
            What the client minimises and how it normalises images; its ``reply`` is taken for a
            gradient. By default the mean cross-entropy of images as they are.

        Raises
        ------
        InvalidUpdateError
            If a parameter is missing, misshapen or not finite, or all of them are zero.
        """
        channels, height, width = input_shape
        known = None if labels is None else tuple(int(y) for y in labels)
        terms = Terms(
            input_shape=(channels, height, width),
            num_images=batch_size,
            labels=known,
            threat=threat or ThreatModel(labels=known is not None, defence=defence is not None),
            defence=defence,
            training=None if training is None else training.as_gradient(),
        )
        return cls.of(model, gradient, terms)

    @classmethod
    def from_weights(
        cls,
        model: nn.Module,
        weights: Mapping[str, Any],
        training: LocalTraining,
        input_shape: tuple[int, int, int],
        num_images: int | None = None,
        labels: Sequence[int] | None = None,
        threat: ThreatModel | None = None,
        defence: DefenceSpec | None = None,
    ) -> Observation:
        """Take weights, or the change of weights, that a client shared after local training.

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
            What the client does, as far as ``threat`` allows the attacker to know it;
            ``training.reply`` says whether it sent weights or a change.
        input_shape, labels, threat
            As for :meth:`from_gradient`.
        defence : DefenceSpec, optional
            What the client did to the change of its weights, where the attacker knows it.
        num_images : int, optional
            Images that the client trained on; by default one batch.

        Raises
        ------
        InvalidUpdateError
            As for :meth:`from_gradient`.
        """
        channels, height, width = input_shape
        known = None if labels is None else tuple(int(y) for y in labels)
        terms = Terms(
            input_shape=(channels, height, width),
            num_images=training.batch_size if num_images is None else num_images,
            labels=known,
            threat=threat or ThreatModel(labels=known is not None, defence=defence is not None),
            training=training,
            shared="weights",
            defence=defence,
        )
        return cls.of(model, weights, terms)

    @classmethod
    def _of_weights(
        cls, model: nn.Module, used: Sequence[str], received: Mapping[str, Any], terms: Terms
    ) -> Observation:
        training, threat = terms.training, terms.threat
        if training is None:
            raise InvalidInputError("weights are shared; say by training what the clients do")
        known = threat.learning_rate and threat.local_steps
        rate = training.rate if threat.learning_rate else 1.0
        gain = training.gain(terms.own) if threat.local_steps else 1.0
        # Without rate and steps the change itself, and with it the decay, has no known unit.
        optimiser = training.update_rule if known else SGD()
        change, moved, lost = {}, {}, {}
        for name, parameter in model.named_parameters():
            if name in received:
                came = _check(name, torch.as_tensor(received[name]), tuple(parameter.shape))
                sent = parameter.detach().cpu().double()
                moved[name] = -came if training.reply == "change" else sent - came
                change[name] = optimiser.one_step_view(moved[name], sent, rate, gain)
                error = optimiser.one_step_errors(moved[name], sent, rate, gain)
                if error is not None:
                    lost[name] = error
        gradient = _checked(model, used, change)
        buffers = {}
        for name, buffer in model.named_buffers() if threat.buffers else ():
            if name in received and buffer.is_floating_point():
                buffers[name] = _check(name, torch.as_tensor(received[name]), tuple(buffer.shape))
        if not known:
            terms = replace(terms, training=training.as_gradient())
        errors = {} if terms.defence is None else _errors(terms.defence, moved)
        errors = {k: e / (rate * gain) for k, e in errors.items() if k in gradient}
        if lost and terms.defence is None:
            told = sum(float(lost[k].isfinite().sum()) for k in gradient)
            if told >= _FEW * sum(g.numel() for g in gradient.values()):
                errors = {k: lost[k] for k in gradient}
            else:  # the signs of all entries say more than the sizes of so few
                gradient = {k: g.sign() for k, g in gradient.items()}
        return cls(model, gradient, terms, buffers, errors)

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

        def kind(o: Observation) -> Terms:
            return replace(o.terms, labels=None, num_images=o.clients)

        if any(o.model is not first.model or kind(o) != kind(first) for o in observations):
            raise InvalidInputError(
                "a sum is over updates of one model, one local training, one threat model and one "
                "defence"
            )
        if any(o.num_images != first.num_images or o.clients != 1 for o in observations):
            raise InvalidInputError("a sum is over clients with equally many images each")
        count = len(observations)

        def mean(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
            return {k: torch.stack([p[k] for p in parts]).mean(0) for k in parts[0]}

        known = [o.labels for o in observations]
        labels = None if None in known else tuple(y for part in known for y in part or ())
        terms = replace(
            first.terms,
            num_images=count * first.num_images,
            labels=labels,
            threat=replace(first.threat, view="sum"),
            clients=count,
        )
        errors = {
            k: torch.stack([o.errors[k] for o in observations]).square().sum(0).sqrt() / count
            for k in first.errors
        }
        return cls(
            first.model,
            mean([o.gradient for o in observations]),
            terms,
            mean([o.buffers for o in observations]),
            errors,
            (*first.place[:-1], 0) if first.place else (),
        )


def _errors(defence: DefenceSpec, received: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what an informed attacker knows of every entry, in full shape."""
    found = defence.errors(received)
    return {k: found[k].expand_as(v) for k, v in received.items()}


def _checked(
    model: nn.Module, used: Sequence[str], gradient: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return what a client sent of the parameters that get a gradient."""
    checked: dict[str, Tensor] = {}
    parameters = dict(model.named_parameters())
    for name in used:
        parameter = parameters[name]
        if name not in gradient:
            raise InvalidUpdateError(
                f"the update has no entry {name!r}; it has {', '.join(gradient) or 'none'}. What "
                "clients keep to themselves can be declared: frozen in the attacker's model, or "
                f"defence 'withhold:{name.rpartition('.')[0] or name}'"
            )
        checked[name] = _check(name, torch.as_tensor(gradient[name]), tuple(parameter.shape))
    if not any(bool(g.any()) for g in checked.values()):
        raise InvalidUpdateError("every entry of the update is zero: it says nothing")
    return checked


def _withheld(model: nn.Module, used: Sequence[str], terms: Terms) -> dict[str, Tensor]:
    """Return what comes of a parameter of which a known defence sends nothing: no change."""
    if terms.defence is None:
        return {}
    parameters = {n: p.detach() for n, p in model.named_parameters() if n in used}
    # Of an update without a zero, no other defence loses all.
    ones = {n: torch.ones(p.shape, dtype=torch.float64) for n, p in parameters.items()}
    lost = {n for n, e in terms.defence.errors(ones).items() if bool(e.isinf().all())}
    weights = terms.training is not None and terms.training.reply == "weights"
    still = parameters if weights else {n: 0 * v for n, v in ones.items()}
    return {n: still[n] for n in used if n in lost}


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
    if bool((value.abs() > _MOST).any()):
        raise InvalidUpdateError(
            f"entry {name!r} of the update has values beyond {_MOST:g}: no client computes such"
        )
    return value
