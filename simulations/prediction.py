"""The predicted PSNR of each client's update, for the recorder: scoring, not attack."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from logging import DEBUG, WARNING
from typing import Any

import torch
from flwr.common.logger import log
from torch import Tensor

from fedleak.defences import defend
from fedleak.errors import FedleakError, UnsupportedModelError
from fedleak.metric.jacobian import UpdateJacobian
from fedleak.metric.posterior import decibels
from fedleak.metric.prediction import (
    DENSE_UNKNOWNS,
    NATURAL,
    ROUNDING,
    Reference,
    demand_judged,
    entry_errors,
    predict,
)
from fedleak.priors import GaussianPrior
from fedleak.replay import Gradients, Replay
from simulations.partition import training_data
from simulations.scenario import Scenario
from simulations.task import make_model
from strategies.defence_mod import noise_seed

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
        Returns the state dict of the weights that clients were sent in this round.
    """

    def __init__(self, scenario: Scenario, sent: Callable[[], Mapping[str, Tensor]]):
        self.scenario, self._sent = scenario, sent
        options: dict[str, Any] = {**NATURAL, **_image_prior(scenario)}
        self.prior = GaussianPrior(training_data(scenario).shape, **options)
        self._round = 0
        self._replay: Replay | None = None
        self._warned = False

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
        try:
            if self._wanted(server_round, images.numel()):
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
            self._replay = None
        mode = self.scenario.metric.predict
        few = unknowns <= EVERY_CLIENT or (first and unknowns <= DENSE_UNKNOWNS)
        return mode == "all" or (mode == "auto" and few)

    def _predict(
        self, server_round: int, clients: Sequence[int], images: Tensor, labels: Tensor
    ) -> list[float]:
        scenario, spec = self.scenario, self.scenario.defence.spec
        local = scenario.training.local
        if local is not None and local.steps(scenario.training.images) > 1:
            raise UnsupportedModelError("the update is the sum of several local steps")
        if len(clients) > 1 and spec.parts:
            raise UnsupportedModelError("the update is the sum of several defended ones")
        if self._replay is None:
            model = make_model(scenario)
            model.load_state_dict(self._sent())
            demand_judged(model)
            self._replay = Replay(model, self.prior.shape)
        jacobian = UpdateJacobian(self._replay, images, labels)
        stream = noise_seed(scenario.seed, clients[0], server_round)
        sent = defend(jacobian.gradient, spec, stream)
        errors = entry_errors(jacobian.gradient, spec, sent)
        if local is not None:
            errors = _of_weights(errors, self._replay.parameters, local.learning_rate)
        found = predict([Reference(jacobian, sent, errors)], self.prior)
        return [decibels(float(rms.square().mean())) for rms in found.rms]


def _image_prior(scenario: Scenario) -> dict[str, Any]:
    """Return what the scenario says of its images: for predictions, or else for its attack."""
    options = scenario.attack.options
    gaussian = options.get("prior", "gaussian") == "gaussian"
    return scenario.metric.prior_options or (options.get("prior_options", {}) if gaussian else {})


def _of_weights(errors: Gradients, weights: Gradients, learning_rate: float) -> Gradients:
    """Add the rounding of weights: one step is a gradient times the learning rate."""
    return {
        k: torch.hypot(e, (ROUNDING / learning_rate * weights[k].square().mean().sqrt()).to(e))
        for k, e in errors.items()
    }
