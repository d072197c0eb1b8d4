"""Whether a head's gradient is that of one image (rank one, ``G = g x^T``), and of which loss.

``x`` is the ratio of rows, whatever the loss; so the logits ``z = W x + b`` are known, and with
them what a declared loss makes of every label: ``g`` is that, a multiple of it, or another loss's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fedleak.attacks.suspicions.seen import Seen, by_factor
from fedleak.client.loss import PLAIN, BinaryCrossEntropy, CrossEntropy, Loss

#: Relative rounding of a float32 softmax, by the size of its logits.
_ROUNDING = 1e-6
#: Least tolerance, and the one above which nothing is said: noise hides what there is.
_LEAST, _MOST = 1e-5, 0.02
#: How near a label of binary cross-entropy must come to 0 or 1.
_BINARY = 1e-3

#: Relative size of singular values that are rounding, and how far they are below the others.
_NO_IMAGE, _DROP = 1e-5, 1e-2


def far_fewer(gradient: Tensor, images: int, rounding: float) -> Seen:
    """See that far fewer images are behind an update than were declared.

    The rank of the head's gradient ``E^T X`` is that of the least of images, features that are
    not zero, and classes less one; half of that is far below it. Asked of batches that the head
    does not tell apart: of others more is said.

    Parameters
    ----------
    gradient : Tensor, shape (classes, features)
        Of the head's weight.
    images : int
        As declared.
    rounding : float
        Standard deviation of the rounding of its entries.
    """
    active = int((gradient != 0).any(0).sum())
    most = min(len(gradient) - 1, active)
    if images <= most or most < 2:
        return Seen()
    values = torch.linalg.svdvals(gradient)
    floor = rounding * (len(gradient) ** 0.5 + active**0.5)
    small = values <= (_NO_IMAGE * values[0]).clamp_min(2 * floor)
    rank = int((~small).sum())
    if not 0 < 2 * rank <= most or float(values[rank]) > _DROP * float(values[rank - 1]):
        return Seen()
    return Seen(
        doubts=(
            f"the head's gradient has rank {rank}, and that of {images} images {most}: it is that "
            f"of {rank}, or the others are alike or have no loss; {images} were declared",
        )
    )


def one_image(
    gradient: Tensor,
    bias: Tensor,
    weight: Tensor,
    offset: Tensor,
    loss: Loss,
    label: int | None,
    rounding: float,
) -> Seen:
    """See the factor of an update of one image, its sign, and labels that no softmax made.

    Parameters
    ----------
    gradient, weight : Tensor, shape (classes, features)
        Of the head, observed and sent.
    bias, offset : Tensor, shape (classes,)
        Gradient of its bias, and the bias.
    loss : Loss
        As declared.
    label : int or None
        Where it is known.
    rounding : float
        Standard deviation of the rounding of the entries of ``bias``, beside its own.
    """
    size = bias.square().sum()
    if not float(size) > 0 or len(bias) < 2:
        return Seen()
    x = bias @ gradient / size
    rest = float((gradient - torch.outer(bias, x)).norm() / gradient.norm().clamp_min(1e-300))
    z = weight @ x + offset
    if not bool(z.isfinite().all()):
        return Seen()
    made = _of_every_label(z, loss)
    lengths = made.square().sum(1).clamp_min(1e-300)
    factors = made @ bias / lengths
    misses = (bias - factors.unsqueeze(1) * made).norm(dim=1) / size.sqrt()
    of_z = 1 + float(z.abs().max())
    wide = (_ROUNDING + 3 * rest) * of_z / lengths.sqrt().clamp(max=1.0)
    tolerance = wide + 10 * rounding * len(bias) ** 0.5 / float(size.sqrt()) + _LEAST
    allowed = misses < tolerance
    if label is not None:
        allowed &= torch.arange(len(bias), device=bias.device) == label
    if bool(allowed.any()):
        # Of two classes both labels explain it: the plain one, else one without a sign.
        plain = (factors - 1).abs() < 3 * tolerance
        rank = misses + 10.0 * ~allowed + 2.0 * (factors < 0) - 4.0 * plain
        best = int(rank.argmin())
        return Seen() if bool(plain[best]) else by_factor(float(factors[best]))
    if float(tolerance.min()) > _MOST:
        return Seen()
    return _other_loss(bias, z, float(tolerance.min()))


def _of_every_label(z: Tensor, loss: Loss) -> Tensor:
    """Return what the loss makes of the logits for every label, shape (labels, outputs)."""
    labels = torch.arange(loss.classes(len(z)), device=z.device)
    made = loss.alone(z.expand(len(labels), -1), labels)
    if loss == PLAIN:  # p - 1 without cancellation
        others = made * (1 - torch.eye(len(z)).to(z))
        made = torch.where(made < 0, -others.sum(1, keepdim=True), made)
    return made


def _other_loss(bias: Tensor, z: Tensor, tolerance: float) -> Seen:
    """See what may have made ``g``, which the declared loss did with no label."""
    said = "the head's gradient is that of no declared loss with one label"
    if abs(float(bias.sum())) < tolerance * float(bias.abs().sum()):
        smoothing, miss = _smoothed(bias, z)
        if miss < max(10 * tolerance, 1e-4) and 0 < smoothing < 1:
            near = round(smoothing, 3)
            found = near if abs(near - smoothing) < 1e-4 else smoothing
            note = f"cross-entropy with a label smoothing of {found:.4g} explains the update"
            return Seen(notes=(note,), loss=CrossEntropy(label_smoothing=found))
        targets = z.softmax(0) - bias
        if float(targets.min()) > -10 * tolerance - 1e-3:
            parts = ", ".join(
                f"{float(targets[c]):.2f} of class {int(c)}"
                for c in targets.argsort(descending=True)[:4]
                if float(targets[c]) > 0.02
            )
            return Seen(doubts=(f"{said}: its label is a mixture ({parts})",))
        return Seen(doubts=(f"{said}: class weights or another loss",))
    for reduction, times in (("mean", len(bias)), ("sum", 1)):
        targets = z.sigmoid() - times * bias
        if float((targets - targets.round()).abs().max()) < _BINARY:
            found_labels = targets.round().nonzero().flatten().tolist()
            if len(found_labels) != 1:
                what = f"binary cross-entropy with the labels {found_labels} explains it"
                return Seen(doubts=(f"{said}: {what}",))
            note = "binary cross-entropy explains the update"
            return Seen(notes=(note,), loss=BinaryCrossEntropy(reduction))  # type: ignore[arg-type]
    return Seen(doubts=(f"{said}: its entries do not sum to zero, as those of any softmax do",))


def _smoothed(bias: Tensor, z: Tensor) -> tuple[float, float]:
    """Return the label smoothing that explains ``g`` best, and the relative rest.

    ``g = a (p - (1 - s) y - s / C)``, linear in ``a`` and ``a (1 - s)``.
    """
    even = 1 / len(bias)
    p = z.softmax(0) - even
    found = (0.0, float("inf"))
    for y in range(len(bias)):
        target = F.one_hot(torch.tensor(y, device=bias.device), len(bias)).to(bias) - even
        basis = torch.stack([p, -target], 1)
        solved = torch.linalg.lstsq(basis, bias.unsqueeze(1)).solution
        miss = float((basis @ solved - bias.unsqueeze(1)).norm() / bias.norm())
        scale, kept = solved.flatten().tolist()
        if miss < found[1] and scale:
            found = (1 - kept / scale, miss)
    return found
