"""Defences by name: pure functions from an update to an update."""

from fedleak.defences.base import DEFENCES, Defence, DefenceSpec, defend, parse_defence
from fedleak.defences.noise import gaussian_noise
from fedleak.defences.pruning import magnitude_pruning

__all__ = [
    "DEFENCES",
    "Defence",
    "DefenceSpec",
    "defend",
    "gaussian_noise",
    "magnitude_pruning",
    "parse_defence",
]
