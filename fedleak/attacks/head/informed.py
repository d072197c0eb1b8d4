"""What an attacker who knows the defence makes of the head, each gradient weighed by its errors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedleak.client.loss import PLAIN, Loss
from fedleak.precision import HEAD_GRADIENT

#: The head's input and ``dL/dlogits`` are made from each other this often.
_ROUNDS = 8


@dataclass
class Head:
    """The gradients of a fully connected head, and how well they are known.

    Attributes
    ----------
    gradient, errors : Tensor, shape (N, classes, features)
        Of the weight, and the standard deviation of its entries.
    bias, bias_errors : Tensor, shape (N, classes)
        Of the bias; infinite errors where there is none.
    weight : Tensor, shape (classes, features)
    offset : Tensor, shape (classes,)
    loss : Loss
        What the clients minimise.
    """

    gradient: Tensor
    errors: Tensor
    bias: Tensor
    bias_errors: Tensor
    weight: Tensor
    offset: Tensor
    loss: Loss = PLAIN


def solve(head: Head, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Solve ``G = g x^T`` and, of cross-entropy, ``g = softmax(W x + b) - y`` for ``x`` and ``g``.

    Each feature ``x_f`` is the weighted least squares over the entries ``G_rf`` that say
    something, with the known error of each and that of ``g_r``; each ``g_r`` is the mean of
    what was received and what the softmax makes of ``x``, weighted alike.

    Parameters
    ----------
    head : Head
    label : Tensor, int64, shape (N,)

    Returns
    -------
    g : Tensor, shape (N, classes)
    x, deviation : Tensor, shape (N, features)
        A feature that nothing is known of is 0, and its deviation infinite.
    """
    g, of_g = _first(head, label)
    floor = HEAD_GRADIENT * _rms(head.gradient, head.errors)[:, :, None]
    variance = head.errors.square() + floor.square()
    x, deviation = _input(head.gradient, variance, g, of_g, torch.zeros_like(g[:, :1]))
    for _ in range(_ROUNDS):
        typical = _rms(x.unsqueeze(1), deviation.unsqueeze(1))
        spread = torch.where(deviation.isinf(), typical, deviation)
        logits = x @ head.weight.mT
        of_logits = (spread.square() @ head.weight.square().mT).sqrt()
        # The error of g along g is one factor of all features: it does not average out.
        factor = (of_g * g).norm(dim=1) / g.square().sum(1).clamp_min(1e-300)
        of_logits = torch.hypot(of_logits, factor[:, None] * logits.abs())
        slope = head.loss.curvature(logits + head.offset, label)
        of_made = (slope * of_logits).clamp_min(HEAD_GRADIENT) + 1e-300
        made = head.loss.alone(logits + head.offset, label)
        known = head.bias_errors.square() + (HEAD_GRADIENT * head.bias).square() + 1e-300
        # What is received counts where it contradicts: the loss may be another.
        share = torch.where(known.isinf(), 1.0, known / (known + of_made.square()))
        received = torch.where(known.isinf(), 0.0, head.bias)
        agrees = (made - received).abs() < 5 * (known.sqrt() + of_made)
        share = torch.where(agrees | known.isinf(), share, 0.0)
        g = share * made + (1 - share) * received
        of_g = torch.where(share > 0, of_made.square() * share, known).sqrt()
        x, deviation = _input(head.gradient, variance, g, of_g, x)
    return g, x, deviation


def scale(head: Head, label: Tensor) -> Tensor:
    """Return the factor that a clipped update was multiplied by, at most 1, shape (N,).

    ``x`` is the ratio of two rows of received values, so no factor is in it; the received
    bias gradient is the factor times ``dL/dlogits`` at ``W x + b``.
    """
    made = head.loss.alone(logits_of(head), label)
    weight = torch.where(head.bias_errors.isinf(), 0.0, 1.0)
    total = (weight * made.square()).sum(1).clamp_min(1e-300)
    return ((weight * made * head.bias).sum(1) / total).clamp(1e-12, 1.0)


def logits_of(head: Head) -> Tensor:
    """Return the logits of single images, (N, classes): no factor of the update is in them."""
    floor = HEAD_GRADIENT * _rms(head.gradient, head.errors)[:, :, None]
    variance = head.errors.square() + floor.square()
    x, _ = _input(head.gradient, variance, *_first(head, None), torch.zeros_like(head.bias[:, :1]))
    return x @ head.weight.mT + head.offset


def _first(head: Head, label: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return ``g`` and its errors to begin with: as received, or the left singular vector."""
    known = ~head.bias_errors.isinf()
    if bool(known.any(1).all()):
        return torch.where(known, head.bias, 0.0), torch.where(known, head.bias_errors, 1e150)
    told = torch.where(head.errors.isinf(), 0.0, head.gradient)
    u = torch.linalg.svd(told, full_matrices=False)[0][:, :, 0]
    if label is not None:  # about as large as at an undecided model
        place = label.unsqueeze(1).clamp(max=u.shape[1] - 1)
        own = u.gather(1, place) * (1 if u.shape[1] > 1 else 2 * label.unsqueeze(1) - 1)
        u = 0.9 * torch.where(own > 0, -1.0, 1.0) * u / own.abs().clamp_min(1e-3)
    return u, torch.full_like(u, HEAD_GRADIENT)


def _input(
    gradient: Tensor, variance: Tensor, g: Tensor, of_g: Tensor, x: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the head's input and its standard deviation, given ``g``."""
    weight = 1 / (variance + (of_g.unsqueeze(2) * x.unsqueeze(1)).square() + 1e-300)
    total = (weight * g.square().unsqueeze(2)).sum(1)
    told = total > 1e-290
    told_gradient = torch.where(variance.isinf(), 0.0, gradient)
    value = (weight * g.unsqueeze(2) * told_gradient).sum(1) / total.clamp_min(1e-300)
    return torch.where(told, value, 0.0), torch.where(told, total.rsqrt(), torch.inf)


def _rms(value: Tensor, errors: Tensor) -> Tensor:
    """Return the root mean square of what is told, shape (N, 1)."""
    told = ~errors.isinf()
    squares = torch.where(told, value, 0.0).square().flatten(1).sum(1)
    return (squares / told.flatten(1).sum(1).clamp_min(1)).sqrt().unsqueeze(1)
