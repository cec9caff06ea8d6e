"""Tar shards, pipes, devices and bombs: one named sample or one error, within limits of time and memory."""

import io
import os
import tarfile
import time
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from sat_lora import DataError
from sat_lora.cogvlm.inputs.pictures import FORMATS, MAX_PIXELS, file_limit, read_picture
from sat_lora.data.samples import BrokenSample, Item
from sat_lora.data.shards.shard_checks import problems_with_shards
from sat_lora.data.shards.shards import count_shards, find_records
from sat_lora.data.shards.tar_members import read_members
from sat_lora.files.paths import is_shard
from sat_lora.training.settings.config import DEFAULTS
from tests.cases.mutated_pictures import count_outcomes
from tests.support.datasets import dataset
from tests.support.picture_files import chunked_png, encoded
from tests.support.scripts import load_script
from tests.support.tar_shards import png, write_shard


@pytest.fixture(autouse=True)
def at_once():
    """A test of this file that takes seconds has waited for something."""
    started = time.process_time()
    yield
    assert time.process_time() - started < 20


def read(shard) -> list[Item | BrokenSample]:
    return [record.read() for record in find_records(str(shard))]


def member(name: str, content: bytes = b"", **changes) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in changes.items():
        setattr(info, field, value)
    return info, content


def write_tar(path: Path, *members, kind: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=kind) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return path


def sample(key: str) -> list:
    return [member(f"{key}.png", png()), member(f"{key}.txt", key.encode())]


def with_header(path: Path, place: int, field: bytes, *, of: str) -> Path:
    """The header of the member `of` with another field, and the right sum."""
    content = bytearray(path.read_bytes())
    start = content.index(of.encode() + b"\0")
    content[start + place : start + place + len(field)] = field
    content[start + 148 : start + 156] = b" " * 8
    content[start + 148 : start + 156] = b"%06o\0 " % sum(content[start : start + 512])
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "size",
    [(-512).to_bytes(12, "big", signed=True), (-1).to_bytes(12, "big", signed=True), b"-0000000512\0",
     (1 << 94).to_bytes(12, "big"), b"\x80" + b"\xff" * 11, b"77777777777\0", b"12345678\xff99\0"],
    ids=["-512", "-1", "- in octal", "base 256", "largest base 256", "8 GB", "no number"],
)  # fmt: skip
@pytest.mark.parametrize("kind", [b"0", b"L", b"x", b"S", b"7"])
def test_a_member_of_an_impossible_size_is_one_error_after_the_samples_before(tmp_path, size, kind):
    shard = write_tar(tmp_path / "s.tar", *sample("a"), *sample("b"), member("z.png", png()), *sample("c"))
    with_header(with_header(shard, 124, size, of="z.png"), 156, kind, of="z.png")
    records = find_records(str(shard))
    assert next(records).read().answer == "a"
    with pytest.raises(DataError, match=r"s\.tar: cannot be read as a tar file: .*; write or copy it again"):
        list(records)


@pytest.mark.parametrize(
    "records",
    [{"size": "100000000000000000000"}, {"size": "-1024"}, {"size": "1e3"}, {"path": "n" * (1 << 20)}],
    ids=["10^20", "negative", "no number", "a name of 1 MiB"],
)
def test_impossible_pax_records_are_one_error(tmp_path, records):
    shard = write_tar(tmp_path / "s.tar", *sample("a"), member("z.png", png(), pax_headers=records), kind=2)
    with pytest.raises(DataError, match=r"s\.tar: cannot be read as a tar file: damaged at byte"):
        read(shard)


@pytest.mark.parametrize(
    "records",
    [{"GNU.sparse.map": "0,x"}, {"GNU.sparse.size": "9" * 30, "GNU.sparse.map": "0,1"},
     {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "z.png"}],
    ids=["map", "size", "1.0"],
)  # fmt: skip
def test_a_sparse_member_is_one_broken_sample(tmp_path, records):
    named = [member("z.png", b"999999\n1\n" * 50, pax_headers=records), member("z.txt", b"7")]
    first, broken, last = read(write_tar(tmp_path / "s.tar", *sample("a"), *named, *sample("b"), kind=2))
    assert (first.answer, last.answer) == ("a", "b")
    assert broken.reason == f"{tmp_path}/s.tar/z: cannot be read: .png is a sparse file, which is not read"


def test_json_nested_deep_and_numbers_without_end_are_broken_samples(tmp_path):
    texts = {"a": b"[" * 100_000, "b": b'{"answer": ' + b"9" * 100_000 + b"}", "c": b'{"answer": "7"' + b" " * 99}
    pairs = ((member(f"{key}.png", png()), member(f"{key}.json", text)) for key, text in texts.items())
    members = [entry for pair in pairs for entry in pair]
    *broken, whole = read(write_tar(tmp_path / "s.tar", *members, *sample("d")))
    assert whole.answer == "d"
    assert [one.path.rsplit("/", 1)[1] for one in broken if isinstance(one, BrokenSample)] == ["a", "b", "c"]


