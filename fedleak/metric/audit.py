"""The audit: all that the metric says of one model under one defence."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedleak import events
from fedleak.client.probe import probe
from fedleak.defences import DefenceSpec, parse_defence
from fedleak.errors import FedleakError, InvalidInputError
from fedleak.metric.adviser import Advice, advise
from fedleak.metric.attribution import Attribution, attribute, information
from fedleak.metric.c_metric import SecurityMetric, security_metric
from fedleak.metric.influence import Influence, influence
from fedleak.metric.matrix_free import estimate
from fedleak.metric.posterior import Prediction, decibels
from fedleak.metric.prediction import DENSE_PREDICTION, natural_prior, predict
from fedleak.metric.redesign import redesign
from fedleak.metric.reference import Reference, demand_judged, make_references
from fedleak.modules import unwrapped
from fedleak.priors import Prior
from fedleak.wording import json_ready

#: Unknowns of a batch above which one reference must do.
_MANY = 2048
#: Pixels whose variance stands for those of all, under the prior alone.
_PIXELS = 64


@dataclass(frozen=True, eq=False)
class Audit:
    """What a server can be expected to learn from one update of a model.

    Attributes
    ----------
    input_shape : tuple of int
        Shape (C, H, W) of one image.
    batch_size : int
    defence, prior : str
    references : int
        Batches that the update was linearised around.
    seed : int
    prediction : Prediction
        The predicted PSNR, and its bound.
    metric : SecurityMetric or None
        The paper's c(M), without the defence; of chains of supported layers alone.
    why_no_c : str or None
        Why there is none.
    i2f : Influence
        The inversion influence function, at the first reference.
    attribution : Attribution or None
        What each layer tells, at the first reference.
    why_no_attribution : str or None
    target_db : float or None
    advice : tuple of Advice
        What brings the prediction under ``target_db``.
    prior_db : float
        PSNR in dB of a guess from the prior alone: what no update at all gives away.
    seconds : float
    """

    input_shape: tuple[int, int, int]
    batch_size: int
    defence: str
    prior: str
    references: int
    seed: int
    prediction: Prediction
    metric: SecurityMetric | None
    why_no_c: str | None
    i2f: Influence
    attribution: Attribution | None
    why_no_attribution: str | None
    target_db: float | None
    advice: tuple[Advice, ...]
    prior_db: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain types, for JSON: what is not a finite number is None."""
        metric, prediction = self.metric, self.prediction
        layers = () if metric is None else (*metric.layers, *metric.dense)
        found = {
            "c": None if metric is None else metric.c,
            "c_normalised": None if metric is None else metric.c_normalised,
            "why_no_c": self.why_no_c,
            "predicted_psnr_db": prediction.psnr_db,
            "predicted_psnr_each_db": list(prediction.each_db),
            "error_db": prediction.error_db,
            "cramer_rao_db": prediction.floor_db,
            "prior_db": self.prior_db,
            "i2f": self.i2f.to_dict(),
            "effective_dimensions": prediction.effective_dimensions,
            "unknowns": prediction.unknowns,
            "layers": [asdict(layer) for layer in layers],
            "attribution": None if self.attribution is None else self.attribution.to_dict(),
            "why_no_attribution": self.why_no_attribution,
            "target_db": self.target_db,
            "advice": [a.to_dict() for a in self.advice],
            "input_shape": list(self.input_shape),
            "batch_size": self.batch_size,
            "defence": self.defence,
            "prior": self.prior,
            "references": self.references,
            "seed": self.seed,
            "seconds": self.seconds,
        }
        return dict(json_ready(found))


