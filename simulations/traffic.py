"""How many bytes a client has to send, if it sends no more than its update needs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from logging import DEBUG
from statistics import median

import numpy as np
from flwr.app import ArrayRecord, Message
from flwr.common.logger import log

from fedleak.defences import DefenceSpec
from fedleak.defences.clipping import DP
from fedleak.defences.noise import RelativeNoise
from fedleak.defences.quantisation import Quantisation
from simulations.scenario import Scenario

#: Bits of an entry that nothing has made narrower: float32.
_FULL = 32


class Traffic:
    """Counts what the replies of a round need, as messages that nothing is wasted in.

    A tensor takes the fewer of: all its entries; or its entries that are not zero, and one bit
    for each entry to say which these are. An entry takes 32 bits; after ``quantise`` its
    bits, after ``sign`` one, and 32 more for the scale of each tensor. A tensor that is zero
    takes nothing.

    Parameters
    ----------
    scenario : Scenario

    Attributes
    ----------
    bytes_sent : float
        Median over the clients of the last round measured; NaN where none replied.
    """

    def __init__(self, scenario: Scenario):
        self.bits = entry_bits(scenario.defence.spec)
        self.shares_weights = scenario.training.share == "weights"
        self.bytes_sent = math.nan

    def measure(self, sent: Mapping[int, ArrayRecord], replies: Iterable[Message]) -> None:
        """Note the replies of one round, by what each node was sent.

        Those without arrays are left out.
        """
        sizes = []
        for reply in replies:
            record = None
            if not reply.has_error():
                record = next(iter(reply.content.array_records.values()), None)
            if record:
                try:
                    own = sent.get(reply.metadata.src_node_id, ArrayRecord())
                    sizes.append(self._bytes(own, record))
                except Exception as error:  # a client may send anything
                    log(DEBUG, "a reply's size cannot be told: %r", error)
        self.bytes_sent = median(sizes) if sizes else math.nan

    def _bytes(self, sent: ArrayRecord, record: ArrayRecord) -> int:
        total = 0
        for name, array in record.items():
            value = array.numpy()
            if self.shares_weights and name in sent:
                before = sent[name].numpy()
                value = value - before if before.shape == value.shape else value
            total += _tensor_bits(value, self.bits)
        return math.ceil(total / 8)


def entry_bits(spec: DefenceSpec) -> int:
    """Return the bits of an entry that a defence leaves: what comes last decides."""
    bits = _FULL
    for part in spec.parts:
        if isinstance(part, Quantisation):
            bits = part.bits
        elif part.signs:
            bits = 1
        elif isinstance(part, (RelativeNoise, DP)):
            bits = _FULL
    return bits


def _tensor_bits(value: np.ndarray, bits: int) -> int:
    filled = int(np.count_nonzero(value))
    if not filled:
        return 0
    scale = _FULL if bits < _FULL else 0
    return min(value.size * bits, filled * bits + value.size) + scale
