"""Flower plug-ins, by a name that no file of an app hides: see :mod:`strategies`."""

from typing import TYPE_CHECKING

from fedleak._beside import adopt

if TYPE_CHECKING:
    from strategies import *  # noqa: F403

adopt("strategies")