def audit(
    model: nn.Module,
    input_shape: tuple[int, int, int] = (3, 32, 32),
    batch_size: int = 1,
    defence: str | DefenceSpec = "none",
    prior: Prior | None = None,
    images: Tensor | None = None,
    references: int | None = None,
    seed: int = 0,
    target_db: float | None = None,
    matrix_free: bool = False,
) -> Audit:
    """Judge what a server learns from one update of a model.

    Parameters
    ----------
    model : nn.Module
        Any classifier, with the weights to judge, in the mode of the clients (``eval`` if it
        normalises by batches).
    input_shape : tuple of int
        Shape (C, H, W) of one image.
    batch_size : int
        Images behind the update.
    defence : str or DefenceSpec
    prior : Prior, optional
        Gaussian prior of the images; by default that of natural images.
    images : Tensor, optional, shape (N, C, H, W)
        What to linearise around, in [0, 1]; synthetic images if there are none.
    references : int, optional
        Batches to linearise around; by default 2, and 1 of more than 2048 unknowns.
    seed : int
        Draws images, labels and the defence's noise.
    target_db : float, optional
        Asks for advice how to come below it.
    matrix_free : bool
        Bound the prediction from products with the Jacobian, within minutes for any model,
        and leave attribution and advice out. Large batches always are, and models of which
        many parameters are neither of a fully connected layer nor of a convolution.

    Returns
    -------
    Audit

    Raises
    ------
    FedleakError
        If the model has nothing to train, normalises by statistics of the batch, does not
        take such images, or lacks a derivative; or another input is out of range.
    """
    begin = time.perf_counter()
    shape, model = image_shape(input_shape), unwrapped(model)
    probe(model, shape)
    demand_judged(model)
    if target_db is not None and not math.isfinite(target_db):
        raise InvalidInputError(f"the target {target_db} is not a finite number of dB")
    spec = parse_defence(defence) if isinstance(defence, str) else defence
    prior = natural_prior(shape) if prior is None else prior
    if not prior.gaussian:
        raise InvalidInputError(
            f"the prediction takes a Gaussian prior, not {prior}: gaussian or gaussian:learned"
        )
    if images is not None and tuple(images.shape[1:]) != shape:
        raise InvalidInputError(
            f"the reference images have shape {tuple(images.shape[1:])}, the model's {shape}"
        )
    unknowns = batch_size * math.prod(shape)
    count = references if references is not None else (2 if unknowns <= _MANY else 1)

    events.stage("linearising the update")
    found = make_references(model, shape, batch_size, spec, images, count, seed)
    same = found[0].jacobian.images.float()

    def linearised(network: nn.Module) -> list[Reference]:
        return make_references(network, shape, batch_size, spec, same, 1, seed)

    why: str | None = None
    attribution: Attribution | None = None
    advice: tuple[Advice, ...] = ()
    if matrix_free or unknowns > DENSE_PREDICTION or not found[0].jacobian.affordable:
        events.stage("bounding the prediction")
        prediction = estimate(found, prior)
        why = "the prediction is matrix-free: no Jacobian is held in memory to take apart"
    else:
        prediction, attribution, advice = _dense(found, prior, target_db)
        if target_db is not None and prediction.psnr_db >= target_db:
            events.stage("looking for another network")
            advice += redesign(model, shape, prior, target_db, linearised, batch_size, seed)
    events.stage("the ranks of c(M)")
    metric, why_no_c = _c(model, shape, seed)
    return Audit(
        input_shape=shape,
        batch_size=batch_size,
        defence=str(spec),
        prior=repr(prior),
        references=len(found),
        seed=seed,
        prediction=prediction,
        metric=metric,
        why_no_c=why_no_c,
        i2f=influence(found[0], seed),
        attribution=attribution,
        why_no_attribution=why,
        target_db=target_db,
        advice=advice,
        prior_db=_prior_db(prior),
        seconds=time.perf_counter() - begin,
    )


def _dense(
    references: Sequence[Reference], prior: Prior, target_db: float | None
) -> tuple[Prediction, Attribution, tuple[Advice, ...]]:
    """Return what needs the Jacobian in memory."""
    events.stage("predicting")
    factor = prior.dense().factor
    first, *others = references
    blocks = first.blocks()
    prediction = predict(references, prior, [blocks, *(r.blocks() for r in others)])
    events.stage("taking the update apart by layers")
    told = information(first, factor, blocks)
    attribution = attribute(first, factor, blocks, told)
    if target_db is None or prediction.psnr_db < target_db or not told.layers:
        return prediction, attribution, ()
    events.stage("trying defences")
    return prediction, attribution, advise(first, factor, blocks, told, target_db)


def _c(
    model: nn.Module, shape: tuple[int, int, int], seed: int
) -> tuple[SecurityMetric | None, str | None]:
    """Return c(M), or why there is none."""
    try:
        return security_metric(model, shape, seed=seed), None
    except FedleakError as error:
        return None, str(error)


def _prior_db(prior: Prior) -> float:
    """Return the PSNR of the prior's mean, from pixels all over the image."""
    n = math.prod(prior.shape)
    index = torch.linspace(0, n - 1, min(n, _PIXELS)).long()
    units = torch.zeros(len(index), n, dtype=torch.float64, device=prior.mean.device)
    units[torch.arange(len(index)), index] = 1.0
    rows = prior.root_adjoint(units.reshape(-1, *prior.shape))
    return decibels(float(rows.square().sum()) / len(index))


def image_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    """Return the shape of one image; refuse what is none."""
    sizes = tuple(shape)
    if len(sizes) != 3 or not all(isinstance(n, int) and n > 0 for n in sizes):
        raise InvalidInputError(
            f"input shape {sizes} is not that of one image: give (channels, height, width)"
        )
    return sizes[0], sizes[1], sizes[2]
