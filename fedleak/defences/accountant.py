"""What differential privacy a defence guarantees over rounds. The accounting is Opacus's."""

from __future__ import annotations

import logging
import math
import warnings

from fedleak.defences.spec import DefenceSpec
from fedleak.errors import InvalidInputError


def epsilon(
    spec: DefenceSpec, rounds: int, sampling: float = 1.0, delta: float = 1e-5
) -> float | None:
    """Return the epsilon of (epsilon, delta)-differential privacy after some rounds.

    By Rényi differential privacy (Mironov 2017, Mironov et al. 2019), as
    ``opacus.accountants.RDPAccountant`` computes it, for neighbours that differ by one
    client's update (``dp``, ``LocalDpMod``) or by one image (``dp`` with ``examples``). It holds
    for each of the updates that the server sees: local differential privacy, if each client adds
    the noise itself.

    Parameters
    ----------
    spec : DefenceSpec
        What comes after ``dp`` costs nothing more (post-processing).
    rounds : int
        Updates that are released.
    sampling : float
        Probability with which a client, or an image, takes part in a round, in (0, 1],
        each independently (Poisson sampling). Drawing a fixed number, as Flower does, is not
        quite that. An observer who sees who took part must be given 1.
    delta : float
        In (0, 1).

    Returns
    -------
    float or None
        None where the defence guarantees nothing; 0 before the first round.

    Raises
    ------
    InvalidInputError
        If a number is out of range.
    """
    if rounds < 0 or not 0 < sampling <= 1 or not 0 < delta < 1:
        raise InvalidInputError(
            f"rounds ({rounds}) must be at least 0, sampling ({sampling}) in (0, 1] and delta "
            f"({delta}) in (0, 1)"
        )
    told = [part.noise_multiplier for part in spec.parts]
    steps = [(noise, sampling, rounds) for noise in told if noise is not None]
    if not steps:
        return None
    if not rounds:
        return 0.0
    handlers = list(logging.getLogger().handlers)
    from opacus.accountants import RDPAccountant  # takes seconds, and few need it

    logging.getLogger().handlers[:] = handlers  # importing it sets up the root logger
    accountant = RDPAccountant()
    accountant.history = steps
    with warnings.catch_warnings():
        # A larger epsilon than could be shown is still true.
        warnings.filterwarnings("ignore", "Optimal order is the", UserWarning)
        found = float(accountant.get_epsilon(delta=delta))
    return found if math.isfinite(found) else None
