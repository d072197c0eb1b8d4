"""Errors a user can act on.

Every error names the offending value and says what to do about it. The command
line turns any :class:`FedleakError` into one message on standard error and exit
code 2; a simulation turns one raised by an attack into a ``failed`` row.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from fedleak.wording import clean_lines


class FedleakError(Exception):
    """Base class of every error that fedleak raises on purpose.

    A message may quote what strangers have sent: it is cleaned of what steers a terminal, and cut
    where it is too long for anybody to read.
    """

    def __str__(self) -> str:
        return clean_lines(super().__str__())


class InvalidInputError(FedleakError, ValueError):
    """A value given by the user is out of range, unknown or contradictory."""


class UnknownNameError(InvalidInputError):
    """A name is not in a registry; the message offers the nearest ones."""

    def __init__(self, kind: str, name: str, known: Iterable[str]):
        self.kind, self.name, self.known = kind, name, sorted(known)
        super().__init__(f"unknown {kind} {name!r}{nearest(name, self.known)}")


class DataUnavailableError(FedleakError):
    """A data set is not on this machine."""


class UnsupportedModelError(FedleakError):
    """The layerwise linear systems do not cover a layer of this model."""


class LayerCheckError(FedleakError, AssertionError):
    """A kind of layer does not compute what its module does, or claims to know more than it can."""


class InvalidUpdateError(FedleakError, ValueError):
    """What a client sent cannot be used: missing, misshapen or not finite."""


class ForbiddenError(FedleakError):
    """An attack needs to know or do what the threat model does not allow."""


class TimeLimitError(FedleakError):
    """The time that was allowed ran out before there was anything to show."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        super().__init__(f"time: nothing was found in the {seconds:.3g} s allowed; allow more")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean ...? Known: ..."`` for a name that is not known."""
    known = sorted(known)
    lowered = {k.lower(): k for k in known}
    close = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.4)
    hint = f"; did you mean {lowered[close[0]]!r}?" if close else "."
    return f"{hint} Known: {', '.join(known) or 'none'}"
