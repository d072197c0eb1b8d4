"""Pure linear algebra of one layer's gradient: no model, no graph, no attack.

Every function takes tensors and a :class:`~fedleak.graph.kernels.geometry.Geometry`, computes in
float64, and returns what it found with a residual, an estimate of its error and a gap;
where its criterion fails it refuses with :class:`~fedleak.graph.kernels.refusal.Refused`.
"""
