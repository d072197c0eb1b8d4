"""Simulated federations, by a name that no file of an app hides: see :mod:`simulations`."""

from typing import TYPE_CHECKING

from fedleak._beside import adopt

if TYPE_CHECKING:
    from simulations import *  # noqa: F403

adopt("simulations")
