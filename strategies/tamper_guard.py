"""A client mod that looks at the model it received before it trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from logging import WARNING
from typing import Literal, get_args

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Context, Error, Message, MessageType
from flwr.clientapp.typing import ClientAppCallable
from flwr.common.logger import log
from torch import Tensor

from fedleak.errors import FedleakError, InvalidInputError
from fedleak.tampers.signs import DISPARITY, LEAKAGE_DB, Sign, disparity, signs_of_tampering
from fedleak.terms import Shared

from .mods import noise_seed

__all__ = ["TAMPERED", "TamperGuard"]

#: What the guard does when it suspects something.
Action = Literal["warn", "refuse", "noise"]
#: The code of the error that a client replies with when it refuses.
TAMPERED = 7301
#: Where the last model without signs is kept, and the last one of all.
_KEPT, _LAST = "fedleak.guard.kept", "fedleak.guard.last"

#: ``(arrays, context) -> norms``: of each image's gradient on the model received, shape (B,), or
#: of each tensor's, (tensors, B).
Norms = Callable[[dict[str, Tensor], Context], Tensor]
#: ``(arrays, context) -> decibels``: the PSNR predicted for each image of the update that would be
#: sent, shape (B,), as :func:`fedleak.metric.prediction.leakage_db` does.
Leakage = Callable[[dict[str, Tensor], Context], Tensor]


@dataclass
class TamperGuard:
    """A mod, for ``ClientApp(mods=[...])``, that looks for signs of tampering before it trains.

    Parameters
    ----------
    action : {"warn", "refuse", "noise"}
        What happens where there is a sign: a warning in the log; an error instead of a reply,
        and nothing is computed; or noise of the update's size instead of the update.
    shared : {"weights", "gradient"}
        What the client replies with: noise takes the place of the update, not of the weights.
    norms : callable, optional
        ``(arrays, context) -> norms`` of the gradients of the images that would be trained on:
        then one that stands out is a sign, too (:func:`fedleak.tampers.signs.disparity`).
    leakage : callable, optional
        ``(arrays, context) -> decibels`` that are predicted for each of these images: then an
        update that would show one of them is a sign, too, whether the model is tampered with or
        not.
    on_signs : callable, optional
        Called with the round and the signs, where there are any.
    limit : float
        Disparity from which one image stands out.
    most_db : float
        Predicted PSNR in dB from which an update shows an image.
    seed : int
        Draws the noise, together with the client's partition and the round.

    Raises
    ------
    InvalidInputError
        If the action is unknown.

    Notes
    -----
    The last models received are kept in the context's state, to see a jump. The
    guard sees what a careless server leaves behind; one that knows what is looked for can send
    weights without these signs. That it is silent is no proof of honesty.
    """

    action: Action = "warn"
    shared: Shared = "weights"
    norms: Norms | None = None
    on_signs: Callable[[int, list[Sign]], None] | None = None
    limit: float = DISPARITY
    seed: int = 0
    leakage: Leakage | None = None
    most_db: float = LEAKAGE_DB

    def __post_init__(self) -> None:
        if self.action not in get_args(Action):
            raise InvalidInputError(
                f"action must be one of {', '.join(get_args(Action))}, not {self.action!r}"
            )

    def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        record = next(iter(message.content.array_records.values()), None)
        if message.metadata.message_type != MessageType.TRAIN or record is None:
            return call_next(message, context)
        state = {k: torch.from_numpy(np.array(v.numpy())) for k, v in record.items()}
        signs = self._signs(state, context)
        copied = ArrayRecord({k: v.clone() for k, v in state.items()})
        suspected = [sign for sign in signs if sign.kind != "leakage"]
        if all(sign.kind == "jump" for sign in suspected):  # else nothing is held against it
            context.state[_LAST] = copied
        if not suspected:
            context.state[_KEPT] = copied
        if not signs:
            return call_next(message, context)
        configs = list(message.content.config_records.values())
        server_round = int(str(configs[0].get("server-round", 0))) if configs else 0
        what = "the model looks tampered with" if suspected else "the update would show an image"
        what += ": " + "; ".join(str(s) for s in signs)
        log(WARNING, "round %s: %s", server_round, what)
        if self.on_signs is not None:
            self.on_signs(server_round, signs)
        if self.action == "refuse":
            return Message(Error(TAMPERED, what), reply_to=message)
        reply = call_next(message, context)
        if self.action == "noise" and not reply.has_error():
            client = context.node_config.get("partition-id", context.node_id)
            generator = np.random.default_rng(noise_seed(self.seed, client, server_round))
            for key, sent in list(reply.content.array_records.items()):
                reply.content[key] = self._noise(sent, record, generator)
        return reply

    def _signs(self, state: dict[str, Tensor], context: Context) -> list[Sign]:
        # After a tampered round the honest model is near the one before; after an honest jump
        # it is near the last one. A jump is what is near neither.
        kept = [context.state.array_records.get(k) for k in (_KEPT, _LAST)]
        looks = [signs_of_tampering(state, k.to_torch_state_dict()) for k in kept if k is not None]
        signs = min(looks or [signs_of_tampering(state)], key=len)
        if self.norms is not None:
            value = disparity(self.norms(state, context))
            if value >= self.limit:
                signs.append(Sign("disparity", "update", value, self.limit))
        if self.leakage is not None:
            try:
                value = float(self.leakage(state, context).max())
            except FedleakError as error:
                log(WARNING, "the leakage of this update cannot be predicted: %s", error)
            else:
                if value >= self.most_db:
                    signs.append(Sign("leakage", "update", value, self.most_db))
        return signs

    def _noise(
        self, sent: ArrayRecord, received: ArrayRecord, generator: np.random.Generator
    ) -> ArrayRecord:
        """Return arrays that say of the update only how large it is."""
        out = {}
        for name, array in sent.items():
            value, base = array.numpy(), np.zeros(())
            if self.shared == "weights" and name in received:
                base = received[name].numpy()
            if np.issubdtype(value.dtype, np.floating):
                size = np.sqrt(np.mean((value.astype(np.float64) - base) ** 2))
                drawn = base + size * generator.standard_normal(value.shape)
                value = np.asarray(drawn).astype(value.dtype)
            out[name] = Array(value)
        return ArrayRecord(out)
