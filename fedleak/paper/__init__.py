"""The paper's comparison (Chen & Campbell, BMVC 2022): attacks by networks."""

from fedleak.paper.photographs import photographs

__all__ = ["photographs"]
