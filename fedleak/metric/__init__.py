"""The security metric: how solvable each layer's linear system is."""

from fedleak.metric.c_metric import LayerRank, SecurityMetric, security_metric
from fedleak.metric.rank import exact_rank, structural_rank

__all__ = ["LayerRank", "SecurityMetric", "exact_rank", "security_metric", "structural_rank"]
