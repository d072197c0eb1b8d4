"""Attacks by name. An attack sees observations and nothing else."""

from fedleak.attacks.base import (
    ATTACKS,
    Attack,
    Outcome,
    Reconstruction,
    attack_for,
    make_attack,
    run_attack,
)
from fedleak.attacks.dossier import Dossier, Held
from fedleak.attacks.evidence import Evidence, resolve_device
from fedleak.attacks.first_layer import RowsAttack
from fedleak.attacks.fished import FishedAttack
from fedleak.attacks.hybrid import HybridAttack
from fedleak.attacks.linear import LinearAttack
from fedleak.attacks.published.gradient_matching import CosineAttack, DLGAttack, IDLGAttack
from fedleak.attacks.published.hybrid_paper import PaperHybridAttack
from fedleak.attacks.rounds import together

__all__ = [
    "ATTACKS",
    "Attack",
    "CosineAttack",
    "DLGAttack",
    "Dossier",
    "Evidence",
    "FishedAttack",
    "Held",
    "HybridAttack",
    "IDLGAttack",
    "LinearAttack",
    "Outcome",
    "PaperHybridAttack",
    "Reconstruction",
    "RowsAttack",
    "attack_for",
    "make_attack",
    "resolve_device",
    "run_attack",
    "together",
]
