"""Carry a defence as a Flower mod: it changes the update on its way out."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Context, Message, MessageType
from flwr.clientapp.typing import ClientAppCallable, Mod

from fedleak.defences import DefenceSpec, defend
from strategies.malicious_server import Shared

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
    """
    return choosing_defence_mod(lambda context: (defence, shared, seed))


def choosing_defence_mod(choose: Choose) -> Mod:
    """Return a mod whose defence is chosen at each call, as ``flwr run`` needs it."""

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        sent = None
        if message.metadata.message_type == MessageType.TRAIN:
            sent = next(iter(message.content.array_records.values()), None)
            sent = None if sent is None else _arrays(sent)
        config = next(iter(message.content.config_records.values()), {})
        server_round = int(config.get("server-round", 0))  # type: ignore[call-overload]
        reply = call_next(message, context)
        defence, shared, seed = choose(context)
        if sent is None or reply.has_error() or not defence.strength:
            return reply
        client = context.node_config.get("partition-id", context.node_id)
        # One stream of noise for each client and round; crc32 is the same on all machines.
        stream = zlib.crc32(f"{seed}/{client}/{server_round}".encode())
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
    base = sent if shared == "weights" else {}
    update = {
        n: torch.from_numpy(
            received[n].astype(np.float64) - base[n] if n in base else received[n].astype(np.float64)
        )
        for n in floats
    }
    changed = defend(update, defence, seed)
    out = dict(received)
    for name, value in changed.items():
        new = value.numpy() + base[name] if name in base else value.numpy()
        out[name] = new.astype(received[name].dtype)
    return ArrayRecord({name: Array(value) for name, value in out.items()})
