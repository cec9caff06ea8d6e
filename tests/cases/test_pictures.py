"""Pictures come to the model as people see them in an image viewer, and what is no picture is no sample."""

import os
import struct
from argparse import Namespace
from collections import Counter
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image, ImageCms, TiffImagePlugin

from sat_lora import DataError
from sat_lora.cogvlm.inputs.image import image_tensor, load_image
from sat_lora.cogvlm.inputs.pictures import SUFFIXES, read_picture
from sat_lora.data.batches.sources import open_sources
from sat_lora.data.folders import find_images
from sat_lora.data.samples import BrokenSample, Item, collate, read_items
from sat_lora.doctor.run_checks.data import data_findings
from sat_lora.training.preflight import _problem_with_path
from sat_lora.training.runs.run_folder import RunFolder
from sat_lora.training.steps.broken_samples import BrokenSamples
from tests.support.configs import config_of
from tests.support.datasets import dataset
from tests.support.picture_files import chunked_png, encoded
from tests.support.run_logs import logs_of

PIXELS = numpy.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=numpy.uint8).repeat(8, 0).repeat(8, 1)
COLOUR = Image.fromarray(PIXELS)
GREY = COLOUR.convert("L")
DEEP = numpy.asarray(GREY).astype(numpy.uint16) * 257


def row_of(content: bytes) -> list:
    """The first row: grey levels where it has no colours."""
    pixels = numpy.asarray(read_picture(content))[0]
    return pixels[:, 0].tolist() if (pixels == pixels[:, :1]).all() else pixels.tolist()


def assert_alike(content: bytes, expected: Image.Image, mean: float = 0.0):
    seen, wanted = read_picture(content), expected.convert("RGB")
    assert seen.mode == "RGB" and seen.size == wanted.size
    difference = numpy.abs(numpy.asarray(seen, numpy.int16) - numpy.asarray(wanted, numpy.int16))
    assert difference.mean() <= mean


# What the marks of EXIF ask for, worked out with numpy.
TURNS = {
    1: lambda p: p, 2: lambda p: p[:, ::-1], 3: lambda p: p[::-1, ::-1], 4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2), 6: lambda p: numpy.rot90(p, -1), 7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
    8: lambda p: numpy.rot90(p),
}  # fmt: skip


@pytest.mark.parametrize("mark", TURNS)
@pytest.mark.parametrize("kind, settings", [("PNG", {}), ("JPEG", {"quality": 100, "subsampling": 0}), ("TIFF", {}),
                                            ("WEBP", {"lossless": True})])  # fmt: skip
def test_a_picture_is_turned_as_its_exif_data_says(kind, settings, mark):
    exif = Image.Exif()
    exif[0x0112] = mark
    expected = Image.fromarray(numpy.ascontiguousarray(TURNS[mark](PIXELS)))
    assert_alike(encoded(COLOUR, kind, exif=exif, **settings), expected, mean=1.5)


def test_damaged_exif_data_turn_nothing():
    assert_alike(encoded(COLOUR, "PNG", exif=b"Exif\0\0garbage, garbage"), COLOUR)


@pytest.mark.parametrize(
    "content",
    [
        *(encoded(Image.fromarray(DEEP), kind) for kind in ("PNG", "TIFF", "PPM")),
        encoded(Image.fromarray(DEEP.astype(">u2")), "TIFF"),
        encoded(Image.fromarray(DEEP.astype(numpy.int32)), "TIFF"),
        encoded(Image.fromarray(DEEP.astype(numpy.float32)), "TIFF"),
        encoded(Image.fromarray(DEEP.astype(numpy.float32) / 65535), "TIFF"),
        encoded(Image.fromarray(DEEP.astype(numpy.float32) / 257), "TIFF"),
        encoded(Image.fromarray(DEEP.astype(numpy.float32) / 65535), "PPM"),
    ],
    ids=["PNG", "TIFF", "PGM", "big endian", "32 bits", "float", "float to 1", "float to 255", "PFM"],
)
def test_more_than_8_bits_of_grey_are_the_same_grey_levels(content):
    assert_alike(content, GREY)


