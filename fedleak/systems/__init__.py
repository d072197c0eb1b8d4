"""Layers as linear systems: one file for each kind of layer."""

from fedleak.systems.base import LAYERS, Above, Descent, Equations, Gradients, Layer, Pointwise
from fedleak.systems.chain import Chain, Trace
from fedleak.systems.check import check_layer
from fedleak.systems.system import Affine, Rows, System

__all__ = [
    "LAYERS",
    "Above",
    "Affine",
    "Chain",
    "Descent",
    "Equations",
    "Gradients",
    "Layer",
    "Pointwise",
    "Rows",
    "System",
    "Trace",
    "check_layer",
]
