"""What a kernel raises where its equations do not decide, and what its solutions may leave."""

from __future__ import annotations

from fedleak.errors import FedleakError

#: Relative residual up to which a gradient is explained: a client's float32 gradient is within
#: 1e-6 of the same in float64, and what leaves more is no solution.
EXPLAINED = 1e-5


class Refused(FedleakError):
    """The equations at hand do not determine what was asked for; nothing was guessed.

    The message names the quantity that decided and its value.
    """