def test_links_stand_for_what_they_lead_to_within_the_archive(tmp_path):
    """As GNU tar packs a folder in which files are linked; a sample may be links alone."""
    picture = png((1, 2, 3))
    members = [
        member("d/a.png", picture), member("d/a.txt", b"7"),
        member("d/b.png", type=tarfile.LNKTYPE, linkname="d/a.png"), member("d/b.txt", b"8"),
        member("d/c.png", type=tarfile.SYMTYPE, linkname="../d/b.png"), member("d/c.txt", b"9"),
        member("e.png", type=tarfile.LNKTYPE, linkname="./d/a.png"),
        member("e.txt", type=tarfile.LNKTYPE, linkname="d/c.txt"),
    ]  # fmt: skip
    items = read(write_tar(tmp_path / "s.tar", *members))
    assert [(item.image, item.answer) for item in items] == [(picture, answer) for answer in "7899"]


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(type=tarfile.SYMTYPE, linkname="/etc/passwd"), "is a link to /etc/passwd, which is no file in the shard"),
        (dict(type=tarfile.LNKTYPE, linkname="../../etc/passwd"), "is a link to ../../etc/passwd, which is no file"),
        (dict(type=tarfile.SYMTYPE, linkname="z.png"), "is a link to z.png, which is no file in the shard"),
        (dict(type=tarfile.SYMTYPE, linkname="y\x1b]0;x\x07"), r"is a link to y\\x1b\]0;x\\x07, which is no file"),
        (dict(type=tarfile.CHRTYPE, devmajor=1, devminor=5), "is a device, which is not read"),
        (dict(type=tarfile.FIFOTYPE), "is a pipe, which is not read"),
    ],
)
def test_what_a_member_leads_to_outside_is_not_read(tmp_path, changes, words):
    named = [member("z.png", **changes), member("z.txt", b"7")]
    _, broken, whole = read(write_tar(tmp_path / "s.tar", *sample("a"), *named, *sample("b")))
    assert isinstance(broken, BrokenSample) and whole.answer == "b"
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(broken.reason)


def test_absolute_and_climbing_names_are_names_alone(tmp_path):
    members = [entry for key in ("/etc/a", "../../b", "a//c") for entry in sample(key)]
    shard = write_tar(tmp_path / "s.tar", *members)
    assert [item.answer for item in read(shard)] == ["/etc/a", "../../b", "a//c"]
    assert sorted(tmp_path.iterdir()) == [shard]


