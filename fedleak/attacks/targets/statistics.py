"""Statistics of batch normalisation that come along with weights: known values of the batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.func import vmap

from fedleak.client.replay import Gradients, Replay
from fedleak.observation import Observation


def _counting(model: nn.Module) -> Iterator[tuple[str, nn.modules.batchnorm._BatchNorm]]:
    """Return the layers whose running statistics a step in training moves."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            yield name, module


def received_statistics(observations: Sequence[Observation], replay: Replay) -> Gradients:
    """Return the mean and variance of every layer's input over the batch, by name.

    A layer with momentum ``a`` makes ``(1 - a) sent + a batch`` of each running statistic,
    the variance over ``n - 1``; without momentum ``a = 1 / (batches + 1)``.

    Only one step of one client is taken apart so. After several, the running statistics mix
    those of the batches at weights and in an order that are not known: they are not used.

    Returns
    -------
    dict of Tensor, shape (N, channels)
        Empty where the update has no such statistics, or the threat model forbids them.
    """
    first = observations[0]
    once = first.terms.trained is not None and first.terms.trained.steps(first.num_images) == 1
    if not once or first.clients > 1 or not all(o.buffers for o in observations):
        return {}
    known: Gradients = {}
    for name, _ in _counting(replay.model):  # in the mode of the clients
        module = first.model.get_submodule(name)
        assert isinstance(module, nn.modules.batchnorm._BatchNorm)
        for kind in ("running_mean", "running_var"):
            sent, key = getattr(module, kind), f"{name}.{kind}" if name else kind
            if sent is None or any(key not in o.buffers for o in observations):
                continue
            rate = module.momentum
            if rate is None:
                assert module.num_batches_tracked is not None
                rate = 1 / (1 + int(module.num_batches_tracked))
            if rate > 0:
                received = torch.stack([o.buffers[key] for o in observations])
                batch = (received - (1 - rate) * sent.detach().cpu().double()) / rate
                known[key] = batch.to(replay.device)
    return known


def batch_statistics(replay: Replay, images: Tensor, names: Sequence[str]) -> Gradients:
    """Return what batches would leave of these statistics, differentiably.

    Parameters
    ----------
    replay : Replay
    images : Tensor, shape (N, B, C, H, W)
    names : sequence of str
        Keys of :func:`received_statistics`.

    Returns
    -------
    dict of Tensor, shape (N, channels)
    """

    def of_one(batch: Tensor) -> Gradients:
        made: Gradients = {}

        def record(name: str, x: Tensor) -> None:
            dims = [0, *range(2, x.dim())]
            made[f"{name}running_mean"] = x.mean(dims)
            made[f"{name}running_var"] = x.var(dims)

        hooks = [
            module.register_forward_pre_hook(
                lambda m, args, name=name: record(f"{name}." if name else "", args[0])
            )
            for name, module in _counting(replay.model)
        ]
        try:
            replay.model(batch)
        finally:
            for hook in hooks:
                hook.remove()
        return {name: made[name] for name in names}

    if len(images) == 1:
        return {k: v.unsqueeze(0) for k, v in of_one(images[0]).items()}
    return vmap(of_one)(images)
