"""Captures: what comes back is what was there, and what is damaged costs only itself."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from fedleak.attacks import make_attack
from fedleak.capture import Capture, CaptureWriter, Update, read_captures
from fedleak.capture.run import attack_capture
from fedleak.capture.truth import write_truth
from fedleak.client.training import LocalTraining
from fedleak.commands.app import main
from fedleak.errors import InvalidInputError
from fedleak.files import write_atomically
from fedleak.lock import LOCK
from fedleak.models import build_model
from fedleak.observation import Observation
from fedleak.terms import Terms
from fedleak.threat import ThreatModel

SHAPE = (1, 8, 8)


class Net(nn.Module):
    """A stranger's network: batch normalisation in evaluation mode, a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.scale = nn.Parameter(torch.ones(1), requires_grad=False)
        self.fc = nn.Linear(144, 10)
        self.norm.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.conv(x)).tanh().flatten(1)) * self.scale


def images(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pixels = (torch.rand(count, *SHAPE, generator=generator) * 255).round() / 255
    return pixels, torch.randint(10, (count,), generator=generator)


def gradient_of(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(F.cross_entropy(model(x), y), list(named.values()))
    return dict(zip(named, found, strict=True))


def make_capture(folder: Path, clients: int = 5, rounds: int = 2) -> nn.Module:
    """Write single-image gradients of a registered model; return the model."""
    model = build_model("cnn2-v1", SHAPE, 10, seed=0).eval()
    writer = CaptureWriter(folder, model, SHAPE, spec="cnn2-v1")
    for number in range(1, rounds + 1):
        sent = {k: v.clone() for k, v in model.state_dict().items()}
        for client in range(clients):
            x, y = images(1, 100 * number + client)
            received = gradient_of(model, x, y)
            writer.add(Update(number, (client + 70,), sent, received, Terms(input_shape=SHAPE)))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.9)
    return model


def same(a: Observation, b: Observation) -> None:
    assert list(a.gradient) == list(b.gradient)
    assert list(a.buffers) == list(b.buffers)
    for name, value in [*a.gradient.items(), *a.buffers.items()]:
        assert torch.equal(value, {**b.gradient, **b.buffers}[name])
    for name, value in a.model.state_dict().items():
        assert torch.equal(value, b.model.state_dict()[name])
    assert [m.training for m in a.model.modules()] == [m.training for m in b.model.modules()]
    plain = ("input_shape", "num_images", "labels", "threat", "training", "shared", "clients")
    assert [getattr(a, n) for n in plain] == [getattr(b, n) for n in plain]


@pytest.mark.parametrize("shared", ["gradient", "weights", "sum"])
@pytest.mark.parametrize(
    "threat",
    [
        ThreatModel(),
        ThreatModel(labels=True, buffers=True),
        ThreatModel(learning_rate=False),
        ThreatModel(local_steps=False, buffers=True),
    ],
    ids=str,
)
def test_the_observation_is_that_of_the_live_attack(
    tmp_path: Path, shared: str, threat: ThreatModel
) -> None:
    model, training = Net(), LocalTraining(0.3, 2, 3, momentum=0.5, weight_decay=0.01)
    sent = {k: v.clone() for k, v in model.state_dict().items()}
    parts = []
    for node in (3, 2**63 + 5):
        x, y = images(2, node % 97)
        received: dict[str, Tensor] = gradient_of(model, x, y)
        if shared != "gradient":
            received = {k: v - 0.3 * received.get(k, v) for k, v in sent.items()}
            received["norm.num_batches_tracked"] = torch.tensor(7.0, dtype=torch.float64)
        labels = tuple(y.tolist()) if threat.labels else None
        does = None if shared == "gradient" else training
        terms = Terms(
            input_shape=SHAPE, num_images=2, labels=labels, threat=threat, training=does,
            shared="weights" if does else "gradient",
        )  # fmt: skip
        parts.append(Update(4, (node,), sent, received, terms))
    live = [update.observe(model) for update in parts]
    if shared == "sum":
        live = [Observation.sum_of(live)]
        parts = [Update.of_sum(4, (3, 2**63 + 5), sent, live[0])]
    writer = CaptureWriter(tmp_path, Net, SHAPE)
    names = [writer.add(update) for update in parts]
    found = list(read_captures(tmp_path, f"{__name__}:Net"))
    assert [c.name for c in found] == names
    assert [c.nodes for c in found] == [u.nodes for u in parts]
    for captured, seen in zip(found, live, strict=True):
        assert captured.observation is not None, captured.reason
        same(captured.observation, seen)
    assert len({id(c.observation.model) for c in found if c.observation}) == 1
    text = "".join(p.read_text() for p in tmp_path.rglob("*.json"))
    told = shared != "gradient" and threat.learning_rate and (shared != "sum" or threat.local_steps)
    assert ('"learning_rate": 0.3' in text) == told
    assert ('"labels": null' in text) != threat.labels
    stored = Capture(tmp_path, f"{__name__}:Net").update(names[0])
    for name, value in parts[0].received.items():
        assert stored.received[name].dtype == value.dtype  # exactly what came
        assert torch.equal(stored.received[name], value)


def test_an_attack_on_a_capture_is_the_live_attack_bit_for_bit(tmp_path: Path) -> None:
    make_capture(tmp_path, rounds=1)
    captured = [c.observation for c in read_captures(tmp_path)]
    model = build_model("cnn2-v1", SHAPE, 10, seed=0).eval()
    live = [
        Observation.from_gradient(model, gradient_of(model, *images(1, 100 + n)), SHAPE)
        for n in range(5)
    ]
    attack = make_attack("hybrid")
    for a, b in zip(attack(live), attack([o for o in captured if o]), strict=True):
        assert torch.equal(a.images, b.images)
        assert (a.fit, a.labels.tolist()) == (b.fit, b.labels.tolist())


def test_sent_weights_are_stored_once(tmp_path: Path) -> None:
    model = build_model("cnn2-v1", SHAPE, 10, seed=0)
    writer = CaptureWriter(tmp_path, model, SHAPE, spec="cnn2-v1")
    received = gradient_of(model, *images(1))
    one = dict(model.state_dict())
    other = {k: v + 1 for k, v in one.items()}
    for number, sent in ((1, one), (1, dict(one)), (1, other), (1, one), (2, one)):
        writer.add(Update(number, (0,), sent, received, Terms(input_shape=SHAPE)))
    files = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("model*.safetensors"))
    assert files == [
        "round-0001/model-1.safetensors", "round-0001/model.safetensors",
        "round-0002/model.safetensors",
    ]  # fmt: skip
    found = [c.observation for c in read_captures(tmp_path)]
    assert [float(o.model.state_dict()["fc.bias"][0] - one["fc.bias"][0]) for o in found if o] == (
        [0, 0, 1, 0, 0]
    )


