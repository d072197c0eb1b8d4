"""Flower plug-ins: the malicious server, FedSGD, reply checks and defence mods."""

from fedleak.client.training import LocalTraining

from .delegate import DelegatingStrategy
from .fedsgd import FedSGD
from .leak import Leak
from .malicious_server import MaliciousServer
from .mods import choosing_defence_mod, clipping_told, defence_mod
from .old_api import capture_fit
from .reject_invalid import RejectInvalid
from .tamper_guard import TamperGuard
from .tamper_sender import Tampering, TamperSender
from .tampering_server import TamperingServer

__all__ = [
    "DelegatingStrategy",
    "FedSGD",
    "Leak",
    "LocalTraining",
    "MaliciousServer",
    "RejectInvalid",
    "TamperGuard",
    "TamperSender",
    "Tampering",
    "TamperingServer",
    "capture_fit",
    "choosing_defence_mod",
    "clipping_told",
    "defence_mod",
]
