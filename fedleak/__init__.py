"""What does a federated-learning server learn about the training images?

>>> from fedleak import Observation, make_attack
>>> attack = make_attack("hybrid")
>>> (result,) = attack([Observation.from_gradient(model, gradient, (3, 32, 32))])  # doctest: +SKIP
>>> result.images, result.labels, result.fit  # doctest: +SKIP

The library knows torch and nothing of Flower or Ray; :mod:`strategies` and
:mod:`simulations` connect it to them.
"""

import os as _os
import warnings as _warnings
from importlib import import_module as _import_module
from importlib import metadata as _metadata
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

# Before torch is imported: its threads shall sleep, not spin, while they wait for each other.
# On a machine with other work to do, spinning made the many small products here 10 times slower.
_os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if _TYPE_CHECKING:
    from fedleak.attacks import ATTACKS, Attack, Reconstruction, make_attack, run_attack
    from fedleak.client.replay import Replay
    from fedleak.client.training import LocalTraining
    from fedleak.defences import DEFENCES, Defence, DefenceSpec, defend, parse_defence
    from fedleak.errors import FedleakError
    from fedleak.metric import SecurityMetric, security_metric
    from fedleak.models import MODELS, build_model
    from fedleak.observation import Observation
    from fedleak.priors import PRIORS, GaussianPrior, Prior, make_prior
    from fedleak.quality import Quality, score
    from fedleak.systems import Chain
    from fedleak.terms import Terms
    from fedleak.threat import ThreatModel

#: Where each public name lives: it is imported when it is first asked for, and torch with it.
_HOMES = {
    "ATTACKS": "fedleak.attacks",
    "Attack": "fedleak.attacks",
    "Chain": "fedleak.systems",
    "DEFENCES": "fedleak.defences",
    "Defence": "fedleak.defences",
    "DefenceSpec": "fedleak.defences",
    "FedleakError": "fedleak.errors",
    "GaussianPrior": "fedleak.priors",
    "LocalTraining": "fedleak.client.training",
    "MODELS": "fedleak.models",
    "Observation": "fedleak.observation",
    "PRIORS": "fedleak.priors",
    "Prior": "fedleak.priors",
    "Quality": "fedleak.quality",
    "Reconstruction": "fedleak.attacks",
    "Replay": "fedleak.client.replay",
    "SecurityMetric": "fedleak.metric",
    "Terms": "fedleak.terms",
    "ThreatModel": "fedleak.threat",
    "build_model": "fedleak.models",
    "defend": "fedleak.defences",
    "make_attack": "fedleak.attacks",
    "make_prior": "fedleak.priors",
    "parse_defence": "fedleak.defences",
    "run_attack": "fedleak.attacks",
    "score": "fedleak.quality",
    "security_metric": "fedleak.metric",
}


def __getattr__(name: str) -> _Any:
    if name in _HOMES:
        value = getattr(_import_module(_HOMES[name]), name)
    elif name.startswith("_"):
        raise AttributeError(name)
    else:  # a module of ours
        try:
            value = _import_module(f"fedleak.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"fedleak.{name}":
                raise
            raise AttributeError(f"module 'fedleak' has no attribute {name!r}") from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# torch.func's first use loads code of torch's own that torch itself deprecates.
_warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)

try:
    __version__ = _metadata.version("fedleak")
except _metadata.PackageNotFoundError:  # run from a folder that is not installed
    __version__ = "0+unknown"

__all__ = [
    "ATTACKS",
    "DEFENCES",
    "MODELS",
    "PRIORS",
    "Attack",
    "Chain",
    "Defence",
    "DefenceSpec",
    "FedleakError",
    "GaussianPrior",
    "LocalTraining",
    "Observation",
    "Prior",
    "Quality",
    "Reconstruction",
    "Replay",
    "SecurityMetric",
    "Terms",
    "ThreatModel",
    "__version__",
    "build_model",
    "defend",
    "make_attack",
    "make_prior",
    "parse_defence",
    "run_attack",
    "score",
    "security_metric",
]
