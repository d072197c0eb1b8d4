"""One reader of image files: the right numbers, or a refusal that names the file."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fedleak import images as reader
from fedleak.data import load_data
from fedleak.errors import DataUnavailableError, FedleakError, InvalidInputError
from fedleak.images import check, png, read_image, read_images

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (6, 9), dtype=np.uint8)


def values(array: np.ndarray, white: float = 255) -> torch.Tensor:
    """Return (C, H, W) in [0, 1]."""
    planes = array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)
    return torch.from_numpy(planes.astype(np.float32)) / white


def png_file(width: int, height: int, bits: int, colour: int, data: bytes) -> bytes:
    """Return a PNG by hand: also of kinds that Pillow does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["png", "bmp", "tif", "tiff", "webp"])
def test_every_listed_type_is_read_in_the_channels_asked_for(kind: str, tmp_path: Path) -> None:
    more = {"lossless": True} if kind == "webp" else {}
    Image.fromarray(COLOUR).save(tmp_path / f"a.{kind}", **more)
    assert torch.equal(read_image(tmp_path / f"a.{kind}"), values(COLOUR))
    grey = read_image(tmp_path / f"a.{kind}", 1)
    assert torch.equal(grey, values(np.asarray(Image.fromarray(COLOUR).convert("L"))))
    Image.fromarray(GREY).save(tmp_path / f"g.{kind}", **more)
    assert torch.equal(read_image(tmp_path / f"g.{kind}", 3), values(GREY).repeat(3, 1, 1))
    assert f".{kind}" in reader.SUFFIXES


@pytest.mark.parametrize("kind", ["png", "tif"])
@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_of_grey(kind: str, channels: int, tmp_path: Path) -> None:
    deep = RNG.integers(0, 65536, (5, 7), dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / f"a.{kind}")
    expected = values(deep, 65535).repeat(channels, 1, 1)
    assert torch.allclose(read_image(tmp_path / f"a.{kind}", channels), expected, atol=1e-7)
    Image.fromarray(GREY.astype(np.uint16) * 257).save(tmp_path / f"same.{kind}")
    assert torch.allclose(read_image(tmp_path / f"same.{kind}", 1), values(GREY), atol=1e-7)


def test_floating_point_in_the_unit_interval_only(tmp_path: Path) -> None:
    fine = RNG.random((4, 4)).astype(np.float32)
    Image.fromarray(fine).save(tmp_path / "a.tif")
    assert torch.equal(read_image(tmp_path / "a.tif", 1)[0], torch.from_numpy(fine))
    for name, array in (("b", fine * 255), ("c", fine * np.nan),
                        ("d", (fine * 1e6).astype(np.int32))):  # fmt: skip
        Image.fromarray(array).save(tmp_path / f"{name}.tif")
        with pytest.raises(InvalidInputError, match=rf"{name}\.tif.*which of them is white"):
            read_image(tmp_path / f"{name}.tif", 1)


def test_palette_cmyk_bilevel_and_opaque_alpha(tmp_path: Path) -> None:
    palette = Image.fromarray(COLOUR).quantize(64)
    palette.save(tmp_path / "p.png")
    palette.save(tmp_path / "p.gif")
    shown = values(np.asarray(palette.convert("RGB")))
    assert torch.equal(read_image(tmp_path / "p.png"), shown)
    assert torch.equal(read_image(tmp_path / "p.gif"), shown)
    assert read_image(tmp_path / "p.gif", 1).shape == (1, 6, 9)
    cmyk = Image.fromarray(COLOUR).convert("CMYK")
    cmyk.save(tmp_path / "c.tif")
    assert torch.equal(read_image(tmp_path / "c.tif"), values(np.asarray(cmyk.convert("RGB"))))
    two = Image.fromarray(GREY > 99)
    two.save(tmp_path / "two.png")
    assert torch.equal(read_image(tmp_path / "two.png", 1), values(GREY > 99, 1))
    opaque = np.dstack([COLOUR, np.full((6, 9), 255, np.uint8)])
    Image.fromarray(opaque).save(tmp_path / "o.png")
    assert torch.equal(read_image(tmp_path / "o.png"), values(COLOUR))


