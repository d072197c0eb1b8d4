"""What a server may send instead of the honest model, and what it gains by it.

>>> from fedleak.tampers import make_tamper
>>> tamper = make_tamper("peel")
>>> sent = tamper.prepare(model, input_shape=(3, 32, 32))  # doctest: +SKIP
"""

from fedleak.tampers.base import TAMPERS, Tamper, make_tamper, parse_tamper
from fedleak.tampers.fishing import Fishing
from fedleak.tampers.hidden import Imprint, Peel, Trap

__all__ = ["TAMPERS", "Fishing", "Imprint", "Peel", "Tamper", "Trap", "make_tamper", "parse_tamper"]
