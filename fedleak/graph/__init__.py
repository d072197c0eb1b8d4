"""Networks as graphs, and the linear systems of their layers."""
