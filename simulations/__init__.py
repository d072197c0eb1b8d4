"""A federation as a Flower app: scenarios, engines, and sweeps over defences.

>>> from simulations import load_scenario, simulate
>>> simulate(load_scenario("demo"), "results/runs/demo")  # doctest: +SKIP
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from simulations.engines import Arm, simulate
    from simulations.evaluation.run import Evaluated, evaluate
    from simulations.evaluation.sweep import Sweep, load_sweep
    from simulations.grid import InlineGrid, OrderedGrid
    from simulations.scenario import Scenario, load_scenario, make_scenario

# Loaded when asked for: workers and Flower's processes import single modules of this package,
# and those of a large pool should not each pay for all.
_PLACES = {
    "Arm": "simulations.engines",
    "Evaluated": "simulations.evaluation.run",
    "InlineGrid": "simulations.grid",
    "OrderedGrid": "simulations.grid",
    "Scenario": "simulations.scenario",
    "Sweep": "simulations.evaluation.sweep",
    "evaluate": "simulations.evaluation.run",
    "load_scenario": "simulations.scenario",
    "load_sweep": "simulations.evaluation.sweep",
    "make_scenario": "simulations.scenario",
    "simulate": "simulations.engines",
}

__all__ = [
    "Arm",
    "Evaluated",
    "InlineGrid",
    "OrderedGrid",
    "Scenario",
    "Sweep",
    "evaluate",
    "load_scenario",
    "load_sweep",
    "make_scenario",
    "simulate",
]


def __getattr__(name: str) -> object:
    if name not in _PLACES:
        raise AttributeError(f"module 'simulations' has no attribute {name!r}")
    return getattr(_import_module(_PLACES[name]), name)