def test_a_write_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomically(tmp_path / "a.json", b"old")

    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(tmp_path / "a.json", b"new content", durable=True)
    assert (tmp_path / "a.json").read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_what_is_not_there_yet_is_no_update(tmp_path: Path) -> None:
    """A kill leaves temporary files and tensors without a record."""
    make_capture(tmp_path, clients=2, rounds=1)
    (tmp_path / "round-0001" / ".client-000002.json.77.part").write_bytes(b"{")
    (tmp_path / "round-0001" / "notes.txt").write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    assert Capture(tmp_path).names() == ["round-0001/client-000000", "round-0001/client-000001"]


def _edit(key: str, value: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        record = path.with_suffix(".json")
        record.write_text(json.dumps({**json.loads(record.read_text()), key: value}))

    return change


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def _swap_record(path: Path) -> None:
    path.with_suffix(".json").write_bytes(b"\x00\xff not json")


def _deep(path: Path) -> None:
    path.with_suffix(".json").write_text("[" * 100_000)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (Path.unlink, "client-000001.safetensors is missing"),
        (lambda p: p.with_suffix(".json").unlink(), "client-000001.json is missing"),
        (_cut, "client-000001.safetensors is damaged: its checksum"),
        (_flip, "client-000001.safetensors is damaged: its checksum"),
        (lambda p: p.write_bytes(b""), "is damaged"),
        (_swap_record, "client-000001.json is damaged"),
        (_deep, "client-000001.json is damaged"),
        (_edit("round", 9), "it says round 9"),
        (_edit("images", 10**9), "images: Input should be less than"),
        (_edit("images", "many"), "images"),
        (_edit("sent", "../round-0001/model.safetensors"), "sent: String should match"),
        (_edit("tensors", "/etc/passwd"), "tensors: String should match"),
        (_edit("tensors", "../../x.safetensors"), "tensors: String should match"),
        (_edit("sent", "model-9.safetensors"), "model-9.safetensors is missing"),
        (_edit("sent_sha256", "0" * 64), "model.safetensors is damaged"),
        (_edit("threat", {"omniscient": True}), "omniscient"),
        (_edit("training", {"learning_rate": -1}), "learning_rate"),
        (_edit("surprise", 1), "surprise"),
        (_edit("labels", [1]), "threat model does not let"),
        (lambda p: (p.unlink(), p.mkdir()), "cannot be read"),
    ],
)
def test_damage_costs_its_own_update(
    tmp_path: Path, damage: Callable[[Path], Any], words: str
) -> None:
    make_capture(tmp_path, clients=3, rounds=1)
    damage(tmp_path / "round-0001" / "client-000001.safetensors")
    found = list(read_captures(tmp_path))
    assert [c.observation is not None for c in found] == [True, False, True]
    assert words in found[1].reason


