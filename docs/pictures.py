"""Draw the pictures of these pages, from digits that scikit-learn ships: python -m docs.pictures.

Everything is computed by the library, on clients that are simulated here; the seed is 0.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor, nn

from fedleak import Chain, make_attack
from fedleak.data import load_data
from fedleak.defences import parse_defence
from fedleak.laboratory import Trials, reconstruct
from fedleak.metric import security_metric
from fedleak.models import conv_chain
from fedleak.plots import image_grid
from fedleak.quality import score_batch
from fedleak.systems import Affine
from fedleak.systems.dense import dense_system

FOLDER = Path(__file__).parent / "pictures"
SHAPE = (1, 8, 8)
#: What anybody knows of scans of single digits, as in the scenario `demo`.
DIGITS = {"mean": 0.3, "sigma": 0.4, "rho": 0.7, "power": 1.0, "adapt": False}
#: One digit of each class.
CHOSEN = list(range(10))


def digits(count: int = 6) -> tuple[Tensor, Tensor]:
    """Return the first images of scikit-learn's digits that clients would hold."""
    images, _ = load_data("digits")
    return images.batch(CHOSEN[:count])


def network(*convolutions: tuple[int, int, int, int]) -> nn.Sequential:
    torch.manual_seed(0)
    return conv_chain(convolutions, SHAPE).eval()


def attacked(model: nn.Module, count: int = 6, attack: str = "hybrid", **options: object) -> Trials:
    own = {"prior_options": DIGITS} if attack == "hybrid" else {}
    return reconstruct(model, *digits(count), attack=make_attack(attack, **own), **options)  # type: ignore[arg-type]


def row(label: str, trials: Trials) -> tuple[str, list[np.ndarray], list[float]]:
    return label, [t.image.numpy() for t in trials.trials], trials.psnr_db


def grid(name: str, title: str, rows: list[tuple[str, Trials]], count: int = 6) -> None:
    truth = [image.numpy() for image in digits(count)[0]]
    image_grid(truth, [row(*r) for r in rows], FOLDER / name, title)


def save(figure: Figure, name: str) -> None:
    figure.savefig(FOLDER / name, dpi=120)
    plt.close(figure)


def show(axis: Axes, image: Tensor, title: str, **how: object) -> None:
    axis.imshow(image.numpy(), **({"cmap": "gray", "vmin": 0, "vmax": 1} | how))  # type: ignore[arg-type]
    axis.set_title(title, fontsize=9)
    axis.set(xticks=[], yticks=[])


def head() -> None:
    """A fully connected layer: every row of its gradient is the image, times a number."""
    (image,), label = digits(1)[0], digits(1)[1]
    torch.manual_seed(0)
    fc = nn.Linear(64, 10)
    loss = F.cross_entropy(fc(image.reshape(1, 64)), label)
    weight, bias = torch.autograd.grad(loss, [fc.weight, fc.bias])
    figure, axes = plt.subplots(2, 6, figsize=(9, 3.3), layout="constrained")
    most = float(weight.abs().max())
    for r, axis in enumerate(axes[:, :5].flatten()):
        how = {"cmap": "RdBu_r", "vmin": -most, "vmax": most}
        show(axis, weight[r].reshape(8, 8), f"G[{r}],  g[{r}] = {bias[r]:+.3f}", **how)
    show(axes[0, 5], image[0], "the image")
    show(axes[1, 5], (weight[3] / bias[3]).reshape(8, 8), "G[3] / g[3]")
    figure.suptitle("The gradient of a fully connected layer, row by row (one image)", fontsize=11)
    save(figure, "head.png")


def first_layer(model: nn.Module) -> tuple[Affine, Tensor, Tensor]:
    """Return the first layer, its ``dL/dz`` and its system, for the first digit."""
    images, labels = digits(1)
    chain = Chain.read(model.double(), SHAPE)
    trace = chain.trace(images.double(), labels)
    layer = chain.layers[0]
    assert isinstance(layer, Affine)
    # errors[i] is dL/d of the output of layer i - 1.
    ((a, k),) = dense_system(layer, trace.cotangents[0][0])
    return layer, a, k


def system() -> None:
    """The linear system of a convolution: what the weights say, and what the gradient says."""
    _, a, k = first_layer(network((3, 3, 1, 0)))
    u = torch.cat([a, k / k.norm() * a.norm()])
    kind = torch.zeros_like(u)
    kind[: len(a)][a != 0], kind[len(a) :][k != 0] = 1, 2
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.6), layout="constrained")
    axes[0].imshow(kind, cmap=ListedColormap(["white", "#4c72b0", "#dd8452"]), aspect="auto")
    axes[0].axhline(len(a) - 0.5, color="black", linewidth=0.8)
    axes[0].set(xlabel="unknowns: the 64 pixels", ylabel="equations",
                title="U = [A; K(e)], entries that are not zero")  # fmt: skip
    for y, text in ((len(a) / 2, "A x = z − c\nthe convolution"),
                    (len(a) + len(k) / 2, "K(e) x = G\nits gradient")):  # fmt: skip
        axes[0].text(66, y, text, rotation=90, va="center", fontsize=9)
    for filters, colour in ((1, "#c44e52"), (2, "#8172b3"), (3, "#55a868")):
        _, a, k = first_layer(network((filters, 4, 2, 0)))
        s = torch.linalg.svdvals(torch.cat([a, k / k.norm() * a.norm()]))
        rank = int((s > 1e-10 * s[0]).sum())
        s = torch.cat([s, s.new_zeros(64 - len(s))]).clamp_min(1e-17)
        label = f"{filters} filter{'s' * (filters > 1)}: rank {rank} of 64"
        axes[1].semilogy(range(1, 65), s / s[0], ".-", color=colour, label=label, markersize=4)
    axes[1].set(xlabel="singular value", ylabel="relative to the largest",
                title="4×4 kernels with stride 2: what is left open")  # fmt: skip
    axes[1].legend(loc="lower left", fontsize=9)
    save(figure, "system.png")


