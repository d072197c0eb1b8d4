"""``linear`` against dense linear algebra on the same layer systems.

``python -m tests.benchmarks.linear [--network NAME] [--repeats 7] [--threads 1] [--json FILE]``

Ours is the whole attack on one update: reading the model with torch.fx, inferring the label,
ranking every layer's system, solving all of them, and the fit at the end. The dense side is
given every layer's finished matrix, and pays for nothing but the singular values (values
only, for the rank) and one ``torch.linalg.lstsq`` (LAPACK's gelsy, which takes deficient
ranks): setting the matrix up and going from layer to layer are not counted against it.
Repeats of ours lie between the dense layers, so that both see the same machine; the dense
side runs once, as it takes up to minutes.
"""

from __future__ import annotations

from typing import Any

from tests.benchmarks.common import Network, arguments, median, networks, observe, report, seconds

import torch  # isort: skip
from torch import Tensor

from fedleak import make_attack
from fedleak.attacks.evidence import Evidence
from fedleak.attacks.linear import LinearSolution, solve_recursively
from fedleak.metric.rank import TOLERANCE, dense_system
from fedleak.systems import Affine

NOTES = (
    "ours: the whole attack (reading the model, label, ranks, solving, fit), median; "
    "dense: singular values and lstsq of given matrices, once. Target: a ratio of 300."
)


def measure(network: Network, repeats: int = 7, size: int = 32) -> dict[str, Any]:
    """Return the times of both sides on one network, and their ratio.

    ``difference`` is how far the images of the two are apart, relative, where the dense
    systems are solved around the same start: that they do the same work.
    """
    name, model = network
    observation = observe(model, size)
    attack = make_attack("linear", device="cpu")
    ours = [seconds(lambda: attack([observation])) for _ in range(repeats)][1:]
    evidence = Evidence.gather([observation], "cpu")
    solution = solve_recursively(evidence)
    dense, difference, rows = 0.0, 0.0, []
    for i, layer in enumerate(evidence.chain.layers):
        if not isinstance(layer, Affine):
            continue
        for u, v in _systems(layer, i, evidence, solution):
            out: list[Tensor] = []
            dense += seconds(lambda u=u, v=v, out=out: out.append(_dense(u, v)))
            miss = u @ out[0] - v
            own = (
                u @ solution.values[i][0].reshape(-1, 1) - v if layer.weight.shape[0] == 1 else miss
            )
            difference = max(difference, float((miss.norm() - own.norm()).abs() / v.norm()))
            rows.append(tuple(u.shape))
        ours += [seconds(lambda: attack([observation])) for _ in range(repeats)]
    return {
        "network": name,
        "systems": " ".join(f"{r}x{c}" for r, c in rows),
        "ours s": median(ours),
        "dense s": dense,
        "ratio": dense / median(ours),
        "residuals differ": difference,
    }


def _systems(
    layer: Affine, i: int, evidence: Evidence, solution: LinearSolution
) -> list[tuple[Tensor, Tensor]]:
    """Return ``(U, v)`` of each group of layer ``i``, as the attack meets it."""
    z, e = solution.values[i + 1], solution.cotangents[i + 1]
    target = layer.target(z, evidence.gradient[layer.weight_name])
    groups = layer.weight.shape[0]
    weight = target.weight.reshape(groups, -1, 1)
    gradient = target.gradient.reshape(groups, -1, 1)
    return [
        (torch.cat([a, k / e.norm()]), torch.cat([weight[g], gradient[g] / e.norm()]))
        for g, (a, k) in enumerate(dense_system(layer, e[0]))
    ]


def _dense(u: Tensor, v: Tensor) -> Tensor:
    """Rank and solve one system, as code that builds it would."""
    values = torch.linalg.svdvals(u)
    int((values > TOLERANCE * values[0]).sum())
    return torch.linalg.lstsq(u, v).solution


def main() -> None:
    """Print the table."""
    options = arguments(__doc__, repeats=7)
    rows = []
    for network in networks(options.network):
        rows.append(measure(network, options.repeats))
        print(rows[-1]["network"], "done", flush=True)
    report(rows, options, NOTES)


if __name__ == "__main__":
    main()
