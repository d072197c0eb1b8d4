"""Flower plug-ins: the malicious server, FedSGD, reply checks and defence mods."""

from fedleak.client.training import LocalTraining
from strategies.defence_mod import choosing_defence_mod, defence_mod
from strategies.delegate import DelegatingStrategy
from strategies.fedsgd import FedSGD
from strategies.malicious_server import Leak, MaliciousServer
from strategies.reject_invalid import RejectInvalid
from strategies.tamper_guard import TamperGuard
from strategies.tampering_server import Tampering, TamperingServer

__all__ = [
    "DelegatingStrategy",
    "FedSGD",
    "Leak",
    "LocalTraining",
    "MaliciousServer",
    "RejectInvalid",
    "TamperGuard",
    "Tampering",
    "TamperingServer",
    "choosing_defence_mod",
    "defence_mod",
]