def test_what_is_transparent_is_refused(tmp_path: Path) -> None:
    alpha = np.dstack([COLOUR, np.full((6, 9), 255, np.uint8)])
    alpha[0, 0, 3] = 254
    Image.fromarray(alpha).save(tmp_path / "a.png")
    Image.fromarray(np.dstack([GREY, GREY])).save(tmp_path / "la.png")
    Image.fromarray(COLOUR).quantize(4).save(tmp_path / "p.png", transparency=1)
    Image.fromarray(GREY.astype(np.uint16)).save(tmp_path / "i.png", transparency=7)
    for name in ("a", "la", "p", "i"):
        with pytest.raises(InvalidInputError, match=rf"{name}\.png.*flatten it"):
            read_image(tmp_path / f"{name}.png")


def test_sixteen_bits_of_colour_are_not_cut_to_eight(tmp_path: Path) -> None:
    for name, kind, planes in (("rgb", 2, 3), ("rgba", 6, 4), ("la", 4, 2)):
        row = b"\0" + RNG.bytes(2 * planes * 4)
        (tmp_path / f"{name}.png").write_bytes(png_file(4, 1, 16, kind, zlib.compress(row)))
        with pytest.raises(InvalidInputError, match=rf"{name}\.png.*more than 8 bits"):
            read_image(tmp_path / f"{name}.png")


def test_white_that_is_zero(tmp_path: Path) -> None:
    for name, array in (("eight", GREY), ("sixteen", GREY.astype(np.uint16) * 257)):
        Image.fromarray(array).save(tmp_path / f"{name}.tif", tiffinfo={262: 0})
    with pytest.raises(InvalidInputError, match="0 is white"):
        read_image(tmp_path / "sixteen.tif", 1)
    assert torch.equal(read_image(tmp_path / "eight.tif", 1), values(GREY))  # Pillow turns it


def test_a_camera_that_was_held_upright(tmp_path: Path) -> None:
    noted = Image.Exif()
    noted[0x0112] = 6  # turn clockwise to see it as it was
    Image.fromarray(COLOUR).save(tmp_path / "a.png", exif=noted)
    assert torch.equal(read_image(tmp_path / "a.png"), values(np.rot90(COLOUR, -1)))