def deficiency() -> None:
    """Fewer filters leave more open; a prior fills in the rest."""
    rows = []
    for filters in (3, 2, 1):
        model = network((filters, 4, 2, 0))
        c = security_metric(model, SHAPE).c
        rows.append((f"linear\nc(M) = {c:.0f}", attacked(model, attack="linear")))
        if c < 0:
            rows.append((f"hybrid\nc(M) = {c:.0f}", attacked(model)))
    grid("deficiency.png", "One 4×4 convolution with stride 2, of 3, 2 and 1 filters", rows)


def batch() -> None:
    """What the head sends for four images is a mixture; it can be told apart."""
    model = network((6, 3, 1, 0))
    images, labels = digits(4)
    loss = F.cross_entropy(model(images), labels)
    (g,) = torch.autograd.grad(loss, [model[-1].weight])
    features = model[:-1](images).detach()
    # What a map of the head's input looks like as an image, for the eye alone.
    mixtures = torch.linalg.svd(g.detach(), full_matrices=False)[2][:4]
    seen = mixtures @ torch.linalg.lstsq(features, images.flatten(1)).solution
    seen = (seen - seen.amin(1, keepdim=True)) / (seen.amax(1) - seen.amin(1)).unsqueeze(1)
    found = attacked(model, 4, batch_size=4)
    figure, axes = plt.subplots(3, 4, figsize=(5.4, 4.6), layout="constrained")
    for i, trial in enumerate(found.trials):
        show(axes[0, i], images[i, 0], "")
        show(axes[1, i], seen[i].reshape(8, 8), "")
        show(axes[2, i], trial.image[0], "")
        axes[2, i].set_xlabel(f"{trial.quality.psnr_db:.1f} dB", fontsize=8)
    for line, label in zip(
        axes[:, 0], ("true image", "mixture\nreceived", "told apart"), strict=True
    ):
        line.set_ylabel(label, fontsize=9)
    figure.suptitle("One gradient of four images", fontsize=11)
    save(figure, "batch.png")


def defences() -> None:
    """Two attackers, under the same noise and the same pruning."""
    model = network((6, 4, 2, 0))
    rows = []
    for defence in ("noise:0.3", "prune:0.7", "prune:0.9"):
        for informed in (False, True):
            label = f"{defence}\n{'informed' if informed else 'unaware'}"
            rows.append((label, attacked(model, defence=defence, informed=informed)))
    grid("defences.png", "The same updates, and two attackers", rows)


def privacy() -> None:
    """Clipping and noise, as in DP-SGD: an informed attacker."""
    model = network((6, 4, 2, 0))
    rows = []
    for noise in ("0.001", "0.01", "0.03", "0.1", "0.3"):
        spec = parse_defence(f"dp:clip=1,noise={noise}")
        rows.append((f"noise {noise}", attacked(model, defence=spec, informed=True)))
    grid("privacy.png", "dp:clip=1,noise=...: what an informed attacker recovers", rows)


def stranger() -> None:
    """The app of tutorials/flower-app.md: one client's eight images, out of its weights."""
    sys.path.insert(0, str(FOLDER.parent / "tutorials" / "stranger_app"))
    from digits_app import client_app, task
    from flwr.app import ArrayRecord, ConfigRecord
    from flwr.serverapp.strategy import FedAvg

    from fedleak.strategies import Leak, LocalTraining, MaliciousServer
    from simulations.engines import quiet_flower
    from simulations.grid import InlineGrid

    quiet_flower()
    torch.manual_seed(0)
    leaks: list[Leak] = []
    strategy = MaliciousServer(
        FedAvg(fraction_evaluate=0.0), task.Net, SHAPE, training=LocalTraining(0.1, 8),
        num_images=8, on_leak=leaks.append,
    )  # fmt: skip
    grid = InlineGrid(client_app.app, 10)
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(task.Net().state_dict()),
        num_rounds=1,
        train_config=ConfigRecord({"learning-rate": 0.1}),
    )
    first = min(grid.get_node_ids())  # partition 0
    (made,) = (leak.reconstruction for leak in leaks if leak.nodes == (first,))
    assert made is not None
    truth, labels = task.load_data(0)
    scored = score_batch(made.images, made.labels, truth, labels)
    rows = [("from the weights", [s.image.numpy() for s in scored if s.image is not None],
             [s.quality.psnr_db for s in scored if s.quality is not None])]  # fmt: skip
    title = f"One client's images, fit {made.fit:.1e}"
    image_grid([image.numpy() for image in truth], rows, FOLDER / "stranger.png", title)


PICTURES: tuple[Callable[[], None], ...] = (
    head, system, deficiency, batch, defences, privacy, stranger,
)  # fmt: skip


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for draw in PICTURES:
        draw()
        print(FOLDER.name + f"/{draw.__name__}.png")  # noqa: T201


if __name__ == "__main__":
    main()