def test_members_larger_than_a_picture_or_a_text_may_be_are_not_read(tmp_path):
    """A tar file of 10 GB of zeros, which lie nowhere."""
    shard = tmp_path / "s.tar"
    with open(shard, "wb") as file:
        for name, size in (("a.png", 10 << 30), ("a.txt", 1), ("b.png", 8), ("b.json", 1 << 30), ("c.npy", 5 << 30)):
            file.write(member(name)[0].tobuf(tarfile.GNU_FORMAT)[:124])
            info = tarfile.TarInfo(name)
            info.size = size
            file.seek(-124, os.SEEK_CUR)
            file.write(info.tobuf(tarfile.GNU_FORMAT))
            file.seek(-(-size // 512) * 512, os.SEEK_CUR)
        file.truncate(file.tell() + 1024)
    left_out = Counter()
    large, text = (record.read() for record in find_records(str(shard), left_out))
    assert ".png is larger than 699 MiB" in large.reason and ".json is larger than 16 MiB" in text.reason
    assert left_out == {".npy members": 1}


def test_members_that_no_sample_uses_are_counted(tmp_path, single_process_group):
    names = ["README.md", "._a.png", "__MACOSX/._b.png", ".ipynb_checkpoints/a.png", "LICENSE", "c.cls"]
    shard = write_tar(tmp_path / "s.tar", *sample("a"), *(member(name) for name in names), *sample("b"))
    left_out = Counter()
    (counted,) = count_shards([shard], data_parallel_rank=0, data_parallel_size=1, left_out=left_out)
    assert counted.samples == 2
    assert left_out.pop("hidden, or of the system") == 3
    assert left_out == {".md members": 1, ".cls members": 1, "members without a suffix": 1}


@pytest.mark.parametrize("suffix", ["heic", "seg.png", "svg"])
def test_a_picture_that_is_not_read_does_not_make_its_sample_one_of_text(tmp_path, suffix):
    members = [member(f"z.{suffix}", png()), member("z.json", b'{"prompt": "which?", "answer": "7"}')]
    (broken,) = read(write_tar(tmp_path / "s.tar", *members))
    assert f".{suffix} is no image that is read; convert it to PNG or JPEG, as KEY.png or KEY.jpg" in broken.reason


def test_no_image_of_two_is_left_out_in_silence(tmp_path):
    members = [member("z.png", png()), member("z.webp", png()), member("z.txt", b"7")]
    (broken,) = read(write_tar(tmp_path / "s.tar", *members))
    assert "it has two images, .png and .webp; a sample has one" in broken.reason


def test_names_that_came_twice_and_names_in_any_encoding(tmp_path):
    members = [*sample("a"), member("a.txt", b"new"), *sample("b"), *sample("a"), member("caf\udce9.png", png())]
    items = read(write_tar(tmp_path / "s.tar", *members))
    assert [item.answer for item in items[:3]] == ["new", "b", "a"]
    assert items[3].path == f"{tmp_path}/s.tar/caf\\udce9"


@pytest.mark.parametrize("mode, program", [("gz", "gunzip"), ("bz2", "bunzip2"), ("xz", "unxz")])
def test_a_compressed_shard_is_an_error_that_says_how_to_unpack_it(tmp_path, mode, program):
    for name in (f"s.tar.{mode}", "s.tar"):
        with tarfile.open(tmp_path / name, f"w:{mode}") as tar:
            info, content = member("a.png", png())
            tar.addfile(info, io.BytesIO(content))
    with pytest.raises(DataError, match=f"s.tar: compressed, so no sample can be found .*; unpack it with {program}$"):
        read(tmp_path / "s.tar")
    assert is_shard(tmp_path / f"s.tar.{mode}")
    (problem,) = problems_with_shards([str(tmp_path / f"s.tar.{mode}")], "--train-data")
    assert "compressed, so no sample can be found in it; unpack it to a .tar, or to a folder" in problem


def test_a_shard_that_is_a_pipe_or_a_device_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.tar")
    (tmp_path / "zero.tar").symlink_to("/dev/zero")
    (tmp_path / "folder.tar").mkdir()
    for name, words in (("pipe", "a pipe, no file"), ("zero", "a device, no file"), ("folder", "a folder, no file")):
        (problem,) = problems_with_shards([str(tmp_path / f"{name}.tar")], "--train-data")
        assert f"{name}.tar: cannot be read as a tar file: {words}" in problem


def test_a_picture_that_becomes_a_pipe_is_a_broken_sample_at_once(tmp_path, tokenizer):
    picture = tmp_path / "7.png"
    picture.write_bytes(png())
    samples = dataset([Item(picture, "7"), Item(Path("/dev/zero"), "8"), Item(tmp_path, "9")], tokenizer)
    assert not isinstance(samples[0], BrokenSample)
    picture.unlink()
    os.mkfifo(picture)
    reasons = [samples[number].reason for number in range(3)]
    for reason, words in zip(reasons, ("a pipe, no file", "a device, no file", "a folder, no file"), strict=True):
        assert reason.endswith(f": cannot be read as an image: {words}")


def test_a_file_too_large_for_its_pixels_is_not_read(tmp_path):
    with open(tmp_path / "x.webp", "wb") as file:
        file.write(b"RIFF\xff\xff\xff\x7fWEBPVP8 ")
        file.truncate(10 << 30)
    with pytest.raises(DataError, match="x.webp: cannot be read as an image: larger than 698.667 MiB"):
        read_picture(tmp_path / "x.webp")
    with pytest.raises(DataError, match="larger than 16.0076 MiB"):
        read_picture(tmp_path / "x.webp", max_pixels=1000)


def test_no_picture_of_too_many_pixels_is_decoded(monkeypatch):
    content = chunked_png([b""], 13000, 8, 2, height=13000)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: pytest.fail("decoded"))
    with pytest.raises(DataError, match="13000 x 13000 pixels are more than --max-pixels 89478485; make it smal"):
        read_picture(content)


def test_the_limit_of_pixels_is_an_option_and_holds_for_what_an_icon_holds(tmp_path, tokenizer):
    assert DEFAULTS["max_pixels"] == MAX_PIXELS == Image.MAX_IMAGE_PIXELS
    assert file_limit(10 * MAX_PIXELS) > 5 << 30
    (tmp_path / "7.png").write_bytes(encoded(Image.new("L", (40, 40)), "PNG"))
    item = Item(tmp_path / "7.png", "7")
    assert "40 x 40 pixels" in dataset([item], tokenizer, max_pixels=1000)[0].reason
    assert not isinstance(dataset([item], tokenizer, max_pixels=1600)[0], BrokenSample)
    icon = encoded(Image.new("RGBA", (48, 48), "red"), "ICO", sizes=[(48, 48)])
    inner = chunked_png([b""], 3000, 8, 6, height=3000)
    start = icon.index(b"\x89PNG")
    with pytest.raises(DataError, match="cannot be read as an image: .*bomb"):
        read_picture(icon[:14] + len(inner).to_bytes(4, "little") + icon[18:start] + inner, max_pixels=100_000)


def test_a_jpeg_of_thousands_of_scans_is_refused():
    """14 bytes each, and each is a pass over all pixels."""
    content = encoded(Image.new("RGB", (64, 64), "red"), "JPEG", progressive=True)
    start = content.rindex(b"\xff\xda")
    with pytest.raises(DataError, match="a JPEG of more than 100 scans; save it anew"):
        read_picture(content[:start] + content[start:-2] * 3000 + b"\xff\xd9")
    film = encoded(Image.new("RGB", (8, 8)), "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))] * 120)
    assert read_picture(film).size == (8, 8)


def test_no_decoder_that_starts_a_program_is_tried():
    """EPS is handed to Ghostscript; WMF, HDF5 and their kind to whoever registered for them."""
    assert not {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG", "PSD", "FPX", "MIC", "IPTC"} & set(FORMATS)
    with pytest.raises(DataError, match="it is a PostScript file"):
        read_picture(b"\xc5\xd0\xd3\xc6" + bytes(28) + b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")


def test_what_cannot_be_packed_is_one_error(tmp_path, capsys):
    script = load_script("pack_shards")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "a.jsonl").write_text('{"image": "pipe.png", "answer": "7"}\n')
    assert script.main([str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert f"{tmp_path}/pipe.png: cannot be packed: a pipe, no file; mend the file or the path" in message
    for number in ("0", "-1", "x"):
        with pytest.raises(SystemExit) as stop:
            script.main([str(tmp_path), "--out", str(tmp_path / "out"), "--samples-per-shard", number])
        assert stop.value.code == 2 and "wanted a whole number above 0" in capsys.readouterr().err


def test_packed_pictures_keep_a_suffix_under_which_they_are_found(tmp_path, capsys):
    names = {"a.JPG_large": "JPEG", "b": "GIF", "c.png": "BMP", "d.TIFF": "TIFF"}
    for name, kind in names.items():
        (tmp_path / name).write_bytes(encoded(Image.new("RGB", (9, 9)), kind))
    lines = [f'{{"image": "{name}", "answer": "{name}"}}' for name in names]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert load_script("pack_shards").main([str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out")]) == 0
    items = read(tmp_path / "out" / "shard-000000.tar")
    assert [(item.answer, item.image) for item in items] == [(n, (tmp_path / n).read_bytes()) for n in names]


def test_a_truncated_shard_counts_the_same_on_every_rank(tmp_path, single_process_group):
    whole = write_tar(tmp_path / "a.tar", *sample("a"), *sample("b"))
    os.truncate(whole, 2600)
    for rank in range(2):
        with pytest.raises(DataError, match=r"a\.tar: cannot be read as a tar file: the file ends \d+ bytes too early"):
            count_shards([whole], data_parallel_rank=0, data_parallel_size=1 + rank)


def test_300_mutated_pictures_and_shards_are_read_or_refused(tmp_path):
    outcomes = count_outcomes(300, 7, tmp_path)
    assert sum(outcomes.values()) == 300 and min(outcomes.values()) > 10 and len(outcomes) == 4


@pytest.mark.matrix
@pytest.mark.timeout(600)
def test_5000_mutated_pictures_and_shards_are_read_or_refused(tmp_path):
    assert sum(count_outcomes(5000, 11, tmp_path).values()) == 5000


def test_tarfile_finds_the_same_members(tmp_path):
    """Of every kind of header, on files that it reads right."""
    long = "long/" * 25
    for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        names = ["a.png", "d/é.txt", long + "x.png", *(["n" * 200 + ".png"] if kind != tarfile.USTAR_FORMAT else [])]
        members = [member(name, bytes(size)) for name in names for size in (0, 1, 512, 513)]
        members.insert(3, member("folder", type=tarfile.DIRTYPE))
        shard = write_tar(tmp_path / "s.tar", *members, kind=kind)
        with tarfile.open(shard) as tar:
            expected = [(one.name, one.offset_data, one.size) for one in tar if one.isreg()]
        with open(shard, "rb") as file:
            assert [(m.name, m.first, m.size) for m in read_members(file) if m.kind == "a file"] == expected


def test_the_usual_shard_is_still_one(tmp_path):
    shard = write_shard(tmp_path / "s.tar", ("0.png", png()), ("0.txt", "7"))
    assert read(shard) == [Item(png(), "7", None, f"{shard}/0")]