def test_a_reply_that_cannot_be_used_keeps_its_reason(tmp_path: Path) -> None:
    model = build_model("cnn2-v1", SHAPE, 10, seed=0)
    writer = CaptureWriter(tmp_path, model, SHAPE, spec="cnn2-v1")
    good = Update(
        1, (5,), dict(model.state_dict()), gradient_of(model, *images(1)), Terms(input_shape=SHAPE)
    )
    writer.add(replace(good, received={k: v * torch.nan for k, v in good.received.items()}))
    writer.add_failure(1, (6,), "the client did not reply")
    writer.add(replace(good, received={"conv1.weight": torch.ones(3)}))
    writer.add(replace(good, sent={"conv1.weight": torch.ones(3)}))
    reasons = [c.reason for c in read_captures(tmp_path)]
    for reason, words in zip(
        reasons, ("NaN or infinite", "did not reply", "shape", "does not fit"), strict=True
    ):
        assert words in reason


def test_folders_that_cannot_be_read_say_what_to_do(tmp_path: Path) -> None:
    make_capture(tmp_path / "run" / "captures", clients=1, rounds=1)
    manifest = tmp_path / "run" / "captures" / "manifest.json"
    good = json.loads(manifest.read_text())
    cases: list[tuple[Any, str]] = [
        ({**good, "version": 2}, "is of version 2, this fedleak reads version 1"),
        ({**good, "format": "zip"}, "is not of a capture"),
        ({**good, "model": {**good["model"], "classes": -1}}, "is damaged: model.classes"),
        ([1], "cannot be read"),
    ]
    for content, words in cases:
        manifest.write_text(json.dumps(content))
        with pytest.raises(InvalidInputError) as caught:
            Capture(manifest.parent)
        assert words in str(caught.value)
    manifest.write_bytes(b'{"format": "fedleak-cap')
    with pytest.raises(InvalidInputError, match=r"cannot be read .* copy the capture again"):
        Capture(manifest.parent)
    for folder in (tmp_path, tmp_path / "run"):
        with pytest.raises(InvalidInputError, match=r"is no capture: .*run.captures"):
            Capture(folder)
    with pytest.raises(InvalidInputError, match="fedleak simulate --capture"):
        Capture(tmp_path / "nowhere")
    with pytest.raises(InvalidInputError, match="is not empty; name a new one"):
        make_capture(tmp_path / "run")


def _with_spec(folder: Path, spec: str | None) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["model"]["spec"] = spec
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_the_model_is_found_or_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "captures"
    make_capture(folder, clients=1, rounds=1)
    for spec in ("mine.net:Net", "mine.py:Net", "cnn9", None):
        _with_spec(folder, spec)
        with pytest.raises(InvalidInputError, match=r"pass .*--model NAME"):
            Capture(folder)
        assert Capture(folder, "cnn2-v1").read("round-0001/client-000000").observation is not None
    with pytest.raises(InvalidInputError, match=r"'cnn2-v2' is not the one that was captured"):
        Capture(folder, "cnn2-v2")
    # A capture chooses no code: neither what came along, nor what lies beside it, nor what is
    # installed; each of these would run.
    evil = "import pathlib\npathlib.Path('ran').touch()\ndef make(): ...\n"
    (folder / "evil.py").write_text(evil)
    (tmp_path / "beside.py").write_text(evil)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for spec in ("captures/evil.py:make", f"{folder}/../captures/evil.py:make", "evil:make",
                 "beside.py:make", "beside:make", f"{tmp_path}/beside.py:make", "os:abort",
                 "sys:exit", "torchvision.models:vit_h_14", f"{__name__}:Net", "", ":",
                 "x" * 999):  # fmt: skip
        _with_spec(folder, spec)
        with pytest.raises(InvalidInputError, match="a capture never chooses code"):
            Capture(folder)
        with pytest.raises(InvalidInputError, match="a capture never chooses code"):
            attack_capture(folder, "linear")
    assert not list(tmp_path.rglob("ran"))


