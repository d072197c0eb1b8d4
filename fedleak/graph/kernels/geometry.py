"""Which input position each tap of a convolution reads, for every output position."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedleak.errors import InvalidInputError

#: How torch names what lies beyond the border, in modules and in ``torch.nn.functional.pad``.
_MODES = {
    "zeros": "constant",
    "reflect": "reflect",
    "replicate": "replicate",
    "circular": "circular",
}


@dataclass(frozen=True)
class Geometry:
    """A two-dimensional convolution without its weights.

    Attributes
    ----------
    size : tuple of int
        Height and width of the input.
    kernel, stride, dilation : tuple of int
    padding : tuple of int
        Left, right, top, bottom, as :func:`torch.nn.functional.pad` takes them.
    groups : int
    mode : str
        What lies beyond the border: ``zeros``, ``reflect``, ``replicate`` or ``circular``.
    """

    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    mode: str = "zeros"

    def __post_init__(self) -> None:
        if self.mode not in _MODES:
            raise InvalidInputError(f"padding mode {self.mode!r}: known are {sorted(_MODES)}")
        if min(self.out) < 1:
            raise InvalidInputError(
                f"an input of {self.size} is smaller than the kernel {self.kernel} "
                f"with padding {self.padding} and dilation {self.dilation}"
            )

    @classmethod
    def of(cls, module: nn.Conv2d, size: tuple[int, int]) -> Geometry:
        """Return the geometry of a convolution on inputs of ``size`` (height, width)."""
        kernel, dilation = _pair(module.kernel_size), _pair(module.dilation)
        if isinstance(module.padding, str) and module.padding == "same":
            total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
            top, left = total[0] // 2, total[1] // 2
            padding = left, total[1] - left, top, total[0] - top
        elif isinstance(module.padding, str):  # "valid"
            padding = 0, 0, 0, 0
        else:
            high, wide = _pair(module.padding)
            padding = wide, wide, high, high
        return cls(
            _pair(size), kernel, _pair(module.stride), padding, dilation,
            module.groups, module.padding_mode,
        )  # fmt: skip

    @property
    def out(self) -> tuple[int, int]:
        """Height and width of the output."""
        left, right, top, bottom = self.padding
        size = self.size[0] + top + bottom, self.size[1] + left + right
        return tuple(  # type: ignore[return-value]
            (n - d * (k - 1) - 1) // s + 1
            for n, k, s, d in zip(size, self.kernel, self.stride, self.dilation, strict=True)
        )

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    @property
    def positions(self) -> int:
        """Positions of one image's input."""
        return self.size[0] * self.size[1]

    @property
    def outputs(self) -> int:
        """Positions of one image's output."""
        return self.out[0] * self.out[1]

    @property
    def reads(self) -> Tensor:
        """Input position that a tap reads at an output position, -1 for none, (taps, outputs)."""
        return _reads(self)

    @property
    def seen(self) -> Tensor:
        """Input positions that any tap reads, (positions,), bool."""
        index = self.reads.flatten()
        seen = torch.zeros(self.positions, dtype=torch.bool)
        seen[index[index >= 0]] = True
        return seen

    def patches(self, x: Tensor) -> Tensor:
        """Return what every tap reads, (B, C, taps, outputs), of an input (B, C, H, W)."""
        padded = F.pad(x.flatten(2), (0, 1))  # the last, read where the index is -1, is zero
        return padded[:, :, self.reads.to(x.device)]

    def gradient(self, x: Tensor, cotangent: Tensor) -> Tensor:
        """Return the weight's gradient, (C_out, C_in / groups, taps).

        Parameters
        ----------
        x : Tensor, shape (B, C_in, H, W)
        cotangent : Tensor, shape (B, C_out, H_out, W_out)
            Derivative of the loss by the output.
        """
        patches = self.patches(x).unflatten(1, (self.groups, -1))
        e = cotangent.flatten(2).unflatten(1, (self.groups, -1))
        return torch.einsum("bgctp,bgop->goct", patches, e).flatten(0, 1)


@lru_cache(maxsize=256)
def _reads(geometry: Geometry) -> Tensor:
    high, wide = geometry.size
    # torch's own padding and unfolding say it, of an image that numbers its positions from one.
    numbers = torch.arange(1, high * wide + 1, dtype=torch.float64).reshape(1, 1, high, wide)
    padded = F.pad(numbers, geometry.padding, mode=_MODES[geometry.mode])
    columns = F.unfold(padded, geometry.kernel, dilation=geometry.dilation, stride=geometry.stride)
    return columns[0].round().long() - 1


def _pair(value: int | tuple[int, ...] | torch.Size) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))
