"""The predicted PSNR of each client's update, for the recorder: scoring, not attack."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from logging import DEBUG, WARNING
from typing import Any

import torch
from fedleak.strategies.mods import noise_seed  # type: ignore[import-not-found]
from flwr.app import ArrayRecord
from flwr.common.logger import log
from torch import Tensor

from fedleak.client.replay import Replay
from fedleak.defences import defend
from fedleak.errors import FedleakError, UnsupportedModelError
from fedleak.metric.jacobian import Block, UpdateJacobian
from fedleak.metric.posterior import decibels, posterior
from fedleak.metric.prediction import DENSE_PREDICTION, NATURAL, predict
from fedleak.metric.reference import Reference, demand_judged, entry_errors
from fedleak.precision import UNIT
from fedleak.priors import GaussianPrior
from fedleak.threads import for_unknowns
from simulations.partition import training_data
from simulations.scenario import Scenario
from simulations.task import make_model

#: Bytes of what is kept of updates of the same images, to predict several rounds of them.
_KEPT = 256 * 2**20
#: Pixels behind an update up to which every client is predicted by ``metric.predict = "auto"``.
EVERY_CLIENT = 1024


class UpdatePrediction:
    """Predict, round by round, what updates leave open of their images.

    The update is linearised around the client's own true images and labels: this is a score of
    what was sent, which only the recorder may compute. No attack is given any of it.

    Parameters
    ----------
    scenario : Scenario
    sent : callable
        Returns the weights that a client was sent in this round.

    Attributes
    ----------
    together : list of float
        The same as was last returned, from all rounds so far of the same images, with
        ``attack.memory``; NaN where they were in no round before.
    """

    def __init__(self, scenario: Scenario, sent: Callable[[int], ArrayRecord]):
        self.scenario, self._sent = scenario, sent
        options: dict[str, Any] = {**NATURAL, **_image_prior(scenario)}
        self.prior = GaussianPrior(training_data(scenario).shape, **options)
        self._round = 0
        self._information: list[Block] = []
        self._pixels: tuple[int, ...] = ()
        self._last: tuple[ArrayRecord, Replay] | None = None
        self._warned = False
        self.together: list[float] = []
        self._rounds: dict[tuple[Sequence[int], bytes], Tensor] = {}

    def __call__(
        self, server_round: int, clients: Sequence[int], images: Tensor, labels: Tensor
    ) -> list[float]:
        """Return the predicted PSNR of each image in dB; NaN where it is not defined.

        Parameters
        ----------
        server_round : int
        clients : sequence of int
            One, or all behind a sum.
        images : Tensor, shape (B, C, H, W)
            Theirs, in [0, 1].
        labels : Tensor, int64, shape (B,)

        Notes
        -----
        Nothing is raised: a measurement must not end the training. What was not foreseen is
        logged, once.
        """
        self.together = [math.nan] * len(images)
        try:
            if self._wanted(server_round, images.numel()):
                with for_unknowns(images.numel()):
                    return self._predict(server_round, clients, images, labels)
        except FedleakError as error:  # not defined for this model or protocol
            log(DEBUG, "round %s: no predicted PSNR: %s", server_round, error)
        except Exception as error:
            if not self._warned:
                log(WARNING, "round %s: the predicted PSNR failed: %r", server_round, error)
            self._warned = True
        return [math.nan] * len(images)

    def _wanted(self, server_round: int, unknowns: int) -> bool:
        """Apply ``metric.predict``."""
        first, self._round = server_round != self._round, server_round
        if first:
            self._last, self._information = None, []
        mode = self.scenario.metric.predict
        few = unknowns <= EVERY_CLIENT or (first and unknowns <= DENSE_PREDICTION)
        return mode == "all" or (mode == "auto" and few)

    def _predict(
        self, server_round: int, clients: Sequence[int], images: Tensor, labels: Tensor
    ) -> list[float]:
        scenario, spec = self.scenario, self.scenario.defence.spec
        local = scenario.local
        if local is not None and local.steps(scenario.training.images) > 1:
            raise UnsupportedModelError("the update is the sum of several local steps")
        if len(clients) > 1 and spec.parts:
            raise UnsupportedModelError("the update is the sum of several defended ones")
        replay = self._replay(clients[0])
        jacobian = UpdateJacobian(replay, images, labels)
        stream = noise_seed(scenario.seed, clients[0], server_round)
        rate, rounding = 1.0, {}
        if local is not None and local.trains:  # one step: a change of float32 weights is sent
            rate = local.at(server_round).rate
            rounding = {k: UNIT * w.square().mean().sqrt() for k, w in replay.parameters.items()}
        update = {k: rate * g for k, g in jacobian.gradient.items()}
        sent = defend(update, spec, stream)
        errors = entry_errors(update, spec, sent, rounding)
        reference = Reference(
            jacobian, *({k: v / rate for k, v in part.items()} for part in (sent, errors))
        )
        if images.numel() > EVERY_CLIENT:
            found = predict([reference], self.prior)
        else:
            blocks = reference.blocks()
            found = predict([reference], self.prior, [blocks])
            self._keep(blocks, tuple(images.shape))
            if scenario.attack.memory:
                self._add_up(clients, images)
        return [decibels(float(rms.square().mean())) for rms in found.rms]

    def _replay(self, client: int) -> Replay:
        """Return the step of a client on what it was sent; clients mostly share one record."""
        record = self._sent(client)
        if self._last is None or self._last[0] is not record:
            model = make_model(self.scenario)
            model.load_state_dict(record.to_torch_state_dict())
            demand_judged(model)
            local = self.scenario.local
            self._last = record, Replay(model, self.prior.shape, client=local)
        return self._last[1]

    def _keep(self, blocks: Sequence[Block], pixels: tuple[int, ...]) -> None:
        """Keep what an update tells, as a triangle: as many rows as there are pixels."""
        rows = torch.cat([b.rows.double() for b in blocks])
        root = torch.linalg.qr(rows, mode="r")[1]
        self._information.append(Block("update", "update", root, len(rows)))
        self._pixels = pixels

    def _add_up(self, clients: Sequence[int], images: Tensor) -> None:
        """Predict all rounds of these images: what each told stands one below the other."""
        key = tuple(clients), hashlib.sha256(images.numpy().tobytes()).digest()
        rows, known = self._information[-1].rows, self._rounds.get(key)
        if known is not None:
            rows = torch.linalg.qr(torch.cat([known, rows]), mode="r")[1]
            factor = self.prior.dense().factor
            left = posterior([Block("rounds", "rounds", rows, len(rows))], factor, self._pixels)
            self.together = [decibels(float(v)) for v in left.variance.flatten(1).mean(1)]
        elif sum(r.numel() * 8 for r in self._rounds.values()) + rows.numel() * 8 > _KEPT:
            return
        self._rounds[key] = rows

    def bound(self, server_round: int) -> float:
        """Return the Bayesian Cramer-Rao bound of a round in dB; NaN where it is not defined.

        From the mean information of all the updates that were predicted in the round, as
        :attr:`fedleak.metric.posterior.Prediction.floor_db` of so many references: no attack has
        a greater mean PSNR, for images that follow the prior.
        """
        if server_round != self._round or not self._information:
            return math.nan
        share = len(self._information) ** -0.5
        blocks = [replace(b, rows=share * b.rows) for b in self._information]
        try:
            return posterior(blocks, self.prior.dense().factor, self._pixels).psnr_db
        except Exception as error:  # a measurement must not end the training
            log(WARNING, "round %s: the Cramer-Rao bound failed: %r", server_round, error)
            return math.nan


def _image_prior(scenario: Scenario) -> dict[str, Any]:
    """Return what the scenario says of its images: for predictions, or else for its attack."""
    options = scenario.attack.options
    gaussian = options.get("prior", "gaussian") == "gaussian"
    return scenario.metric.prior_options or (options.get("prior_options", {}) if gaussian else {})
