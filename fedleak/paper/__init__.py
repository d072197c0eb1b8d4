"""The paper's comparison (Chen & Campbell, BMVC 2022): attacks by networks, as one command."""

from fedleak.paper.command import paper
from fedleak.paper.photographs import photographs

__all__ = ["paper", "photographs"]
