"""Spread images over clients, with flwr-datasets' partitioners."""

from __future__ import annotations

import random
import zlib
from functools import lru_cache

from fedleak.data import LabelledImages, load_data
from fedleak.errors import InvalidInputError
from simulations.scenario import Scenario
from simulations.sections import Data, Partition


def training_data(scenario: Scenario) -> LabelledImages:
    """Return the images that are spread over the clients."""
    return _training_data(scenario.data, scenario.seed)


@lru_cache(maxsize=4)
def _training_data(data: Data, seed: int) -> LabelledImages:
    images, _ = load_data(data.name, data.root, data.download, data.size)
    if data.max_images and data.max_images < len(images):
        images = images.subset(_shuffled(len(images), seed)[: data.max_images])
    return images


def partitions(scenario: Scenario) -> list[list[int]]:
    """Return each client's indices into :func:`training_data`.

    Every client owns at least the images of one round, so that no round repeats one.

    Raises
    ------
    InvalidInputError
        If there are too few images for that.
    """
    clients, training = scenario.federation.clients, scenario.training
    images = training_data(scenario)
    if clients * training.images > len(images):
        raise InvalidInputError(
            f"federation.clients = {clients} with training.local_steps = {training.local_steps} "
            f"of training.batch_size = {training.batch_size} needs {clients * training.images} "
            f"images, but {scenario.data.name!r} has {len(images)} for training; use fewer "
            "clients, or smaller or fewer batches"
        )
    return _partitions(scenario.data, scenario.partition, clients, training.images, scenario.seed)


@lru_cache(maxsize=4)
def _partitions(
    data: Data, partition: Partition, clients: int, least: int, seed: int
) -> list[list[int]]:
    images = _training_data(data, seed)
    order = _shuffled(len(images), seed)
    if partition.kind == "iid":
        return [order[i::clients] for i in range(clients)]
    from datasets import Dataset
    from flwr_datasets.partitioner import DirichletPartitioner

    table = Dataset.from_dict({"index": order, "label": images.labels[order].tolist()})
    partitioner = DirichletPartitioner(
        num_partitions=clients,
        partition_by="label",
        alpha=partition.alpha,
        min_partition_size=0,
        self_balancing=False,
        seed=seed,
    )
    partitioner.dataset = table
    try:
        parts = [list(partitioner.load_partition(i)["index"]) for i in range(clients)]
    except ValueError as error:
        raise InvalidInputError(
            f"partition.alpha = {partition.alpha} cannot split {len(images)} images over "
            f"{clients} clients ({error}); raise alpha or use fewer clients"
        ) from error
    return _topped_up(parts, least, seed)


def _topped_up(parts: list[list[int]], least: int, seed: int) -> list[list[int]]:
    """Give clients that own fewer than ``least`` images some of the largest client's.

    Drawing again, as the partitioner does, finds no split of many clients at a small alpha
    in which all of them own enough.
    """
    draw = random.Random(seed)
    for part in parts:
        while len(part) < least:
            largest = max(parts, key=len)
            part.append(largest.pop(draw.randrange(len(largest))))
    return parts


def client_batches(scenario: Scenario, client: int, server_round: int) -> list[list[int]]:
    """Return the indices of each local step's batch of one client in one round.

    A client walks through its own images in a fixed random order, so that every image is
    used once before any is used twice; each further epoch takes those of the round in a
    new order. With ``training.draw = "anew"`` each round draws from all of them, without
    replacement.
    """
    own = partitions(scenario)[client]
    order = _shuffled(len(own), scenario.seed * 100_003 + client + 1)
    count, size = scenario.training.images, scenario.training.batch_size
    first = (server_round - 1) * count
    used = [own[order[(first + i) % len(own)]] for i in range(count)]
    if scenario.training.draw == "anew":
        draw = zlib.crc32(f"{scenario.seed}/{client}/{server_round}/draw".encode())
        used = [own[i] for i in _shuffled(len(own), draw)[:count]]
    out = []
    for epoch in range(scenario.training.epochs):
        if epoch:
            draw = zlib.crc32(f"{scenario.seed}/{client}/{server_round}/{epoch}".encode())
            used = [used[i] for i in _shuffled(count, draw)]
        out += [used[i : i + size] for i in range(0, count, size)]
    return out


def client_images(scenario: Scenario, client: int, server_round: int) -> list[int]:
    """Return the indices of the images that one client uses in one round."""
    first_epoch = client_batches(scenario, client, server_round)[: scenario.training.local_steps]
    return [i for batch in first_epoch for i in batch]


def _shuffled(count: int, seed: int) -> list[int]:
    import torch

    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
