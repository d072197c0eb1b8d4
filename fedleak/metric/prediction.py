"""Predicted PSNR: what the best linear attack would recover from one update, without an attack.

The update is linearised around reference images: ``G(x + dx) = G(x) + J dx + noise``, with a
Gaussian prior ``N(mu, S)`` of images and errors of known size. What is left open of the image
has the covariance ``(S^-1 + J^T N^-1 J)^-1``; the predicted PSNR is ``-10 log10`` of its mean
diagonal. It holds for any torch module, defence and batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fedleak.client.replay import Gradients, Replay
from fedleak.defences import DefenceSpec, defend, parse_defence
from fedleak.errors import InvalidInputError
from fedleak.metric.jacobian import UpdateJacobian
from fedleak.metric.posterior import Posterior, posterior
from fedleak.metric.rows import Block
from fedleak.priors import GaussianPrior, Prior
from fedleak.priors.synthetic import dead_leaves

#: Relative error of every gradient, root mean square: the rounding of float32; and where its
#: derivatives themselves are taken in float32, what they resolve.
ROUNDING, ROUNDING_SINGLE = 6e-8, 1e-5
#: Parameters from which derivatives are taken in float32: half the memory and time.
SINGLE_PARAMETERS = 20_000_000
#: The prior of natural images of about 32 pixels: see ``GaussianPrior`` for the terms.
NATURAL = {"rho": 0.96, "power": 1.0, "colour": 0.93, "sigma": 0.25, "mean": 0.5}
#: Unknowns (of all images of a batch) up to which the Jacobian is held in memory.
DENSE_UNKNOWNS = 6144


def natural_prior(shape: tuple[int, int, int], device: torch.device | str = "cpu") -> Prior:
    """Return the data-free prior of predictions.

    It describes the images, not what an attack assumes: an exponential correlation over
    the distance of two pixels, 0.96 for neighbours.
    """
    return GaussianPrior(shape, adapt=False, device=device, **NATURAL)


@dataclass(frozen=True)
class Reference:
    """A batch at which the update is linearised, and what a client would send of it.

    Attributes
    ----------
    jacobian : UpdateJacobian
    sent : dict
        The defended update.
    errors : dict
        Standard deviation of the error of each entry, see :func:`entry_errors`.
    """

    jacobian: UpdateJacobian
    sent: Gradients
    errors: Gradients

    def blocks(self) -> list[Block]:
        """Return the rows of the Jacobian in units of their errors."""
        return self.jacobian.blocks(self.errors)


@dataclass(frozen=True)
class Prediction:
    """Predicted leakage of one update.

    Attributes
    ----------
    psnr_db : float
        Predicted PSNR (peak 1) in dB, the mean over references and images.
    each_db : tuple of float
        The same at each reference.
    floor_db : float
        Bayesian Cramer-Rao (van Trees) bound: no attack whatever has a greater mean PSNR, for
        images that follow the prior and errors that are normal and at least as large.
    effective_dimensions : float
        Of the ``unknowns`` (all pixels of the batch), the directions that the update tells
        more of than the prior does.
    unknowns : int
    error_db : float
        Numerical uncertainty of ``psnr_db``; 0 where the Jacobian was held in memory whole.
    rms : Tensor, shape (B, C, H, W)
        What is left open of each pixel, root mean square over references.
    """

    psnr_db: float
    each_db: tuple[float, ...]
    floor_db: float
    effective_dimensions: float
    unknowns: int
    error_db: float
    rms: Tensor


def entry_errors(gradient: Gradients, spec: DefenceSpec, sent: Gradients) -> Gradients:
    """Return the standard deviation of the error of each entry that a client sends.

    The defence's, as an informed attacker knows it, and the rounding of float32.

    Parameters
    ----------
    gradient : dict
        The update before the defence, which sets the size of rounding.
    spec : DefenceSpec
    sent : dict
        The update after it.

    Returns
    -------
    dict
        In the unit of ``gradient``, broadcastable to each parameter; ``inf`` where an entry
        says nothing.
    """
    known, factors = spec.errors(sent), _factors(gradient, spec, sent)
    out = {}
    for name, g in gradient.items():
        size = g.square().mean().sqrt()
        # A gradient that is zero everywhere tells nothing to first order.
        level = ROUNDING if g.dtype == torch.float64 else ROUNDING_SINGLE
        rounding = torch.where(size > 0, level * size, torch.inf)
        out[name] = torch.hypot(known[name].to(g) / factors[name], rounding)
    return out


def _factors(gradient: Gradients, spec: DefenceSpec, sent: Gradients) -> Gradients:
    """Return what the defence multiplied each tensor by, as clipping does; noise aside."""
    if not spec.rescales:
        return {k: g.new_ones(()) for k, g in gradient.items()}
    inner = {k: (g * sent[k].to(g)).sum() for k, g in gradient.items()}
    square = {k: g.square().sum() for k, g in gradient.items()}
    if spec.rescales == "update":
        total = torch.stack([*inner.values()]).sum(), torch.stack([*square.values()]).sum()
        inner, square = dict.fromkeys(inner, total[0]), dict.fromkeys(square, total[1])
    return {k: (inner[k] / square[k].clamp_min(1e-300)).clamp_min(1e-300) for k in gradient}


def make_references(
    model: nn.Module,
    input_shape: tuple[int, int, int],
    batch_size: int = 1,
    defence: str | DefenceSpec = "none",
    images: Tensor | None = None,
    count: int = 2,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> list[Reference]:
    """Return batches to linearise around, defended as clients would.

    Parameters
    ----------
    model : nn.Module
        With the weights to judge, in the mode (``eval``) of the client.
    input_shape : tuple of int
        Shape (C, H, W) of one image.
    batch_size : int
    defence : str or DefenceSpec
    images : Tensor, optional, shape (N, C, H, W)
        Reference images in [0, 1]; synthetic ones (dead leaves) if there are none.
    count : int
        Batches, at most.
    seed : int
        Draws images, labels and the defence's noise.
    device : str or torch.device

    Raises
    ------
    InvalidInputError
        If the model has nothing to train, normalises by batch statistics or does not take
        such images, or there are too few of them.
    """
    demand_judged(model)
    spec = parse_defence(defence) if isinstance(defence, str) else defence
    large = sum(p.numel() for p in model.parameters()) >= SINGLE_PARAMETERS
    dtype = torch.float32 if large else torch.float64
    replay = Replay(model, input_shape, dtype, device)
    spec.check(list(replay.parameters))
    if batch_size < 1 or count < 1:
        raise InvalidInputError(f"batch size {batch_size} and references {count} must be above 0")
    if images is None:
        images = dead_leaves(input_shape, batch_size * count, seed=seed)
    if len(images) < batch_size:
        raise InvalidInputError(
            f"{len(images)} reference images are no batch of {batch_size}; give more, or none"
        )
    generator = torch.Generator().manual_seed(seed)
    found = []
    for n, x in enumerate(images.split(batch_size)[:count]):
        if len(x) < batch_size:
            break
        labels = torch.randint(replay.classes, (batch_size,), generator=generator)
        jacobian = UpdateJacobian(replay, x, labels)
        sent = defend(jacobian.gradient, spec, seed + n)
        errors = entry_errors(jacobian.gradient, spec, sent)
        found.append(Reference(jacobian, sent, errors))
    return found


def demand_judged(model: nn.Module) -> None:
    """Refuse a model without trainable parameters, or whose update is not its images' alone."""
    if not any(p.requires_grad for p in model.parameters()):
        raise InvalidInputError(
            f"the model {type(model).__name__} has no trainable parameters: it shares no gradient"
        )
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise InvalidInputError(f"the model's {name!r} holds NaN or infinite values")
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (
            module.training or module.running_mean is None
        ):
            raise InvalidInputError(
                f"layer {name!r} ({type(module).__name__}) normalises by the statistics of the "
                "batch; judge the model with running statistics: model.eval()"
            )


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
    from fedleak.metric.matrix_free import estimate

    if not prior.gaussian:
        raise InvalidInputError(
            f"the prediction takes a Gaussian prior, not {prior}: gaussian or gaussian:learned"
        )
    shape = tuple(references[0].jacobian.images.shape)
    unknowns = references[0].jacobian.images.numel()
    if unknowns > DENSE_UNKNOWNS:
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