def test_factories_are_named_where_they_can_be(tmp_path: Path) -> None:
    local = lambda: Net()  # noqa: E731
    cases: list[tuple[Any, str | None]] = [
        (Net, f"{__name__}:Net"),
        (Net(), f"{__name__}:Net"),
        (local, None),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), None),
    ]
    for n, (model, spec) in enumerate(cases):
        CaptureWriter(tmp_path / str(n), model, SHAPE)
        card = json.loads((tmp_path / str(n) / "manifest.json").read_text())["model"]
        assert (card["spec"], card["classes"]) == (spec, 10)
    named = CaptureWriter(tmp_path / "named", local, SHAPE, spec="elsewhere.py:Net")
    assert "elsewhere.py:Net" in (named.folder / "manifest.json").read_text()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInputError, match="cannot be used"):
        make_capture(tmp_path / "file" / "captures")


def test_no_pickle(tmp_path: Path) -> None:
    make_capture(tmp_path, clients=1, rounds=1)
    suffixes = {p.suffix for p in tmp_path.rglob("*") if p.is_file()}
    assert suffixes == {".json", ".safetensors"}
    assert (
        os.sep not in json.loads((tmp_path / "round-0001/client-000000.json").read_text())["sent"]
    )


def test_only_the_owner_reads_captures(tmp_path: Path) -> None:
    make_capture(tmp_path / "captures", clients=1, rounds=1)
    write_truth(tmp_path / "captures", "round-0001/client-000000", [(0, 0)], *images(1))
    attack_capture(tmp_path / "captures", "linear")
    for path in [tmp_path / "captures", *(tmp_path / "captures").rglob("*")]:
        expected = 0o700 if path.is_dir() else 0o600
        if path.name != LOCK:
            assert path.stat().st_mode & 0o777 == expected, path


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(50 << 30)


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _zero(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("kind", [_sparse, _pipe, _zero])
@pytest.mark.parametrize("name", ["client-000001.safetensors", "client-000001.json"])
def test_what_is_no_file_is_not_read(
    tmp_path: Path, kind: Callable[[Path], None], name: str
) -> None:
    make_capture(tmp_path, clients=2, rounds=1)
    kind(tmp_path / "round-0001" / name)
    table = attack_capture(tmp_path, "linear").table
    assert table["status"].tolist() == ["ok", "failed"]
    assert f"{name} cannot be read" in table["reason"][1]
    kind(tmp_path / "manifest.json")
    with pytest.raises(InvalidInputError, match=r"manifest\.json"):
        Capture(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"input_shape": [1, 60000, 60000]}, "are larger than"),
        ({"input_shape": [1, 0, 8]}, "input_shape"),
        ({"input_shape": [1, 7000, 7000]}, "is not the one that was captured"),
        ({"state": {"w": [1 << 39, 1 << 39]}}, "FEDLEAK_MAX_GIB raises that"),
        ({"state": {"w": [-1]}}, "state.w"),
        ({"state": {str(n): [] for n in range(100_001)}}, "state"),
        ({"classes": 10**6}, "classes"),
        ({"spec": "x" * 5000}, "spec"),
    ],
)
def test_sizes_are_bounded_before_anything_is_made(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    make_capture(tmp_path, clients=1, rounds=1)
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "model": {**manifest["model"], **change}}))
    with pytest.raises(InvalidInputError, match=re.escape(words)):
        Capture(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("images", 100_001, "images"),
        ("labels", [10**15], "labels"),
        ("nodes", [10**400], "nodes"),
        ("defence", "noise:1+" * 1000, "defence"),
        ("defence", "examples:99999999999", "defence"),
        ("threat", {"labels": "yes"}, "labels"),
        ("training", {"learning_rate": 0.1, "epochs": 10**12}, "local steps"),
        ("training", {"learning_rate": "fast"}, "training"),
    ],
)
def test_what_a_record_asks_for_is_bounded(
    tmp_path: Path, key: str, value: Any, words: str
) -> None:
    make_capture(tmp_path, clients=2, rounds=1)
    _edit(key, value)(tmp_path / "round-0001" / "client-000001.safetensors")
    if key == "training":
        _edit("shared", "weights")(tmp_path / "round-0001" / "client-000001.safetensors")
    first, second = read_captures(tmp_path)
    assert first.observation is not None
    assert words in second.reason