@pytest.mark.parametrize("kind", ["gif", "png", "webp", "tif"])
def test_the_first_of_several_frames_and_it_is_said(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    frames = [Image.fromarray(a) for a in (GREY, GREY[::-1], GREY[:, ::-1])]
    more = {"lossless": True} if kind == "webp" else {}
    frames[0].save(tmp_path / f"a.{kind}", save_all=True, append_images=frames[1:], **more)
    assert torch.equal(read_image(tmp_path / f"a.{kind}", 1), values(GREY))
    assert "the first is read" in caplog.records[-1].fields["reason"]


def test_pixels_are_bounded_before_they_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for side in (20_000, 9_000, 60_000):  # beyond Pillow's own bound; below it; and a lie
        data = zlib.compress(b"\0" * 100)
        (tmp_path / f"{side}.png").write_bytes(png_file(side, side, 8, 2, data))
        with pytest.raises(InvalidInputError, match=f"more than the {1 << 26}"):
            read_image(tmp_path / f"{side}.png")
    with (tmp_path / "sparse.png").open("wb") as file:
        file.truncate(50 << 30)
    with pytest.raises(InvalidInputError, match=r"sparse.png has 50 GiB, more than the 256 MiB"):
        read_image(tmp_path / "sparse.png")
    Image.fromarray(COLOUR).save(tmp_path / "a.png")
    monkeypatch.setattr(reader, "MAX_TOGETHER", 300)
    with pytest.raises(InvalidInputError, match="read fewer"):
        read_images([tmp_path / "a.png", tmp_path / "a.png"])


def test_what_is_no_file_of_pixels(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder.png").mkdir()
    for path in tmp_path.iterdir():
        with pytest.raises(InvalidInputError, match=path.name):
            read_image(path)


def test_no_flipped_bit_kills(tmp_path: Path) -> None:
    """Each file is decoded within [0, 1], or refused with a message of one kind."""
    path, refused = tmp_path / "a.png", 0
    Image.fromarray(COLOUR).save(path)
    whole = path.read_bytes()
    for bit in range(64, 8 * len(whole), 7):
        spoilt = bytearray(whole)
        spoilt[bit // 8] ^= 1 << bit % 8
        path.write_bytes(spoilt)
        try:
            check(read_image(path), 3)
        except InvalidInputError as error:
            assert "a.png" in str(error)  # noqa: PT017
            refused += 1
    assert refused > 50


def test_a_bad_file_does_not_cost_its_folder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "again").symlink_to(tmp_path)  # a loop
    Image.fromarray(COLOUR).save(tmp_path / "deep" / "b.tif")
    Image.fromarray(COLOUR).save(tmp_path / "z.png")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\nspoilt")
    os.mkfifo(tmp_path / "pipe.png")
    files, found = read_images([tmp_path])
    assert [f.name for f in files] == ["b.tif", "z.png"]
    assert torch.equal(found, values(COLOUR).repeat(2, 1, 1, 1))
    said = [r.fields["reason"] for r in caplog.records]
    assert len(said) == 2
    assert "a.png" in said[0]
    assert "pipe.png" in said[1]
    assert [f.name for f in read_images([tmp_path], limit=1)[0]] == ["b.tif"]
    with pytest.raises(InvalidInputError, match=r"a\.png"):  # named itself
        read_images([tmp_path / "a.png", tmp_path / "z.png"])
    only = tmp_path / "only"
    only.mkdir()
    (only / "bad.png").write_text("no")
    with pytest.raises(InvalidInputError, match=r"bad\.png"):
        read_images([only])


def test_a_data_folder_leaves_out_what_cannot_be_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load_data.cache_clear()
    for name in "xy":
        (tmp_path / name).mkdir()
        for k in range(4):
            Image.fromarray(GREY.astype(np.uint16) * 257).save(tmp_path / name / f"{k}.png")
    (tmp_path / "x" / "bad.png").write_bytes(b"\x89PNG")
    train, test = load_data("folder", str(tmp_path))
    assert (len(train) + len(test), train.shape, train.classes) == (8, (3, 32, 32), 2)
    assert float(train.batch([0])[0].mean()) == pytest.approx(float(values(GREY).mean()), abs=0.01)
    assert ["bad.png" in r.fields["reason"] for r in caplog.records] == [True]
    (tmp_path / "z").mkdir()
    load_data.cache_clear()
    with pytest.raises(DataUnavailableError, match="no image could be read in 'z'"):
        load_data("folder", str(tmp_path))


def test_one_check_after_reading() -> None:
    for bad in (torch.zeros(4, 4), torch.zeros(2, 4, 4), torch.full((3, 2, 2), 1.5),
                torch.full((3, 2, 2), float("nan")), torch.zeros(3, 0, 4)):  # fmt: skip
        with pytest.raises(InvalidInputError):
            check(bad, 3)
    with pytest.raises(InvalidInputError, match="1 or 3"):
        read_image(Path("a.png"), 2)


def test_pictures_are_written_as_they_are_read(tmp_path: Path) -> None:
    for array in (GREY, COLOUR):
        (tmp_path / "a.png").write_bytes(png(values(array).numpy()))
        assert torch.equal(read_image(tmp_path / "a.png", values(array).shape[0]), values(array))
    odd = np.array([[[np.nan, 2.0, -1.0]]])
    (tmp_path / "a.png").write_bytes(png(odd))
    assert (read_image(tmp_path / "a.png", 1) * 255).round().tolist() == [[[128, 255, 0]]]


def test_digits_are_not_blown_up_without_bound() -> None:
    with pytest.raises(FedleakError, match=r"data\.size=4096"):
        load_data("digits", size=4096)
