"""Fishing: of a batch one image, or those of one class, send a gradient below the head."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from fedleak.attacks.fished import head_name
from fedleak.errors import InvalidInputError, UnsupportedModelError
from fedleak.images import read_images
from fedleak.priors import make_prior
from fedleak.tampers.base import TAMPERS, Tamper, changed_state
from fedleak.tampers.gate import FLAG, Ending, gated, measured

By = Literal["auto", "class", "feature"]
#: Wanted images of each class that pass the gate. Where fewer or more do, one alone is the
#: foremost less often: at 0.35 in 80 of 100 batches of ten classes, at 0.2 or 0.6 in 74.
_OF_A_CLASS = 0.45
#: Decades between the gradients of two classes, and their number.
_DECADES, _RANKS = 7.5, 9
#: The bias of the class that every image is expected to be: above any other logit.
_SINK = 1e35
#: Images drawn from the prior, to know what the gate will measure.
_DRAWN = 192


@TAMPERS.register("fishing")
@dataclass(frozen=True)
class Fishing(Tamper):
    """Silence all of a batch but one image, or but those of one class.

    ``class``: the head keeps the weights of the class, loses those of all others, and gives these a
    bias so large that the class is never expected. An image of another class then sends
    ``(p - y) W = 0`` below the head, exactly; one of the class sends minus its row of ``W``,
    whatever it shows. Where the batch has one image of the class, its update comes back alone.

    ``feature``: a gate in the last blocks of a residual network
    (:mod:`fedleak.tampers.gate`) lets those few images pass that are extreme in one measure. The
    rows of the head are one and the same row at sizes seven decades apart: of the images that pass,
    those of the foremost class outshine all others in every gradient below. It is one image in
    about 80 of 100 batches of 64.

    Parameters
    ----------
    label : int
        The class to fish for, or the foremost; -1 takes them in turns, over rounds and clients.
    by : {"auto", "class", "feature"}
        ``auto``: by feature where the model allows it.
    public : path, sequence of path, or Tensor, optional
        Images of the server's own, shape (N, C, H, W), by which the gate is set; by default
        images drawn from the data-free prior of natural images.
    margin : float
        The bias of the other classes, in logits. From about 110 on their images' gradients
        underflow to 0 in float32.

    Notes
    -----
    Wen et al. 2022, *Fishing for User Data in Large-Batch Federated Learning via Gradient
    Magnification*, ICML: class fishing, and a threshold on one feature to part a class. Theirs is
    at the head, where it parts the images of one class only if all others are elsewhere; the gate
    below it, and classes as ranks, are ours. What the gate measures is known from images of the
    data-free prior.
    """

    label: int = -1
    by: By = "auto"
    public: Any = field(default=None, repr=False, compare=False)
    margin: float = 1000.0
    _made: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    attack: ClassVar[str] = "fished"

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        extra = frozenset() if self.public is None else frozenset({"public_images"})
        return Tamper.needs | extra

    def __post_init__(self) -> None:
        if isinstance(self.label, bool) or not isinstance(self.label, int) or self.label < -1:
            raise InvalidInputError(
                f"label must be a class from 0, or -1 for all in turns, not {self.label!r}"
            )
        if self.by not in get_args(By):
            raise InvalidInputError(f"by must be one of {', '.join(get_args(By))}, not {self.by!r}")
        if not isinstance(self.margin, (int, float)) or not 50 <= self.margin <= 1e6:
            raise InvalidInputError(f"margin must be from 50 to 1e6 logits, not {self.margin!r}")

    def prepare(
        self,
        model: nn.Module,
        input_shape: tuple[int, int, int],
        server_round: int = 1,
        client: int = 0,
        num_images: int = 1,
    ) -> dict[str, Tensor]:
        name = head_name(model, input_shape)
        weight = model.get_parameter(f"{name}.weight").detach()
        label = (server_round - 1 + client) % len(weight) if self.label < 0 else self.label
        if label >= len(weight):
            raise InvalidInputError(
                f"label {label} is not one of the {len(weight)} classes of head {name!r}"
            )
        if self.by != "class":
            try:
                ending = Ending.of(model, input_shape)
            except UnsupportedModelError:
                if self.by == "feature":
                    raise
            else:
                return self._by_feature(model, ending, input_shape, label, num_images)
        kept = torch.zeros_like(weight)
        kept[label] = weight[label]
        bias = torch.full((len(weight),), float(self.margin))
        bias[label] = 0.0
        return changed_state(model, {f"{name}.weight": kept, f"{name}.bias": bias})

    def _by_feature(
        self,
        model: nn.Module,
        ending: Ending,
        input_shape: tuple[int, int, int],
        foremost: int,
        num_images: int,
    ) -> dict[str, Tensor]:
        channels = model.get_parameter(f"{ending.inner}.weight").shape[0]
        generator = torch.Generator().manual_seed(0)
        direction = torch.rand(channels, generator=generator, dtype=torch.float64)
        direction[0] = 0
        told = measured(model, ending, direction, self._images(input_shape))
        spread = float(told.std().clamp_min(1e-12))
        weight = model.get_parameter(f"{ending.head}.weight").detach().double()
        classes = len(weight)
        share = min(1.0, _OF_A_CLASS * classes / num_images)
        threshold = float((told / spread).quantile(1 - share)) if share < 1 else -math.inf
        state = gated(model, ending, direction / spread, max(threshold, -1e3))
        row = weight[0].clone()
        row[: FLAG + 1] = 0
        row /= row.norm().clamp_min(1e-300)
        order = [(foremost + n) % classes for n in range(classes)]
        head = torch.zeros_like(weight)
        for rank, label in enumerate(order[: min(_RANKS, classes - 1)]):
            head[label] = 10.0 ** (_DECADES * (_RANKS // 2 - rank)) * row
        state[f"{ending.head}.weight"] = head
        bias = torch.zeros(classes, dtype=torch.float64)
        bias[order[-1]] = _SINK
        state[f"{ending.head}.bias"] = bias
        return changed_state(model, state)

    def _images(self, input_shape: tuple[int, int, int]) -> Tensor:
        """Return images by which the gate is set."""
        if isinstance(self.public, Tensor):
            return self.public
        if input_shape not in self._made:
            if self.public is not None:
                paths = [self.public] if isinstance(self.public, (str, Path)) else self.public
                channels, *size = input_shape
                found = read_images([Path(p) for p in paths], channels, size=(size[0], size[1]))[1]
            else:
                prior = make_prior("gaussian", input_shape)
                generator = torch.Generator().manual_seed(0)
                shape = (_DRAWN, *prior.latent_shape)
                drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
                found = prior.image(drawn).clamp(0, 1)
            self._made[input_shape] = found
        return self._made[input_shape]
