"""Convolutions, through their patches: any stride, padding, dilation and groups."""

from __future__ import annotations

from torch import Tensor, nn

from fedleak.errors import UnsupportedModelError
from fedleak.systems.base import Affine, Shape
from fedleak.systems.windows import Windows


class Conv(Affine):
    """``nn.Conv2d`` with zero padding."""

    def __init__(self, name: str, module: nn.Conv2d, in_shape: Shape, out_shape: Shape):
        kernel, stride, dilation = (
            (int(a), int(b)) for a, b in (module.kernel_size, module.stride, module.dilation)
        )
        self.groups = module.groups
        self.windows = Windows(in_shape, kernel, stride, _padding(module), dilation)
        super().__init__(name, in_shape, out_shape, module.weight, module.bias)

    @classmethod
    def read(cls, name: str, module: nn.Conv2d, in_shape: Shape, out_shape: Shape) -> Conv:
        if module.padding_mode != "zeros":
            raise UnsupportedModelError(
                f"layer {name!r}: padding_mode {module.padding_mode!r} is not supported; "
                "only zero padding is"
            )
        return cls(name, module, in_shape, out_shape)

    def group(self, weight: Tensor) -> Tensor:
        return weight.reshape(self.groups, weight.shape[0] // self.groups, -1)

    def patches(self, x: Tensor) -> Tensor:
        p = self.windows.patches(x)
        return p.reshape(p.shape[0], self.groups, -1, p.shape[2])

    def scatter(self, p: Tensor) -> Tensor:
        return self.windows.scatter(p.reshape(p.shape[0], -1, p.shape[-1]))


def _padding(module: nn.Conv2d) -> tuple[int, int, int, int]:
    """Return zero padding as (left, right, top, bottom), as ``F.pad`` takes it."""
    if module.padding == "valid":
        return (0, 0, 0, 0)
    if module.padding == "same":
        # As torch does it: an odd total puts the extra zero behind.
        total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        (top, left) = (t // 2 for t in total)
        return (left, total[1] - left, top, total[0] - top)
    rows, columns = (int(p) for p in module.padding)
    return (columns, columns, rows, rows)
