"""The security metric: how solvable each layer's linear system is, and what that leaks in dB."""

from fedleak.metric.audit import Audit, audit
from fedleak.metric.c_metric import (
    LayerRank,
    SecurityMetric,
    exact_rank,
    security_metric,
    structural_rank,
)

__all__ = [
    "Audit",
    "LayerRank",
    "SecurityMetric",
    "audit",
    "exact_rank",
    "security_metric",
    "structural_rank",
]
