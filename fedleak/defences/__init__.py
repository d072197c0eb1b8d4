"""Defences by name: pure functions from an update to an update."""

from fedleak.defences.base import DEFENCES, Defence, Tensors
from fedleak.defences.clipping import DP, Clipping
from fedleak.defences.flower_mods import FixedClippingMod, LocalDpMod
from fedleak.defences.layers import Soteria, Withholding
from fedleak.defences.noise import GaussianNoise, LaplaceNoise
from fedleak.defences.pruning import MagnitudePruning, RandomSparsification
from fedleak.defences.quantisation import Quantisation, Sign
from fedleak.defences.spec import DefenceSpec, defend, defend_examples, parse_defence

__all__ = [
    "DEFENCES",
    "DP",
    "Clipping",
    "Defence",
    "DefenceSpec",
    "FixedClippingMod",
    "GaussianNoise",
    "LaplaceNoise",
    "LocalDpMod",
    "MagnitudePruning",
    "Quantisation",
    "RandomSparsification",
    "Sign",
    "Soteria",
    "Tensors",
    "Withholding",
    "defend",
    "defend_examples",
    "parse_defence",
]
