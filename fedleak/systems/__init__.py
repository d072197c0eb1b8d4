"""Layers as linear systems: one file for each kind of layer."""

from fedleak.systems.base import Affine, Gradients, Layer, Pointwise, Rows, System
from fedleak.systems.chain import Chain, Trace

__all__ = ["Affine", "Chain", "Gradients", "Layer", "Pointwise", "Rows", "System", "Trace"]
