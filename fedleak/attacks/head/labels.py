"""Which labels were in the batch: inferred from the head's gradient."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fedleak.client.loss import PLAIN, CanonicalLoss, Loss
from fedleak.errors import UnsupportedModelError

NO_HEAD = (
    "the labels cannot be inferred: the model's last layer is no fully connected layer with "
    "a bias; grant them to the attacker (label known)"
)


def infer_labels(
    bias: Tensor | None,
    weight: Tensor | None,
    images: int,
    typical: Tensor | None,
    loss: Loss | None = None,
) -> Tensor:
    """Infer the labels of each batch, in ascending order.

    With softmax cross-entropy the bias gradient of class ``c`` is ``mean_b p_bc - n_c / B``.
    For one image the true class is the only negative entry (iDLG, Zhao et al. 2020), and
    under noise the smallest. For more, the counts ``n_c`` follow from the mean probability,
    which the server estimates with images of its own; of the candidates, the likeliest is
    returned.

    Parameters
    ----------
    bias : Tensor or None, shape (N, classes)
        Gradient of the head's bias.
    weight : Tensor or None, shape (N, classes, features)
        Gradient of the head's weight: without a bias it gives the label of one image, since
        ``p - y`` sums to zero and so is largest, in size, at the label.
    images : int
        Batch size B.
    typical : Tensor, shape (classes,) or (N, classes), or None
        The model's mean class probabilities on images of the server's own; for batches.
    loss : Loss, optional
        By default the mean cross-entropy.

    Returns
    -------
    Tensor, int64, shape (N, B)

    Raises
    ------
    UnsupportedModelError
        If the head's gradient does not tell.
    """
    if bias is not None:
        if images == 1:
            return bias.argmin(1, keepdim=True)
        loss = loss or PLAIN
        if typical is None or not isinstance(loss, CanonicalLoss):
            raise UnsupportedModelError(no_counts(loss))
        each = zip(bias, typical.expand(len(bias), -1), strict=True)
        return torch.stack([next(label_candidates(g, images, p, loss)) for g, p in each])
    if weight is not None and images == 1:
        return weight.norm(dim=2).argmax(1, keepdim=True)
    raise UnsupportedModelError(NO_HEAD)


def no_counts(loss: Loss) -> str:
    """Return why the labels of a batch are not counted under a loss."""
    return (
        f"the labels of a batch cannot be counted under the loss {type(loss).__name__}, whose "
        "gradient at the head is no probability minus a target; grant them to the attacker"
    )


def label_candidates(
    bias: Tensor, images: int, typical: Tensor, loss: CanonicalLoss | None = None
) -> Iterator[Tensor]:
    """Yield the sets of labels that one bias gradient allows, the likeliest first.

    ``g_c = p_c - n_c / B`` with a mean probability ``0 < p_c < 1`` leaves the counts
    ``-B g_c < n_c < B (1 - g_c)``; how far ``p_c`` is from the typical probability, in units
    of its square root, orders what is left. So it is of the mean cross-entropy;
    :meth:`CanonicalLoss.counts` says it of others.

    Parameters
    ----------
    bias : Tensor, shape (classes,)
    images : int
        Batch size B.
    typical : Tensor, shape (classes,)
    loss : CanonicalLoss, optional

    Yields
    ------
    Tensor, int64, shape (B,)
        In ascending order.
    """
    expected, least, unit = (loss or PLAIN).counts(bias, images, typical)
    tolerance = 1e-4 * images
    least = (least - tolerance).ceil().clamp(0, images).long()
    if int(least.sum()) > images:  # noise: no counts are certain
        least = torch.zeros_like(least)
    if len(expected) > len(typical):  # one output has two labels
        typical = torch.cat([1 - typical, typical])
    scale = 1 / (images * typical).clamp_min(1e-3)
    scale = scale if unit is None else scale / unit.square()
    # Each label more of a class costs more than the one before, so that taking the cheapest
    # gives the likeliest counts, and exchanging few of the taken the next.
    extra = images - int(least.sum())
    places = torch.arange(1, images + 1, device=bias.device)
    above = ((least.unsqueeze(1) + places - expected.unsqueeze(1)).square()) * scale.unsqueeze(1)
    below = (least - expected).square() * scale
    price = torch.diff(torch.cat([below.unsqueeze(1), above], 1), dim=1)[:, :extra].tolist()

    def cost(counts: tuple[int, ...]) -> float:
        return sum(sum(line[:n]) for line, n in zip(price, counts, strict=True))

    taken = [0] * len(price)
    for _ in range(extra):
        free = [c for c, n in enumerate(taken) if n < extra]
        taken[min(free, key=lambda c: price[c][taken[c]])] += 1
    heap, seen = [(cost(tuple(taken)), tuple(taken))], {tuple(taken)}
    classes = torch.arange(len(price), device=bias.device)
    while heap:
        _, counts = heapq.heappop(heap)
        total = least + torch.tensor(counts, dtype=torch.int64, device=bias.device)
        yield classes.repeat_interleave(total)
        for i, n in enumerate(counts):
            for j in range(len(counts)) if n else ():
                if j == i or counts[j] == extra:
                    continue
                other = list(counts)
                other[i], other[j] = n - 1, counts[j] + 1
                key = tuple(other)
                if key not in seen:
                    seen.add(key)
                    heapq.heappush(heap, (cost(key), key))


#: Half of a typical probability over the variance of the mean one around it.
_SURE = 200.0


def labels_with_rest(
    bias: Tensor, sizes: tuple[int, int], counts: tuple[float, float], typical: Tensor
) -> Tensor:
    """Infer the labels of local steps whose last batch is smaller than the others.

    Of the mean cross-entropy an image of it counts for more. The numbers of both kinds of images
    in each class are the likeliest of all, found by going through the classes with what is used
    by then: mean probabilities are normally distributed around the typical ones, and labels are
    drawn one by one (without that, one image of the last batch is easily taken for several).
    Measured on digits, 100 images in batches of 32, six draws: 4 to 9 labels are wrong, 13 to 19
    where all images count alike.

    Parameters
    ----------
    bias : Tensor, shape (classes,)
        The one-step view of the head's bias.
    sizes : tuple of int
        Images in full batches, and in the last.
    counts : tuple of float
        What an image of either kind counts, so that ``bias`` is a mean probability minus the sum
        of its class.
    typical : Tensor, shape (classes,)

    Returns
    -------
    Tensor, int64, shape (B,)
        Those of full batches, then those of the last, ascending in each.
    """
    (full, last), (light, heavy) = sizes, counts
    expected, scale = (typical - bias).tolist(), (_SURE / typical.clamp_min(1e-3)).tolist()
    width = 3
    while True:
        cost = np.full((last + 1, full + 1), np.inf)
        cost[0, 0] = 0
        taken = np.zeros((len(expected), 2, last + 1, full + 1), dtype=np.int64)
        for c, e in enumerate(expected):
            before, cost = cost, np.full_like(cost, np.inf)
            for h in range(min(last, max(0, round(e / heavy)) + width) + 1):
                middle = max(0, round((e - h * heavy) / light))
                for n in range(max(0, middle - width), min(full, middle + width) + 1):
                    price = scale[c] * (e - h * heavy - n * light) ** 2
                    price += math.lgamma(n + 1) + math.lgamma(h + 1)
                    new = before[: last + 1 - h, : full + 1 - n] + price
                    better = new < cost[h:, n:]
                    cost[h:, n:][better] = new[better]
                    taken[c, 0, h:, n:][better], taken[c, 1, h:, n:][better] = h, n
        if np.isfinite(cost[last, full]):
            break
        width *= 2
    found: tuple[list[int], list[int]] = ([], [])
    for c in reversed(range(len(expected))):
        h, n = taken[c, :, last, full].tolist()
        found[0][:0], found[1][:0] = [c] * n, [c] * h
        last, full = last - h, full - n
    return torch.tensor([*found[0], *found[1]], device=bias.device)
