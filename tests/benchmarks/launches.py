"""What an attack asks of a device: kernels launched and synchronisations, for each image.

``python -m tests.benchmarks.launches [--network NAME] [--attack linear] [--images 1 8]
[--json FILE]``

Counted by a dispatch mode of torch on a CPU, where no card is needed: operators below autograd and
``vmap``, without those that only look at memory in another way, are what a card would launch
kernels for, at least one each; ``item`` (a number or a truth value that Python asks for) is where
it would be waited for. The images share one model, and are attacked together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.benchmarks.common import Network, networks, parse, parser_of, report

import torch  # isort: skip
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fedleak import GaussianPrior, make_attack
from fedleak.observation import Observation

#: Operators that launch nothing: they make a view, or memory.
VIEWS = {
    "view", "_unsafe_view", "_reshape_alias", "as_strided", "expand", "permute", "transpose", "t",
    "unsqueeze", "squeeze", "select", "slice", "unfold", "diagonal", "detach", "alias", "split",
    "unbind", "split_with_sizes", "empty", "empty_like", "empty_strided", "new_empty",
    "new_empty_strided", "resize_", "lift_fresh",
}  # fmt: skip


class Counter(TorchDispatchMode):
    """Counts operators that launch kernels, and those that wait for them."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.waits = 0

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = operator.overloadpacket.__name__
        self.waits += name in ("_local_scalar_dense", "equal")
        self.launches += name not in VIEWS
        return operator(*args, **(kwargs or {}))


def drawn(network: Network, count: int, size: int = 32) -> tuple[Tensor, list[Observation]]:
    """Return smooth random images, drawn from the data-free prior, and their gradients."""
    _, model = network
    shape = (3, size, size)
    prior = GaussianPrior(shape)
    generator = torch.Generator().manual_seed(0)
    whitened = torch.randn(count, *prior.latent_shape, generator=generator, dtype=torch.float64)
    images = prior.image(whitened).clamp(0, 1).float()
    keys, parameters = zip(*model.named_parameters(), strict=True)
    out = []
    for n, image in enumerate(images):
        loss = F.cross_entropy(model(image.unsqueeze(0)), torch.tensor([n % 10]))
        gradient = dict(zip(keys, torch.autograd.grad(loss, parameters), strict=True))
        out.append(Observation.from_gradient(model, gradient, shape))
    return images, out


def count(network: Network, attack: str, images: int, size: int = 32) -> dict[str, Any]:
    """Return launches and synchronisations of one attack on so many images at once."""
    (_, seen), run = drawn(network, images, size), make_attack(attack, device="cpu")
    run(seen)  # what is set up once is not counted
    with Counter() as counter:
        run(seen)
    launched, waits = counter.launches, counter.waits
    return {
        "network": network[0],
        "attack": attack,
        "images": images,
        "launches": launched,
        "launches per image": launched / images,
        "synchronisations": waits,
        "per image": waits / images,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = parser_of(__doc__, repeats=1)
    parser.add_argument("--attack", action="append", default=[])
    parser.add_argument("--images", type=int, nargs="+", default=[1, 8])
    options = parse(parser, argv)
    rows = [
        count(network, attack, images)
        for network in networks(options.network)
        for attack in options.attack or ["linear", "hybrid"]
        for images in options.images
    ]
    report(rows, options, "Counted on CPU graphs: no card was at hand.")


if __name__ == "__main__":
    main()
