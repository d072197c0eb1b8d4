"""Predicted PSNR: what the best linear attack would recover from one update, without an attack.

The update is linearised around reference images: ``G(x + dx) = G(x) + J dx + noise``, with a
Gaussian prior ``N(mu, S)`` of images and errors of known size. What is left open of the image
has the covariance ``(S^-1 + J^T N^-1 J)^-1``; the predicted PSNR is ``-10 log10`` of its mean
diagonal. It holds for any torch module, defence and batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fedleak.client.replay import Replay
from fedleak.client.training import LocalTraining
from fedleak.defences import DefenceSpec, defend
from fedleak.errors import InvalidInputError, UnsupportedModelError
from fedleak.metric.jacobian import UpdateJacobian
from fedleak.metric.jacobian_rows import Block
from fedleak.metric.matrix_free import estimate
from fedleak.metric.posterior import Posterior, Prediction, mean_decibels, posterior
from fedleak.metric.reference import Reference, demand_judged, entry_errors
from fedleak.priors import GaussianPrior, Prior
from fedleak.solvers.box import MOST, into_box

#: The prior of natural images of about 32 pixels: see ``GaussianPrior`` for the terms.
NATURAL = {"rho": 0.96, "power": 1.0, "colour": 0.93, "sigma": 0.25, "mean": 0.5}
#: Unknowns (of all images of a batch) up to which the Jacobian is held in memory.
DENSE_PREDICTION = 6144
#: Errors drawn where images are held to [0, 1], and the PSNR from which that changes nothing.
_DRAWN, _EXACT_DB = 32, 90.0


def natural_prior(shape: tuple[int, int, int], device: torch.device | str = "cpu") -> Prior:
    """Return the data-free prior of predictions.

    It describes the images, not what an attack assumes: an exponential correlation over
    the distance of two pixels, 0.96 for neighbours.
    """
    return GaussianPrior(shape, adapt=False, device=device, **NATURAL)


def predict(
    references: Sequence[Reference], prior: Prior, blocks: Sequence[Sequence[Block]] | None = None
) -> Prediction:
    """Return the predicted PSNR and its bound.

    Parameters
    ----------
    references : sequence of Reference
    prior : Prior
        Of the images; Gaussian.
    blocks : sequence of sequence of Block, optional
        Those of the references, where they are at hand.
    """
    if not prior.gaussian:
        raise InvalidInputError(
            f"the prediction takes a Gaussian prior, not {prior}: gaussian or gaussian:learned"
        )
    shape = tuple(references[0].jacobian.images.shape)
    unknowns = references[0].jacobian.images.numel()
    if unknowns > DENSE_PREDICTION:
        return estimate(references, prior)
    factor = prior.dense().factor
    blocks = [r.blocks() for r in references] if blocks is None else blocks
    found = [posterior(b, factor, shape) for b in blocks]
    if len(found) == 1:
        bound: Posterior = found[0]
    else:  # the mean information of all references
        share = len(found) ** -0.5
        bound = posterior(
            [replace(b, rows=b.rows * share) for part in blocks for b in part], factor, shape
        )
    each = tuple(p.psnr_db for p in found)
    return Prediction(
        psnr_db=sum(each) / len(each),
        each_db=each,
        floor_db=bound.psnr_db,
        effective_dimensions=sum(p.effective_dimensions for p in found) / len(found),
        unknowns=unknowns,
        error_db=0.0,
        rms=torch.stack([p.variance for p in found]).mean(0).sqrt(),
    )


def leakage_db(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    client: LocalTraining | None = None,
    defence: DefenceSpec | None = None,
) -> Tensor:
    """Return the PSNR in dB predicted for each image of an update that a client would send.

    Of its own images, before it sends anything: what the client can know of its leakage.

    Parameters
    ----------
    model : nn.Module
        As received.
    images : Tensor, shape (B, C, H, W)
        In [0, 1].
    labels : Tensor, int64, shape (B,)
    client : LocalTraining, optional
        What the client does; one step.
    defence : DefenceSpec, optional
        What it does to the update, which the attacker knows.

    Returns
    -------
    Tensor, float64, shape (B,)

    Raises
    ------
    UnsupportedModelError
        If the client takes several steps, or the model cannot be judged.

    Notes
    -----
    Time grows with the square of all pixels: a Jacobian by them up to
    :data:`DENSE_PREDICTION`, an estimate from products with it beyond.
    """
    if client is not None and client.steps(len(images)) > 1:
        raise UnsupportedModelError("the update is the sum of several local steps")
    demand_judged(model)
    defence = defence or DefenceSpec()
    shape = (images.shape[1], images.shape[2], images.shape[3])
    jacobian = UpdateJacobian(Replay(model, shape, client=client), images, labels)
    sent = defend(jacobian.gradient, defence, 0)
    reference = Reference(jacobian, sent, entry_errors(jacobian.gradient, defence, sent))
    rms = predict([reference], natural_prior(shape)).rms
    return -10 * rms.square().flatten(1).mean(1).clamp_min(1e-300).log10()


def over_rounds(references: Sequence[Reference], prior: Prior) -> list[float]:
    """Return the predicted PSNR in dB after each of several rounds of the same images.

    Parameters
    ----------
    references : sequence of Reference
        One for each round: linearised at the same images, each under the model of its round,
        with the noise or the pruning of its update.
    prior : Prior
        Of the images; Gaussian.

    Returns
    -------
    list of float
        After 1, 2, ... rounds; the difference of two is what one more round buys.

    Raises
    ------
    InvalidInputError
        If the images have too many pixels for Jacobians in memory, or the prior is not Gaussian.

    Notes
    -----
    Independent rounds add up what they tell: their Jacobians stand one below the other, in units of
    their errors. Where every round tells all pixels, ``r`` rounds of noise buy ``10 log10(r)`` dB.

    An attacker knows that pixels lie in [0, 1], and many of them at 0 or 1 tell of the others.
    Up to :data:`fedleak.solvers.box.MOST` pixels, errors are drawn from what is left open, and
    each estimate is moved to the nearest image (:func:`fedleak.solvers.box.into_box`). Not where
    entries are dropped: pixels at 0 would stand in for them, which no attack here makes true.
    """
    shape = tuple(references[0].jacobian.images.shape)
    if references[0].jacobian.images.numel() > DENSE_PREDICTION or not prior.gaussian:
        raise InvalidInputError(
            f"rounds are predicted for at most {DENSE_PREDICTION} pixels and a Gaussian prior, not "
            f"for {references[0].jacobian.images.numel()} and {prior}"
        )
    factor, out, dropped = prior.dense().factor, [], False
    known = references[0].jacobian.images.new_zeros(0, references[0].jacobian.images.numel())
    for reference in references:
        rows = torch.cat([known.double(), *(b.rows.double() for b in reference.blocks())])
        if len(rows) > rows.shape[1]:  # as many rows as pixels say the same
            rows = torch.linalg.qr(rows, mode="r")[1]
        known = rows
        left = posterior([Block("rounds", "rounds", rows, len(rows))], factor, shape)
        dropped = dropped or any(bool(e.isinf().any()) for e in reference.errors.values())
        bounded = rows.shape[1] <= MOST and left.psnr_db < _EXACT_DB and not dropped
        images = references[0].jacobian.images
        out.append(_between_bounds(rows, factor, images) if bounded else left.psnr_db)
    return out


def _between_bounds(rows: Tensor, factor: Tensor, images: Tensor) -> float:
    """Return the PSNR in dB of estimates with these errors that are held to [0, 1]."""
    eye = torch.eye(len(factor)).to(factor)
    inverse = torch.linalg.solve_triangular(factor, eye, upper=False)
    expected = torch.block_diag(*[inverse] * len(images))
    root = torch.linalg.qr(torch.cat([rows.to(factor), expected]), mode="r")[1]
    root = root * root.diagonal().sign().unsqueeze(1)  # the same draws in every round
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(_DRAWN, len(root), generator=generator, dtype=torch.float64).to(root)
    errors = torch.linalg.solve_triangular(root, drawn.mT, upper=True).mT
    truth = images.to(root).flatten()
    left = (into_box(truth + errors, root) - truth).square().mean(0)
    return mean_decibels(left.reshape(len(images), -1).mean(1))