def test_values_of_no_usual_range_go_from_the_lowest_to_the_highest():
    values = numpy.float32([[-1000, 0, 3000, numpy.nan]])
    assert row_of(encoded(Image.fromarray(values), "TIFF")) == [0, 64, 255, 0]


def test_a_tiff_whose_white_is_zero_is_no_negative():
    for grey in (Image.fromarray(65535 - DEEP), Image.fromarray(255 - numpy.asarray(GREY))):
        content = bytearray(encoded(grey, "TIFF"))
        tag = content.find(struct.pack("<HHI", TiffImagePlugin.PHOTOMETRIC_INTERPRETATION, 3, 1))
        content[tag + 8 : tag + 10] = b"\0\0"
        assert_alike(bytes(content), GREY)


HALVES = numpy.zeros(PIXELS.shape[:2], numpy.uint8)
HALVES[:, 24:] = 255
CUT_OUT = COLOUR.copy()
CUT_OUT.putalpha(Image.fromarray(HALVES))
ON_WHITE = Image.fromarray(numpy.where(HALVES[..., None] > 0, PIXELS, 255))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "TGA", "QOI", "ICO", "WEBP", "GIF"])
def test_what_is_transparent_is_white(kind):
    more = {"ICO": {"sizes": [CUT_OUT.size]}, "WEBP": {"lossless": True}}.get(kind, {})
    assert_alike(encoded(CUT_OUT, kind, **more), ON_WHITE, mean=1.0)


@pytest.mark.parametrize(
    "content, row",
    [
        (chunked_png([b"\x05\xaf\x00\xff"], 4, 8, 0, tRNS=b"\0\x05"), [255, 175, 0, 255]),
        (chunked_png([b"\x1b"], 4, 2, 0, tRNS=b"\0\x02"), [0, 85, 255, 255]),
        (chunked_png([b"\x05\xaf"], 4, 4, 0, tRNS=b"\0\x05"), [0, 255, 170, 255]),
        (chunked_png([b"\xaa"], 8, 1, 0, tRNS=b"\0\1"), [255, 0] * 4),
        (chunked_png([struct.pack(">HH", 4000, 40092)], 2, 16, 0, tRNS=struct.pack(">H", 4000)), [255, 156]),
        (chunked_png([b"\1\2\3\4\5\6"], 2, 8, 2, tRNS=b"\0\1\0\2\0\3"), [[255, 255, 255], [4, 5, 6]]),
        (chunked_png([b"\1\1\2\2\3\3\4\4\5\5\6\6"], 2, 16, 2, tRNS=b"\1\1\2\2\3\3"), [[255, 255, 255], [4, 5, 6]]),
        (chunked_png([struct.pack(">4H", 257, 32896, 1028, 65535)], 2, 16, 4), [128, 4]),
        (chunked_png([b"\0\1\2"], 3, 8, 3, PLTE=b"\0\0\0\x40\x40\x40\x60\x60\x60", tRNS=b"\0\x80"), [255, 159, 96]),
    ],
    ids=["grey", "2 bits", "4 bits", "1 bit", "16 bits", "RGB", "RGB of 16 bits", "LA of 16 bits", "palette"],
)  # fmt: skip
def test_every_way_of_a_png_to_be_transparent(content, row):
    assert row_of(content) == row


def test_white_letters_on_a_transparent_ground_stay_visible():
    letters = Image.new("RGBA", (4, 1), (255, 255, 255, 0))
    letters.putpixel((1, 0), (255, 255, 255, 255))
    letters.putpixel((2, 0), (255, 255, 255, 128))
    assert row_of(encoded(letters, "PNG")) == [0, 255, 128, 0]
    assert row_of(encoded(Image.new("RGBA", (2, 1), (0, 0, 0, 0)), "PNG")) == [255, 255]  # nothing is to be seen
    assert row_of(encoded(Image.new("RGBA", (2, 1), "white"), "PNG")) == [255, 255]


def test_bands_of_a_large_picture_fit_together(monkeypatch):
    expected = read_picture(encoded(CUT_OUT, "PNG"))
    monkeypatch.setattr("sat_lora.cogvlm.inputs.picture_view._BAND", 5 * CUT_OUT.width)
    assert_alike(encoded(CUT_OUT, "PNG"), expected)


