"""The rules by which what is known spreads over a graph: one file each."""

from __future__ import annotations

from fedleak.graph.knowledge import Rule
from fedleak.graph.rules import (
    backward,
    batches,
    bias_sums,
    blind,
    forward,
    gradient_rows,
    grouped_rows,
    head,
    inverse,
    own_statistics,
)

#: In the order in which they are tried: what costs least first.
RULES: dict[str, Rule] = {
    "head": head.apply,
    "forward": forward.apply,
    "inverse": inverse.apply,
    "backward": backward.apply,
    "bias sums": bias_sums.apply,
    "gradient rows": gradient_rows.apply,
    "grouped rows": grouped_rows.apply,
    "own statistics": own_statistics.apply,
    "batch": batches.apply,
    "blind convolution": blind.apply,
}
