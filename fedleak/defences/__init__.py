"""Defences by name: pure functions from an update to an update."""

from fedleak.defences.base import DEFENCES, Defence, Update
from fedleak.defences.noise import GaussianNoise
from fedleak.defences.pruning import MagnitudePruning
from fedleak.defences.spec import DefenceSpec, defend, parse_defence

__all__ = [
    "DEFENCES",
    "Defence",
    "DefenceSpec",
    "GaussianNoise",
    "MagnitudePruning",
    "Update",
    "defend",
    "parse_defence",
]