def matrix_profile(gamma: float, primaries: list[tuple] | None) -> bytes:
    """An ICC profile of these XYZ primaries (D50), or of grey."""

    def fixed(*values: float) -> bytes:
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    white = (0.9642, 1.0, 0.8249)
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    tags = {b"desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(79)}
    tags[b"wtpt"] = b"XYZ \0\0\0\0" + fixed(*white)
    if primaries is None:
        tags[b"kTRC"] = curve
    for letter, primary in zip(b"rgb", primaries or (), strict=False):
        tags[bytes([letter]) + b"XYZ"] = b"XYZ \0\0\0\0" + fixed(*primary)
        tags[bytes([letter]) + b"TRC"] = curve
    place, table, body = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        table += name + struct.pack(">II", place + len(body), len(data))
        body += data
    space = b"GRAY" if primaries is None else b"RGB "
    head = struct.pack(">4sI4s4s4s", b"lcms", 0x02400000, b"mntr", space, b"XYZ ") + bytes(12) + b"acsp" + bytes(28)
    head = (head + fixed(*white)).ljust(124, b"\0")
    content = head + table + body
    return struct.pack(">I", len(content) + 4) + content


ADOBE_RGB = matrix_profile(2.2, [(0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)])
DISPLAY_P3 = matrix_profile(2.2, [(0.51512, 0.2412, -0.001), (0.29198, 0.69225, 0.0419), (0.1571, 0.06657, 0.78407)])
GREY_18 = matrix_profile(1.8, None)


@pytest.mark.parametrize("profile", [ADOBE_RGB, DISPLAY_P3], ids=["Adobe", "P3"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "palette", "RGBA"])
def test_colours_of_another_profile_are_brought_to_srgb(kind, profile):
    """A red of those is a stronger one in sRGB, with less green and blue; greys stay."""
    picture, grey = Image.new("RGB", (8, 8), (190, 60, 60)), Image.new("RGB", (8, 8), (128, 128, 128))
    if kind == "palette":
        picture, grey = picture.quantize(2), grey.quantize(2)
    elif kind == "RGBA":
        picture, grey = picture.convert("RGBA"), grey.convert("RGBA")
    kind = {"palette": "PNG", "RGBA": "PNG"}.get(kind, kind)
    reddish = read_picture(encoded(picture, kind, icc_profile=profile)).getpixel((3, 3))
    assert reddish[0] > 200 and reddish[1] < 58 and reddish[2] < 62
    assert numpy.ptp([*read_picture(encoded(grey, kind, icc_profile=profile)).getpixel((3, 3)), 128]) <= 2


def test_the_profile_of_a_grey_picture_counts_too():
    expected = round(255 * ((100 / 255) ** 1.8) ** (1 / 2.2))
    for grey in (Image.new("L", (2, 2), 100), Image.fromarray(numpy.full((2, 2), 25700, numpy.uint16))):
        assert row_of(encoded(grey, "PNG", icc_profile=GREY_18)) == pytest.approx([expected] * 2, abs=2)


@pytest.mark.parametrize("profile", [ADOBE_RGB[:150], b"no profile" * 20, GREY_18, ADOBE_RGB[:200] + bytes(300)])
def test_a_profile_that_is_broken_or_of_other_colours_is_passed_over(profile):
    assert_alike(encoded(COLOUR, "PNG", icc_profile=profile), COLOUR)


def test_lab_and_inverted_cmyk_have_their_colours():
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    muted = Image.fromarray(PIXELS // 4 + 96)
    assert_alike(encoded(ImageCms.profileToProfile(muted, srgb, lab, outputMode="LAB"), "TIFF"), muted, mean=2.0)
    assert_alike(encoded(muted.convert("CMYK"), "JPEG", quality=100, subsampling=0), muted, mean=2.0)


def test_the_gamma_of_a_png_counts_where_it_is_not_that_of_srgb():
    row = bytes(range(0, 256, 51))
    linear = [round(255 * (value / 255) ** (1 / 2.2)) for value in row]
    assert row_of(chunked_png([row], 6, 8, 0, gAMA=struct.pack(">I", 100_000))) == linear
    assert row_of(chunked_png([row], 6, 8, 0, gAMA=struct.pack(">I", 45_455))) == list(row)
    assert row_of(chunked_png([row], 6, 8, 0, gAMA=struct.pack(">I", 100_000), sRGB=b"\0")) == list(row)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_of_an_animation_the_first_frame_is_taken(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert_alike(content, frames[0], mean=2.0)


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P"])
def test_a_plain_picture_gives_what_the_published_code_makes_of_it(mode):
    """Bit for bit, with an sRGB profile too: `convert("RGB")`, bicubic resize, ToTensor, Normalize."""
    image = COLOUR.quantize(16) if mode == "P" else COLOUR.convert(mode)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    pixels = numpy.asarray(image.convert("RGB").resize((14, 21), Image.Resampling.BICUBIC), dtype=numpy.float32) / 255.0
    mean, std = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    published = (torch.from_numpy(pixels).permute(2, 0, 1) - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(
        3, 1, 1
    )
    assert torch.equal(image_tensor(image, (21, 14)), published)
    assert torch.equal(load_image(encoded(image, "PNG"), (21, 14)), published)
    if mode == "RGB":
        assert torch.equal(load_image(encoded(image, "PNG", icc_profile=profile), (21, 14)), published)


@pytest.mark.parametrize("kind", ["BMP", "GIF", "TIFF", "PPM", "TGA", "PCX", "SGI", "QOI", "JPEG2000", "WEBP"])
def test_the_content_counts_and_not_the_suffix(kind, tmp_path):
    (tmp_path / "7.png").write_bytes(encoded(COLOUR, kind, **({"lossless": True} if kind == "WEBP" else {})))
    assert_alike((tmp_path / "7.png").read_bytes(), COLOUR)
    assert load_image(tmp_path / "7.png", (8, 8)).shape == (3, 8, 8)


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "an empty file; write or copy it again"),
        (bytes(100), "all zeros; write or copy it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a pointer of git lfs; fetch the file itself"),
        (b"<!DOCTYPE html><title>404", "a web page; fetch the picture itself"),
        (b'<?xml version="1.0"?>\n<svg width="9">', "an SVG drawing; convert it to PNG or JPEG"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "a HEIC picture; convert it to PNG or JPEG"),
        (b"8BPS\0\1" + bytes(40), "a Photoshop file; convert it to PNG or JPEG"),
        (b"%PDF-1.7", "a PDF file; convert it to PNG or JPEG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "a PostScript file; convert it to PNG or JPEG"),
        (b"PK\3\4", "an archive; unpack it"),
        (b"hello", "of no format that is read"),
    ],
)  # fmt: skip
def test_what_is_no_picture_is_named_for_what_it_is(content, words):
    with pytest.raises(DataError, match=f"x.png: cannot be read as an image: it is {words}"):
        read_picture(content, name="x.png")


def write(path: Path, content: bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def found_in(folder: Path) -> tuple[list[str], Counter]:
    left_out = Counter()
    return [str(path.relative_to(folder)) for path in find_images([folder], left_out)], left_out


@pytest.mark.parametrize("run", [".", "runs/mine", "a/loss"])
def test_what_a_run_wrote_into_a_data_folder_is_no_sample(tmp_path, run):
    own = ["run.json", "train.jsonl", "loss.png", "norms.png", "checkpoints/1/x.png", "adapter/1/x.png"]
    for name in own:
        path = tmp_path / run / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "a.png").touch()
    (tmp_path / run / "b.png").touch()
    names, left_out = found_in(tmp_path)
    assert sorted(names) == sorted(["a.png", os.path.normpath(f"{run}/b.png")])
    assert left_out == {"files and folders of a run": 6}


def test_a_picture_called_loss_is_a_sample_where_no_run_is(tmp_path):
    (tmp_path / "loss.png").touch()
    assert found_in(tmp_path)[0] == ["loss.png"]


def test_files_of_editors_and_systems_are_no_samples(tmp_path):
    hidden = [
        *("._7.png", ".#7.png", ".hidden.jpg", ".ipynb_checkpoints/7-checkpoint.png", "__MACOSX/._7.png"),
        *("@eaDir/7.png/SYNOPHOTO_THUMB_M.jpg", ".Trash-1000/files/old.png", "$RECYCLE.BIN/$R1.png", "#recycle/x.png"),
        *("System Volume Information/x.png", "lost+found/1.png", ".git/x.png", "~$7.png"),
    ]
    copies = ["a/7-checkpoint.png", "a/7 - Copy.png", "a/7 copy 2.png", "a/7 - Copy (2).png", "a/Copy of 7.png"]
    conflicts = ["a/7 (Ann's conflicted copy 2024-01-02).png", "a/7.sync-conflict-20240102-030405-ABCDEFG.png"]
    others = ["7.png~", "#7.png#", "Thumbs.db", "desktop.ini", "7.png.part", "notes.txt", "b.TXT", "README"]
    answers = ["7.png", "a/7.png", "a/7 (1).png", "a/lab-checkpoint.png", "a/photo copy.JPG", "b/9.TIFF", "b/c/8.gif"]
    for name in (*hidden, *copies, *conflicts, *others, *answers):
        write(tmp_path / name)
    found, left_out = found_in(tmp_path)
    assert found == sorted(answers, key=lambda name: name.split("/"))
    assert left_out.pop("copies that an editor or a system made") == len(copies + conflicts)
    assert left_out.pop("hidden, or of the system") == 13
    assert left_out.pop(".txt files") == 2 and left_out.pop("files without a suffix") == 1
    assert left_out == {f"{suffix} files": 1 for suffix in (".png~", ".png#", ".db", ".ini", ".part")}


@pytest.mark.parametrize(
    "name",
    [
        *("7 (copy).png", "7 (another copy).png", "7 (3rd copy).png", "7 (copy 2).png", "7 Kopie.png", "7 (Kopie).png"),
        *("7 - Copia (2).png", "7 - Cópia.png", "7 - co\u0301pia.png", "7 — копия.png", "7 - コピー.png"),
        *("7のコピー.png", "7 - 복사본.png", "7 副本.png", "7的副本.png", "7 - 副本 (2).png", "7 拷贝.png"),
        *("Copy (2) of 7.png", "7~.png", "7.bak.png", "7.orig.png", "#snapshot/daily/7.png"),
        "7 (SFConflict ann 2024-01-02-03-04-05).png",
    ],
)
def test_copies_in_any_language_are_no_samples_where_their_original_is(tmp_path, name):
    write(tmp_path / name)
    write(tmp_path / "9.png")
    is_known_alone = "Conflict" in name or "#" in name
    assert len(found_in(tmp_path)[0]) == 2 - is_known_alone
    write(tmp_path / "7.png")
    assert found_in(tmp_path)[0] == ["7.png", "9.png"]


def test_answers_that_look_like_copies_are_samples(tmp_path):
    names = ["7.png", "7copy.png", "copy.png", "copy 7.png", "photo copy.png", "7 copies.png", "7 (1).png", "7.9.png"]
    for name in names:
        write(tmp_path / name)
    assert sorted(found_in(tmp_path)[0]) == sorted(names)


def test_a_folder_that_is_itself_hidden_is_read(tmp_path):
    write(tmp_path / ".cache" / "a" / "7.png")
    assert found_in(tmp_path / ".cache")[0] == ["a/7.png"]


def test_pictures_that_are_not_read_are_counted_with_what_to_do(tmp_path):
    for name in ("a.HEIC", "b.heic", "c.svg", "d.psd", "e.cr2"):
        write(tmp_path / name)
    _, left_out = found_in(tmp_path)
    assert left_out[".heic files (not read; convert to PNG or JPEG)"] == 2 and len(left_out) == 4
    problem = _problem_with_path(tmp_path, config_of(max_pixels=1 << 20))
    assert "has no images" in problem and "found 2 .heic files (not read; convert to PNG or JPEG), 1 .cr2 f" in problem


def test_linked_folders_are_gone_through_once(tmp_path):
    data = tmp_path / "data"
    for name in ("disk/1.png", "disk/deep/2.png", "other/3.png", "data/own/4.png"):
        write(tmp_path / name)
    (data / "a").symlink_to(tmp_path / "disk")
    (data / "b").symlink_to(tmp_path / "disk")
    (data / "0").symlink_to(data / "own")  # its pictures have a path of their own
    (data / "own" / "up").symlink_to(data)
    (data / "own" / "further_up").symlink_to("../..")
    (tmp_path / "disk" / "back").symlink_to(data)
    (tmp_path / "disk" / "on").symlink_to(tmp_path / "other")
    (data / "loop").symlink_to("loop")
    (data / "gone").symlink_to("nowhere")
    (data / "gone.png").symlink_to("nowhere.png")
    (data / "5.png").symlink_to(tmp_path / "other" / "3.png")  # another answer for the same picture
    found, left_out = found_in(data)
    assert found == ["5.png", "a/1.png", "a/deep/2.png", "a/on/3.png", "own/4.png"]
    assert left_out["links to a folder that they lie in"] == 2 and left_out["links to nothing"] == 1


def test_what_cannot_be_opened_is_counted_or_an_error_and_never_waited_for(tmp_path, monkeypatch):
    write(tmp_path / "7.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "locked").mkdir()
    scandir = os.scandir

    def locked(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)
    found, left_out = found_in(tmp_path)
    assert found == ["7.png"]
    assert left_out.pop(f"folder {tmp_path}/locked cannot be read: Permission denied") == 1
    assert left_out == {"a pipe under the name of a picture": 1, "a device under the name of a picture": 1}
    with pytest.raises(DataError, match="locked: cannot be read: Permission denied; make it readable"):
        find_images([tmp_path / "locked"])


def test_every_suffix_counts_in_any_case(tmp_path):
    names = sorted(f"{number}{suffix.upper()}" for number, suffix in enumerate(SUFFIXES))
    for name in names:
        write(tmp_path / name)
    assert found_in(tmp_path)[0] == names
    assert [item.answer for item in read_items([tmp_path])] == [Path(name).stem for name in names]


def test_questions_about_one_missing_image_are_so_many_broken_samples(tmp_path, tokenizer):
    """Half of 200 lines: the run has to stop, though only one path is wrong."""
    image = write(tmp_path / "whole.png", encoded(COLOUR, "PNG"))
    items = [Item(image if number % 2 else tmp_path / "missing.png", "7", f"{number}?") for number in range(200)]
    samples = dataset(items, tokenizer)
    known, batches = BrokenSamples(200, 0.05), [[samples[i] for i in range(n, n + 8)] for n in range(0, 200, 8)]
    for seen, batch in enumerate(batches, 1):
        known.add(known.new_in([collate(batch, image_size=(21, 21))]))
        try:
            known.check(8 * seen)
        except DataError as error:
            assert "52 of the first 104 training samples cannot be used" in str(error)
            assert str(error).count("missing.png") == 1 and "(52 samples)" in str(error)
            break
    else:
        pytest.fail("a run on half of its samples goes on")
    assert known.new_in([collate(batches[0], image_size=(21, 21))]) == []  # in the next epoch


def test_samples_are_counted_where_they_are_reported(tmp_path, capfd):
    """On the screen and by the doctor: three questions about one image are three."""
    broken = [("x.png", "x.png: torn", str(number)) for number in range(3)]
    with logs_of(RunFolder(tmp_path, is_writer=True)) as logs:
        logs.on_start(4, 0)
        logs.on_broken(broken, 1)
        logs.on_broken(broken[:1], 2)  # once more, in a second pass over the validation data
    out, err = capfd.readouterr()
    assert err.count("skipped: x.png: torn") == 1 and "3 samples were skipped" in out
    lost = [BrokenSample(*entry) for entry in broken]
    batch = collate(lost, image_size=(21, 21))
    (finding,) = data_findings([batch, batch], image_length=9, max_length=40, max_broken_share=0.05)
    assert finding.seen.startswith("3 of 6 samples looked at are broken (50%): x.png: torn; that is more than")
    assert finding.file == "x.png"


def test_a_source_says_what_it_left_out(tmp_path, single_process_group):
    for name in ("7.png", "8.png", "labels.txt", ".hidden.png", "a.heic"):
        write(tmp_path / name)
    options = Namespace(train_data=[str(tmp_path)], valid_data=None, split=[1.0], seed=1)
    source, _ = open_sources(options, single_process_group, lambda items: items)
    assert source.samples == 2
    expected = {".txt files": 1, "hidden, or of the system": 1, ".heic files (not read; convert to PNG or JPEG)": 1}
    assert dict(source.left_out) == expected
