"""``linear`` against dense linear algebra on the same layer systems.

``python -m tests.benchmarks.linear [--network NAME] [--repeats 7] [--threads 1] [--vectors]
[--json FILE]``

Ours is the whole attack on one update: reading the model with torch.fx, inferring the label,
ranking every layer's system, solving all of them, and the fit at the end. The dense side is
given every layer's finished matrix, and pays for nothing but an SVD for the rank and one
``torch.linalg.lstsq`` (LAPACK's gelsy, which takes deficient ranks): setting the matrix up and
going from layer to layer are not counted against it. The SVD is of the singular values only,
the cheapest that gives a rank; with ``--vectors`` it is ``torch.linalg.svd``. Repeats of ours
lie between the dense layers, so that both see the same machine; the dense side runs once, as
it takes up to minutes.
"""

from __future__ import annotations

import time
from typing import Any

from tests.benchmarks.common import (
    Network,
    median,
    networks,
    observe,
    parse,
    parser_of,
    report,
    seconds,
)

import torch  # isort: skip
from torch import Tensor

from fedleak import make_attack
from fedleak.attacks.evidence import Evidence
from fedleak.attacks.linear import LinearSolution, solve_recursively
from fedleak.systems import Affine
from fedleak.systems.dense import dense_system
from fedleak.systems.ranks.linalg import TOLERANCE

NOTES = (
    "ours: the whole attack (reading the model, label, ranks, solving, fit), median; "
    "dense: an SVD ({svd}) and lstsq of given matrices, once. Target: a ratio of 300."
)


def measure(
    network: Network, repeats: int = 7, size: int = 32, vectors: bool = False
) -> dict[str, Any]:
    """Return the times of both sides on one network, and their ratio.

    ``residuals differ`` is the greatest difference of their relative residuals: both solve the
    same systems. Below a deficient layer these contradict themselves, and the attack weighs
    their rows by what it knows of their errors, so that it is not zero there.
    """
    name, model = network
    observation = observe(model, size)
    attack = make_attack("linear", device="cpu")
    attack([observation])  # the first call also pays for what torch sets up once
    ours = [seconds(lambda: attack([observation])) for _ in range(repeats)]
    evidence = Evidence.gather([observation], "cpu")
    solution = solve_recursively(evidence)
    dense, differ, shapes = 0.0, 0.0, []
    for i, layer in enumerate(evidence.chain.layers):
        if not isinstance(layer, Affine):
            continue
        u, v = _system(layer, i, evidence, solution)
        begin = time.perf_counter()
        x = _dense(u, v, vectors)
        dense += time.perf_counter() - begin
        own = solution.values[i].reshape(-1, 1)
        differ = max(differ, float(((u @ x - v).norm() - (u @ own - v).norm()).abs() / v.norm()))
        shapes.append("x".join(map(str, u.shape)))
        ours += [seconds(lambda: attack([observation])) for _ in range(repeats)]
    return {
        "network": name,
        "systems": " ".join(shapes),
        "ours s": median(ours),
        "dense s": dense,
        "ratio": dense / median(ours),
        "residuals differ": differ,
    }


def _system(
    layer: Affine, i: int, evidence: Evidence, solution: LinearSolution
) -> tuple[Tensor, Tensor]:
    """Return ``(U, v)`` of layer ``i``, as the attack meets it; a layer without groups."""
    z, e = solution.values[i + 1], solution.cotangents[i + 1]
    target = layer.target(z, evidence.gradient[layer.weight_name])
    ((a, k),) = dense_system(layer, e[0])
    right = torch.cat([target.weight.reshape(-1, 1), target.gradient.reshape(-1, 1) / e.norm()])
    return torch.cat([a, k / e.norm()]), right


def _dense(u: Tensor, v: Tensor, vectors: bool) -> Tensor:
    """Rank and solve one system, as code that builds it would."""
    values = torch.linalg.svd(u, full_matrices=False)[1] if vectors else torch.linalg.svdvals(u)
    int((values > TOLERANCE * values[0]).sum())
    return torch.linalg.lstsq(u, v).solution


def main() -> None:
    """Print the table."""
    parser = parser_of(__doc__, repeats=7)
    parser.add_argument("--vectors", action="store_true", help="Give the dense side a whole SVD")
    options = parse(parser)
    rows = [measure(n, options.repeats, vectors=options.vectors) for n in networks(options.network)]
    svd = "with vectors" if options.vectors else "values only"
    report(rows, options, NOTES.format(svd=svd))


if __name__ == "__main__":
    main()
