"""Images that do not explain the update: nobody has reason to take them for the client's."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fedleak.wording import EXPLAINED, PARTLY

if TYPE_CHECKING:  # which is where this is called from
    from fedleak.attacks.base import Reconstruction

#: Without the number, so that the doubts of many updates can be counted; ``fit`` has it.
_IN_PART = (
    f"the images explain the update in part only (fit of {EXPLAINED:g} or more): shapes may be "
    "right, details are made up"
)
_LITTLE = (
    f"the images explain little of the update (fit of {PARTLY:g} or more): the search failed, or "
    "the client is another than was declared"
)


def doubted(result: Reconstruction) -> Reconstruction:
    """Return a reconstruction, with a doubt where its ``fit`` does not bear the images out.

    At the true images of a client that is as declared, ``fit`` is rounding, and what a known
    defence added is no part of it: from :data:`fedleak.wording.EXPLAINED` on, something is wrong.
    Images that are certified need no other witness: those that are left out explain the rest.
    """
    if not result.images.numel() or result.fit < EXPLAINED or _proved(result):
        return result
    doubt = _IN_PART if result.fit < PARTLY else _LITTLE
    return replace(result, doubts=(*result.doubts, doubt))


def _proved(result: Reconstruction) -> bool:
    told = result.details.get("certified", False)
    return told if isinstance(told, bool) else bool(told) and all(told)
