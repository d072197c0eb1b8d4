"""Scenarios: validated, explained, and the same everywhere."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from fedleak.errors import InvalidInputError
from simulations.partition import client_batches, client_images, partitions, training_data
from simulations.scenario import (
    Scenario,
    flatten,
    from_run_config,
    load_scenario,
    make_scenario,
)
from simulations.tables import SHIPPED
from simulations.task import test_data

ROOT = Path(__file__).parents[2]


def test_the_flower_config_is_the_scenarios_defaults() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    about_output = [config.pop(key) for key in ("out", "overwrite", "capture")]

    def dotted(table: dict[str, object], prefix: str = "") -> dict[str, object]:
        flat: dict[str, object] = {}
        for key, value in table.items():
            if isinstance(value, dict):
                flat |= dotted(value, f"{prefix}{key}.")
            else:
                flat[prefix + key] = value
        return flat

    assert about_output == ["", False, False]
    assert dotted(config) == flatten(Scenario())


def test_a_run_config_makes_the_scenario() -> None:
    changed = load_scenario(
        None, ["federation.rounds=9", "defence=noise:0.2", "model.name=cnn2-v1"]
    )
    config = {**flatten(changed), "out": "/somewhere", "overwrite": True, "capture": True}
    assert from_run_config(config) == changed


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.toml")), ids=lambda p: p.stem)
def test_shipped_scenarios_are_valid(path: Path) -> None:
    assert load_scenario(path.stem) == load_scenario(path)
    assert load_scenario(path).name == path.stem


def test_overrides() -> None:
    made = load_scenario(
        "demo",
        ["data.name=MNIST", "attack.options.precision=0.5", "defence.name=noise",
         "defence.strength=0.1", "compare=[]", "strategy.options = {min_train_nodes = 2}"],
        seed=4,
    )  # fmt: skip
    assert (made.data.name, made.seed) == ("MNIST", 4)
    assert made.attack.options["precision"] == 0.5
    assert made.defence.spec.label == "noise-0.1"
    assert made.strategy.options == {"min_train_nodes": 2}
    assert [d.spec.label for d in made.arms()] == ["noise-0.1"]
    short = load_scenario(None, ["defence=prune:0.5", "defence.strength=0.7"])
    assert short.defence.spec.label == "prune-0.7"
    several = load_scenario(None, ["defence=clip:1+noise:0.1", "compare=['withhold:fc']"])
    assert [a.spec.label for a in several.arms()] == ["clip-1+noise-0.1", "withhold-fc"]
    named = load_scenario(None, ["defence.name=clip:1+noise:0.1"])
    assert named.defence.spec == several.defence.spec
    assert from_run_config(flatten(named)).defence == named.defence


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["federation.round=3"], "unknown key 'federation.round'; did you mean 'rounds'"),
        (["fedration.rounds=3"], "unknown key 'fedration'; did you mean 'federation'"),
        (["model.name=cnn2v1"], "unknown model 'cnn2v1'; did you mean 'cnn2-v1'"),
        (["data.name=digit"], "unknown data set 'digit'; did you mean 'digits'"),
        (["attack.name=hybird"], "unknown attack 'hybird'; did you mean 'hybrid'"),
        (["defence.name=nois"], "unknown defence 'nois'; did you mean 'noise'"),
        (["strategy.name=FedAvgg"], "unknown strategy 'FedAvgg'; did you mean 'FedAvg'"),
        (["attack.options.stepz=1"], "Known: prior"),
        (["federation.fraction=1.5"], "federation.fraction = 1.5"),
        (["federation.fraction=0"], "federation.fraction = 0"),
        (["federation.clients=0"], "federation.clients = 0"),
        (["training.learning_rate=-1"], "training.learning_rate = -1"),
        (["training.batch_size=many"], "training.batch_size = 'many'"),
        (["partition.kind=random"], "partition.kind = 'random'"),
        (["defence=prune:1.5"], "strength 1.5 is not in [0, 1.0)"),
        (["defence=dp:clip=1,noise=1,examples=4"], "training.batch_size=4"),
        (["defence.strength=0.5"], "defence 'none' has no strength"),
        (["compare=['noise:0.1', 'noise:0.1']"], "listed twice"),
        (["training.share=weights"], "set training.share=gradient or strategy.name=FedAvg"),
        (["training.local_steps=3"], "takes one plain step"),
        (["name=../../etc"], "name = '../../etc'"),
        (["seed=-1"], "seed = -1"),
        (["rounds"], "write section.key=value"),
        (["seed.value=3", "seed=1", "seed.x=2"], "'seed' is a value"),
    ],
)
def test_bad_values_are_named(overrides: list[str], words: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        load_scenario(None, overrides)
    assert words in str(caught.value)


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="no scenario 'dem'; did you mean 'demo'"):
        load_scenario("dem")
    bad = tmp_path / "bad.toml"
    bad.write_text("rounds = = 3")
    with pytest.raises(InvalidInputError, match="not valid TOML"):
        load_scenario(bad)


def test_every_problem_is_told_at_once() -> None:
    with pytest.raises(InvalidInputError) as caught:
        make_scenario({"federation": {"clients": 0, "rounds": 0}, "nmae": "x"})
    assert all(w in str(caught.value) for w in ("clients", "rounds", "'nmae'; did you mean 'name'"))


@pytest.mark.parametrize("kind", ["iid", "dirichlet"])
def test_partitions_cover_every_image_once(kind: str) -> None:
    described = load_scenario(None, [f"partition.kind={kind}", "federation.clients=12"])
    parts = partitions(described)
    assert sorted(i for part in parts for i in part) == list(range(len(training_data(described))))
    assert len(parts) == 12
    assert (
        partitions(load_scenario(None, [f"partition.kind={kind}", "federation.clients=12"]))
        == parts
    )
    other = load_scenario(None, [f"partition.kind={kind}", "federation.clients=12"], seed=1)
    assert partitions(other) != parts


def test_dirichlet_skews_the_labels() -> None:
    def classes(alpha: float) -> float:
        described = load_scenario(None, ["partition.kind=dirichlet", f"partition.alpha={alpha}"])
        labels = training_data(described).labels
        shares = [labels[p].bincount(minlength=10) / len(p) for p in partitions(described)]
        return sum(float(s.max()) for s in shares) / len(shares)

    assert classes(0.1) > classes(100.0) + 0.2


def test_accuracy_is_measured_on_all_classes(tmp_path: Path) -> None:
    """A folder lies in the order of its classes: its first images would be of one class."""
    import torch
    from torchvision.io import write_png

    for label in range(4):
        (tmp_path / str(label)).mkdir()
        for i in range(50):
            pixels = torch.zeros(3, 8, 8, dtype=torch.uint8)
            write_png(pixels, str(tmp_path / str(label) / f"{i:02d}.png"))
    overrides = ["data.name=folder", f"data.root={tmp_path}", "data.max_test_images=10"]
    images = test_data(load_scenario(None, overrides))
    assert len(images) == 10
    assert len(set(images.labels.tolist())) >= 3


def test_more_clients_than_images() -> None:
    described = load_scenario(None, ["federation.clients=800", "training.batch_size=2",
                                     "training.share=weights", "strategy.name=FedAvg"])  # fmt: skip
    with pytest.raises(InvalidInputError, match="needs 1600 images, but 'digits' has 1438"):
        partitions(described)


def test_a_client_uses_all_its_images_before_any_twice() -> None:
    described = load_scenario(
        None,
        ["federation.clients=100", "training.share=weights", "strategy.name=FedAvg",
         "training.local_steps=2", "training.batch_size=3"],
    )  # fmt: skip
    own = partitions(described)[4]
    used = [i for r in range(1, 4) for b in client_batches(described, 4, r) for i in b]
    assert len(used) == 18
    assert len(set(used[: len(own)])) == len(own) == 15 - (len(own) == 14)


@pytest.mark.parametrize("name", ["femnist", "femnist-5-epochs"])
def test_no_round_repeats_an_image(name: str) -> None:
    """Many clients and a small alpha leave some with few images: they get some more."""
    for seed in range(3):
        described = load_scenario(name, seed=seed)
        parts = partitions(described)
        assert len(parts) >= 50
        assert sorted(i for p in parts for i in p) == list(range(len(training_data(described))))
        assert min(map(len, parts)) >= described.training.images
        for client in range(len(parts)):
            for server_round in (1, 2, 3):
                used = client_images(described, client, server_round)
                assert len(set(used)) == len(used) == described.training.images


def test_a_client_cannot_own_fewer_images_than_a_round_uses() -> None:
    options = ["training.share=weights", "strategy.name=FedAvg", "training.batch_size=16"]
    with pytest.raises(InvalidInputError) as caught:
        partitions(load_scenario(None, [*options, "training.local_steps=10"]))
    assert "local_steps = 10 of training.batch_size = 16 needs 1600 images" in str(caught.value)
    assert "use fewer clients" in str(caught.value)


def _idx(path: Path, values: bytes, *shape: int) -> None:
    """Write the format of MNIST: magic number, sizes, bytes."""
    head = bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)
    path.write_bytes(head + values)


def test_femnist_on_the_images_that_it_is_made_of(tmp_path: Path) -> None:
    raw = tmp_path / "EMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 1240), ("test", 62)):
        name = f"emnist-byclass-{part}"
        _idx(raw / f"{name}-images-idx3-ubyte", bytes(28 * 28 * count), count, 28, 28)
        _idx(raw / f"{name}-labels-idx1-ubyte", bytes(n % 62 for n in range(count)), count)
    described = load_scenario("femnist", ["data.name=EMNIST", f"data.root={tmp_path}"])
    images = training_data(described)
    assert (len(images), images.classes, images.shape) == (1240, 62, (1, 28, 28))
    assert min(map(len, partitions(described))) >= 16


def test_clients_of_fedprox_are_declared_with_its_term() -> None:
    described = load_scenario("fedavg", ["strategy.name=FedProx", "strategy.options.proximal_mu=3"])
    assert described.local is not None
    assert described.local.mu == 3
    plain = load_scenario("fedavg", []).local
    assert plain is not None
    assert plain.mu == 0
