"""Flower's old API (``NumPyClient``, ``flwr.server.strategy``): what its server gets, captured."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from logging import ERROR
from pathlib import Path
from typing import Any

import torch
from flwr.common import FitIns, FitRes, Parameters, parameters_to_ndarrays
from flwr.common.logger import log
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import Strategy
from torch import Tensor, nn

from fedleak.capture import CaptureWriter, Update
from fedleak.capture.update import load_sent
from fedleak.client.training import LocalTraining
from fedleak.errors import InvalidInputError, InvalidUpdateError
from fedleak.observation import Observation
from fedleak.terms import Terms
from fedleak.threat import ThreatModel


def capture_fit(
    strategy: Strategy,
    model: Callable[[], nn.Module],
    input_shape: tuple[int, int, int],
    training: LocalTraining,
    capture: CaptureWriter | Path | str,
) -> Strategy:
    """Have a strategy of Flower's old API capture what clients send back from ``fit``.

    The training stays as it is, bit for bit. The number of a client's images is what its
    ``num_examples`` says. Under SecAgg+ (``SecAggPlusWorkflow``) the server sees one mean of all
    clients, rounded to integers, and that is captured, as the sum that it is: of clients with
    equally many images; else the capture says why not.

    Parameters
    ----------
    strategy : flwr.server.strategy.Strategy
        Its ``configure_fit`` and ``aggregate_fit`` are replaced by ones that call them.
    model : callable
        Makes the clients' model, whose state dict, in its order, is the list of arrays sent.
    input_shape : tuple of int
        Shape (C, H, W) of one image.
    training : LocalTraining
        How clients train before they reply.
    capture : path or CaptureWriter
        A new folder, for ``fedleak attack``.

    Returns
    -------
    Strategy
        The same one.

    Raises
    ------
    InvalidInputError
        If it is no such strategy, or the folder cannot be used.
    """
    if not isinstance(strategy, Strategy):
        raise InvalidInputError(
            f"capture_fit is for strategies of flwr.server.strategy, not {strategy!r:.100}; a "
            "strategy of the message API is wrapped by MaliciousServer"
        )
    with torch.random.fork_rng(devices=[]):  # the app may draw its first weights after this
        names = list(model().state_dict())
        if not isinstance(capture, CaptureWriter):
            capture = CaptureWriter(capture, model, input_shape)
    writer, configure, aggregate = capture, strategy.configure_fit, strategy.aggregate_fit
    sent: dict[str, dict[str, Tensor]] = {}

    def named(parameters: Parameters) -> dict[str, Tensor]:
        arrays = parameters_to_ndarrays(parameters)
        if len(arrays) != len(names):
            raise InvalidUpdateError(
                f"{len(arrays)} arrays came, the model's state dict has {len(names)}"
            )
        return {n: torch.from_numpy(a.copy()) for n, a in zip(names, arrays, strict=True)}

    def configure_fit(
        server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, FitIns]]:
        asked = configure(server_round, parameters, client_manager)
        sent.clear()
        read: dict[int, dict[str, Tensor]] = {}  # clients mostly share one list
        try:
            for client, fit in asked:
                if id(fit.parameters) not in read:
                    read[id(fit.parameters)] = named(fit.parameters)
                sent[client.cid] = read[id(fit.parameters)]
        except Exception as error:  # the training goes on, whatever happens here
            log(ERROR, "round %s: not captured: %r", server_round, error)
        return asked

    def keep(server_round: int, client: ClientProxy, result: FitRes) -> None:
        terms = Terms(
            input_shape=input_shape, num_images=result.num_examples, training=training,
            shared="weights",
        )  # fmt: skip
        received = named(result.parameters)
        writer.add(Update(server_round, (_node(client.cid),), sent[client.cid], received, terms))

    def keep_mean(server_round: int, results: list[tuple[ClientProxy, FitRes]]) -> None:
        """Capture the mean that secure aggregation left, with every reply the same."""
        nodes = tuple(_node(client.cid) for client, _ in results)
        sizes = sorted({result.num_examples for _, result in results})
        if len(sizes) > 1:
            writer.add_failure(
                server_round, nodes, "secure aggregation left one mean over clients, with "
                f"{sizes[0]} to {sizes[-1]} images each; only equally many can be attacked",
            )  # fmt: skip
            return
        client, result = results[0]
        terms = Terms(
            input_shape=input_shape, num_images=sizes[0], training=training, shared="weights",
            threat=ThreatModel(view="sum"),
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            loaded = load_sent(model(), sent[client.cid])
        one = Observation.of(loaded, named(result.parameters), terms)
        total = Observation.sum_of([one] * len(results))
        writer.add(Update.of_sum(server_round, nodes, sent[client.cid], total))

    def aggregate_fit(
        server_round: int, results: list[tuple[ClientProxy, FitRes]], failures: Any
    ) -> Any:
        # Secure aggregation puts its mean into every reply, as one object.
        if len(results) > 1 and len({id(result.parameters) for _, result in results}) == 1:
            try:
                keep_mean(server_round, results)
            except Exception as error:  # the training goes on, whatever happens here
                log(ERROR, "round %s: not captured: %r", server_round, error)
            return aggregate(server_round, results, failures)
        for client, result in results:
            try:
                keep(server_round, client, result)
            except Exception as error:  # the training goes on, whatever happens here
                log(ERROR, "round %s, client %s: not captured: %r", server_round, client.cid, error)
        return aggregate(server_round, results, failures)

    strategy.configure_fit = configure_fit  # type: ignore[method-assign]
    strategy.aggregate_fit = aggregate_fit  # type: ignore[method-assign]
    return strategy


def _node(cid: str) -> int:
    return int(cid) if cid.isdigit() else zlib.crc32(cid.encode())
