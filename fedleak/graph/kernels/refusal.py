"""What a kernel raises where its equations do not decide."""

from __future__ import annotations

from fedleak.errors import FedleakError


class Refused(FedleakError):
    """The equations at hand do not determine what was asked for; nothing was guessed.

    The message names the quantity that decided and its value.
    """
