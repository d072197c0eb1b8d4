"""The security metric by both ways, against dense SVDs of the same systems.

``python -m tests.benchmarks.metric [--network NAME] [--repeats 5] [--threads 1] [--vectors]
[--skip-dense] [--json FILE]``

Ours is the whole of ``security_metric``: reading the model with torch.fx, a forward and a
backward pass, and every layer's ranks. The dense side is given every layer's finished matrix
and pays for nothing but its singular values; with ``--vectors``, for a whole SVD, as the
published code does. It runs once, as it takes up to a minute for one layer, and repeats of
ours lie between its layers, so that both see the same machine. The last row is all networks
together.
"""

from __future__ import annotations

import time
from typing import Any

from tests.benchmarks.common import Network, median, networks, parse, parser_of, report, seconds

import torch  # isort: skip
from torch import Tensor

from fedleak.metric import security_metric
from fedleak.systems import Chain
from fedleak.systems.conv import Conv
from fedleak.systems.dense import dense_system
from fedleak.systems.ranks.linalg import TOLERANCE

NOTES = (
    "exact, fast: security_metric(model, shape, 'exact' and 'structural'), median; dense: an "
    "SVD ({svd}) of given matrices, once. agree: all three give the same ranks. Targets: all "
    "networks under 5 s fast, and a ratio (dense to exact) of 10."
)


def measure(
    network: Network, repeats: int = 5, size: int = 32, vectors: bool = False, dense: bool = True
) -> dict[str, Any]:
    """Return the times of all ways on one network, and whether their ranks agree."""
    name, model = network
    shape = (3, size, size)
    exact_times: list[float] = []
    fast_times: list[float] = []

    def ours() -> None:
        exact_times.append(seconds(lambda: security_metric(model, shape, "exact")))
        fast_times.append(seconds(lambda: security_metric(model, shape, "structural")))

    exact = security_metric(model, shape, "exact")  # also pays for what is set up once
    fast = security_metric(model, shape, "structural")
    for _ in range(repeats):
        ours()
    found, taken = [], 0.0
    for u in _systems(model, shape) if dense else ():
        begin = time.perf_counter()
        found.append(_rank(u, vectors))
        taken += time.perf_counter() - begin
        ours()
    ranks = [layer.rank for layer in exact.layers]
    return {
        "network": name,
        "c": exact.c,
        "fast s": median(fast_times),
        "exact s": median(exact_times),
        "dense s": taken,
        "ratio": taken / median(exact_times),
        "agree": ranks == [x.rank for x in fast.layers] and (not dense or ranks == found),
    }


def _systems(model: torch.nn.Module, shape: tuple[int, int, int]) -> list[Tensor]:
    """Return ``U`` of each convolution, both blocks at one scale, as the metric meets it."""
    chain = Chain.read(model, shape)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1, *shape, generator=generator, dtype=torch.float64)
    label = torch.randint(chain.head.out_shape[0], (1,), generator=generator)
    cotangents = chain.trace(x, label).cotangents
    found = []
    for layer, e in zip(chain.layers, cotangents, strict=True):
        if isinstance(layer, Conv):
            ((a, k),) = dense_system(layer, e[0])
            found.append(torch.cat([a / a.norm(), k / k.norm()]))
    return found


def _rank(u: Tensor, vectors: bool) -> int:
    values = torch.linalg.svd(u, full_matrices=False)[1] if vectors else torch.linalg.svdvals(u)
    return int((values > TOLERANCE * values[0]).sum())


def together(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the row of all networks together."""
    total = {key: sum(row[key] for row in rows) for key in ("fast s", "exact s", "dense s")}
    ratio = total["dense s"] / total["exact s"]
    agree = all(row["agree"] for row in rows)
    return {"network": "all", "c": "", **total, "ratio": ratio, "agree": agree}


def main() -> None:
    """Print the table."""
    parser = parser_of(__doc__, repeats=5)
    parser.add_argument("--vectors", action="store_true", help="Give the dense side a whole SVD")
    parser.add_argument("--skip-dense", action="store_true", help="Measure only ours")
    options = parse(parser)
    rows = [
        measure(n, options.repeats, vectors=options.vectors, dense=not options.skip_dense)
        for n in networks(options.network)
    ]
    svd = "with vectors" if options.vectors else "values only"
    report([*rows, together(rows)], options, NOTES.format(svd=svd))


if __name__ == "__main__":
    main()
