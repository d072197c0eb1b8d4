"""Class fishing: only the images of one class send a gradient below the head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedleak.attacks.fished import head_name
from fedleak.errors import InvalidInputError
from fedleak.tampers.base import TAMPERS, Tamper, changed_state


@TAMPERS.register("fishing")
@dataclass(frozen=True)
class Fishing(Tamper):
    """Silence every class but one at the head; what is below sees that one's images alone.

    The head keeps the weights of the class, loses those of all others, and gives these a bias
    so large that the class is never expected. An image of another class then sends
    ``(p - y) W = 0`` below the head, exactly; one of the class sends minus its row of ``W``,
    whatever it shows. Where the batch has one image of the class, its update comes back alone.

    Parameters
    ----------
    label : int
        The class to fish for; -1 takes them in turns, over rounds and clients.
    margin : float
        The bias of the other classes, in logits. From about 110 on their images' gradients
        underflow to 0 in float32.

    Notes
    -----
    Wen et al. 2022, *Fishing for User Data in Large-Batch Federated Learning via Gradient
    Magnification*, ICML: class fishing. Their feature fishing, which splits a class over rounds,
    is not used: the images of the class are attacked together.
    """

    label: int = -1
    margin: float = 1000.0
    attack: ClassVar[str] = "fished"

    def __post_init__(self) -> None:
        if isinstance(self.label, bool) or not isinstance(self.label, int) or self.label < -1:
            raise InvalidInputError(
                f"label must be a class from 0, or -1 for all in turns, not {self.label!r}"
            )
        if not isinstance(self.margin, (int, float)) or not 50 <= self.margin <= 1e6:
            raise InvalidInputError(f"margin must be from 50 to 1e6 logits, not {self.margin!r}")

    def prepare(
        self,
        model: nn.Module,
        input_shape: tuple[int, int, int],
        server_round: int = 1,
        client: int = 0,
        images: int = 1,
    ) -> dict[str, Tensor]:
        name = head_name(model, input_shape)
        weight = model.get_parameter(f"{name}.weight").detach()
        label = (server_round - 1 + client) % len(weight) if self.label < 0 else self.label
        if label >= len(weight):
            raise InvalidInputError(
                f"label {label} is not one of the {len(weight)} classes of head {name!r}"
            )
        kept = torch.zeros_like(weight)
        kept[label] = weight[label]
        bias = torch.full((len(weight),), float(self.margin))
        bias[label] = 0.0
        return changed_state(model, {f"{name}.weight": kept, f"{name}.bias": bias})