def test_a_strangers_words_do_not_reach_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_capture(tmp_path / "c", clients=3, rounds=1)
    steer = "\x1b]0;OWNED\x07\x1b[31mred [/nope] [bold]\r\n\x9b2J"
    path = tmp_path / "c" / "round-0001" / "client-000001.safetensors"
    path.write_bytes(content := save({steer * 40 + str(n): torch.zeros(1) for n in range(2000)}))
    _edit("tensors_sha256", hashlib.sha256(content).hexdigest())(path)
    _edit("reason", "=1+1 " + steer * 9999)(path.with_name("client-000002.safetensors"))
    found = list(read_captures(tmp_path / "c"))
    assert found[1].reason.startswith("the update has no entry 'conv1.weight'; it has ")
    assert found[2].reason.startswith("'=1+1 \N{REPLACEMENT CHARACTER}]0;OWNED")
    monkeypatch.setattr(
        "sys.argv", ["fedleak", "attack", str(tmp_path / "c"), "--attack", "linear"]
    )
    main()
    told = capsys.readouterr()
    table = next((tmp_path / "c").glob("attacks/*/attacks.csv")).read_text()
    for text in (found[1].reason, found[2].reason, told.out, told.err, table):
        assert not set(text) & set("\x1b\x07\r\x9b")
        assert len(text) < 5000
    assert "[/nope] [bold]" in told.out


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    """A stranger's capture comes with links where results would go."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "notes.txt").write_text("my thesis")
    make_capture(tmp_path / "clean", clients=1, rounds=1)
    name = attack_capture(tmp_path / "clean", "linear").folder.name
    places = [f"{name}/{n}" for n in ("reconstructions.png", "attacks.csv", "attack.json", LOCK)]
    places += [f"{name}/results", f"{name}/pictures", f"{name}/results/round-0001", name, ""]
    for n, place in enumerate(places):
        capture = tmp_path / str(n)
        shutil.copytree(tmp_path / "clean", capture)
        link = capture / "attacks" / place
        if link.is_dir():
            shutil.rmtree(link)
        else:
            link.unlink()
        link.symlink_to(outside / "notes.txt" if link.suffix or link.name == LOCK else outside)
        for overwrite in (False, True):
            with pytest.raises(InvalidInputError, match="is a link"):
                attack_capture(capture, "linear", overwrite=overwrite)
        assert [p.name for p in outside.rglob("*")] == ["notes.txt"]
        assert (outside / "notes.txt").read_text() == "my thesis"


def test_results_that_somebody_else_made_up_are_made_again(tmp_path: Path) -> None:
    make_capture(tmp_path, clients=2, rounds=1)
    found = attack_capture(tmp_path, "linear")
    stored = found.folder / "results" / "round-0001" / "client-000000.json"
    for odd in (torch.zeros(2, 1, 8, 8), torch.zeros(1, 3, 8, 8), torch.zeros(()),
                torch.full((1, 1, 8, 8), torch.nan)):  # fmt: skip
        content = save({"images": odd})
        stored.with_suffix(".safetensors").write_bytes(content)
        row = json.loads(stored.read_text()) | {"sha256": hashlib.sha256(content).hexdigest()}
        stored.write_text(json.dumps(row))
        again = attack_capture(tmp_path, "linear")
        assert again.skipped == 0
        assert (again.table["status"] == "ok").all()


def test_a_truth_that_is_none(tmp_path: Path) -> None:
    make_capture(tmp_path, clients=1, rounds=1)
    name, truth = "round-0001/client-000000", tmp_path / "truth" / "round-0001"
    for count, value in ((1, torch.nan), (0, 0.0)):
        pixels = torch.full((count, *SHAPE), value)
        write_truth(tmp_path, name, [(0, 0)] * count, pixels, torch.zeros(count).long())
        (row,) = attack_capture(tmp_path, "linear").table.to_dict("records")
        assert "not scored" in row["reason"]
    _pipe(truth / "client-000000.safetensors")
    (row,) = attack_capture(tmp_path, "linear").table.to_dict("records")
    assert "not scored" in row["reason"]
