"""A defence: send few bits of each number's mantissa."""

from dataclasses import dataclass

import torch

from fedleak.defences import DEFENCES, Defence, Tensors


@DEFENCES.register("mantissa")
@dataclass(frozen=True)
class Mantissa(Defence):
    """Round every entry to a number of significant bits, and keep its exponent.

    Parameters
    ----------
    bits : int
        Significant bits, 0 for no defence.
    """

    bits: int = 0  # the first field is the strength
    unit = "significant bits of each entry; 0: none"

    def __post_init__(self) -> None:
        self.demand("bits", maximum=24)

    def __call__(self, update: Tensors, generator: torch.Generator) -> Tensors:
        return {name: self._round(value) for name, value in update.items()}

    def _round(self, value: torch.Tensor) -> torch.Tensor:
        mantissa, exponent = torch.frexp(value)
        return torch.ldexp((mantissa * 2**self.bits).round() / 2**self.bits, exponent)

    def errors(self, received: Tensors) -> Tensors:
        # Uniform over one step of the rounding: step / sqrt(12).
        steps = {k: torch.ldexp(torch.ones_like(v), torch.frexp(v)[1]) for k, v in received.items()}
        return {k: s.double() * 2.0**-self.bits / 12**0.5 for k, s in steps.items()}
