"""What a client does, said once: loss, optimiser, training; computed, and replayed differentiably.

Simulations and laboratory compute what clients send with :mod:`fedleak.client.compute`; attacks
and metric replay it with :mod:`fedleak.client.replay`.
"""

from fedleak.client.compute import example_gradients, gradient, train
from fedleak.client.loss import LOSSES, BinaryCrossEntropy, CanonicalLoss, CrossEntropy, Loss
from fedleak.client.optimiser import OPTIMISERS, SGD, Adam, AdamW, Optimiser
from fedleak.client.replay import Replay
from fedleak.client.training import LocalTraining

__all__ = [
    "LOSSES",
    "OPTIMISERS",
    "SGD",
    "Adam",
    "AdamW",
    "BinaryCrossEntropy",
    "CanonicalLoss",
    "CrossEntropy",
    "LocalTraining",
    "Loss",
    "Optimiser",
    "Replay",
    "example_gradients",
    "gradient",
    "train",
]
