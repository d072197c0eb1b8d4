"""Carry a defence as a Flower mod: it changes the update on its way out."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Context, Message, MessageType
from flwr.clientapp.typing import ClientAppCallable, Mod

from fedleak.defences import DefenceSpec, defend
from fedleak.terms import Shared

#: Under this name Flower's ``DifferentialPrivacyClientSide...Clipping`` send their bound.
CLIPPING_NORM = "clipping_norm"
#: The defence of one client in one call: fixed, or chosen from the context.
Choose = Callable[[Context], tuple[DefenceSpec, Shared, int]]


def defence_mod(defence: DefenceSpec, shared: Shared = "weights", seed: int = 0) -> Mod:
    """Return a mod that defends every training reply.

    Parameters
    ----------
    defence : DefenceSpec
    shared : {"weights", "gradient"}
        What the client replies with. For weights the update is received minus sent, and
        the reply becomes sent plus the defended update.
    seed : int
        Draws the noise, together with the client's partition and the round.

    Returns
    -------
    callable
        A mod, for ``ClientApp(mods=[...])``.
    """
    return choosing_defence_mod(lambda context: (defence, shared, seed))


def clipping_told(server_round: int, node: int, config: Mapping[str, object]) -> DefenceSpec | None:
    """Return what a server's message says of its clients' clipping; None where it says nothing.

    For ``MaliciousServer(defence=clipping_told)`` around, or inside of, Flower's
    ``DifferentialPrivacyClientSideFixedClipping`` and ``...AdaptiveClipping``, whose bound is
    another in each round.

    Parameters
    ----------
    server_round, node : int
    config : mapping
        What the message holds beside the weights.

    Returns
    -------
    DefenceSpec or None
        ``clip`` with that norm.
    """
    norm = config.get(CLIPPING_NORM)
    told = isinstance(norm, (int, float)) and norm > 0
    return DefenceSpec("clip", float(norm)) if told else None  # type: ignore[arg-type]


def noise_seed(seed: int, client: object, server_round: object) -> int:
    """Return the seed of a client's noise in a round; crc32 is the same on all machines."""
    return zlib.crc32(f"{seed}/{client}/{server_round}".encode())


def choosing_defence_mod(choose: Choose) -> Mod:
    """Return a mod whose defence is chosen at each call, as ``flwr run`` needs it.

    Parameters
    ----------
    choose : callable
        ``Context -> (defence, shared, seed)``, which are those of :func:`defence_mod`.

    Returns
    -------
    callable
        A mod, for ``ClientApp(mods=[...])``.
    """

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        defence, shared, seed = choose(context)
        if message.metadata.message_type != MessageType.TRAIN or not defence.parts:
            return call_next(message, context)
        record = next(iter(message.content.array_records.values()), None)
        sent = {} if record is None else _arrays(record)
        configs = list(message.content.config_records.values())
        server_round = str(configs[0].get("server-round", 0)) if configs else "0"
        reply = call_next(message, context)
        if reply.has_error():
            return reply
        client = context.node_config.get("partition-id", context.node_id)
        stream = noise_seed(seed, client, server_round)
        for key, record in list(reply.content.array_records.items()):
            reply.content[key] = _defended(_arrays(record), sent, defence, shared, stream)
        return reply

    return mod


def _arrays(record: ArrayRecord) -> dict[str, np.ndarray]:
    return {name: np.array(array.numpy()) for name, array in record.items()}


def _defended(
    received: dict[str, np.ndarray],
    sent: dict[str, np.ndarray],
    defence: DefenceSpec,
    shared: Shared,
    seed: int,
) -> ArrayRecord:
    floats = [n for n, v in received.items() if np.issubdtype(v.dtype, np.floating)]
    if shared == "weights":
        floats = [n for n in floats if n in sent and sent[n].shape == received[n].shape]
    base: dict[str, Any] = sent if shared == "weights" else {}
    update = {
        n: torch.from_numpy(np.asarray(received[n].astype(np.float64) - base.get(n, 0.0)))
        for n in floats
    }
    changed = defend(update, defence, seed)
    out = dict(received)
    for name, value in changed.items():
        out[name] = (value.numpy() + base.get(name, 0.0)).astype(received[name].dtype)
    return ArrayRecord({name: Array(np.asarray(value)) for name, value in out.items()})
