"""A data set with 30 % broken images on two ranks: no crash, every step made, each path named once, or a stop."""

import json
import struct
import zlib
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from sat_lora import DataError
from sat_lora.cogvlm.inputs.image import load_image
from sat_lora.training.runs.logs.run_logs import read_records
from tests.support.demo_runs import options_for
from tests.support.picture_files import write_images
from tests.support.ranks import run_ranks
from tests.support.scripts import run_script

SAMPLES = 40


def write_bomb(path: Path, side: int = 2**15) -> None:
    """A PNG of side x side pixels that says so in its header and holds hardly a byte."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")))


def write_truncated(path: Path) -> None:
    Image.effect_noise((40, 40), 60).save(path)
    path.write_bytes(path.read_bytes()[:-400])


BROKEN = {
    "zero bytes": Path.touch,
    "truncated": write_truncated,
    "text": lambda path: path.write_text("404 Not Found"),
    "a bomb": write_bomb,
    "missing": lambda path: None,
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a directory": Path.mkdir,
}
SOUND = {
    "CMYK": lambda path: Image.new("CMYK", (30, 20), (9, 90, 0, 40)).save(path, "JPEG"),
    "1 x 1": lambda path: Image.new("RGB", (1, 1), (9, 90, 0)).save(path),
    "one bit": lambda path: Image.new("1", (20, 20), 1).save(path),
}


def test_every_kind_of_broken_image_is_a_data_error_and_odd_ones_are_not(tmp_path):
    for number, write in enumerate(BROKEN.values()):
        write(tmp_path / f"{number}.png")
        with pytest.raises(DataError, match=rf"{number}\.png: cannot be read as an image"):
            load_image(tmp_path / f"{number}.png", (14, 14))
    for kind, write in SOUND.items():
        write(tmp_path / "sound.png")
        assert load_image(tmp_path / "sound.png", (14, 14)).shape == (3, 14, 14), kind


@pytest.fixture
def broken_data(tmp_path) -> tuple[Path, set[str]]:
    """A .jsonl of 40 images, 12 of them broken, and the paths of those."""
    folder = write_images(tmp_path / "images", [f"{number:03}.png" for number in range(SAMPLES)])
    kinds = list(BROKEN.values())
    odd = list(SOUND.values())
    broken = set()
    for number, path in enumerate(sorted(folder.iterdir())):
        if number % 10 in (2, 5, 7):
            path.unlink()
            kinds[len(broken) % len(kinds)](path)
            broken.add(str(path))
        elif number % 10 == 4:
            odd[number // 10 % len(odd)](path)
    lines = [json.dumps({"image": f"{number:03}.png", "answer": f"{number:03}"}) for number in range(SAMPLES)]
    (folder / "data.jsonl").write_text("\n".join(lines))
    return folder / "data.jsonl", broken


def options_with(data, tmp_path, captchas, *more):
    return options_for(
        captchas, tmp_path, "--train-data", str(data), "--batch-size", "4", "--save-interval", "2", *more
    )


def broken_in(run: Path) -> Counter:
    return Counter(record["broken"] for record in read_records(run / "train.jsonl") if "broken" in record)


def test_thirty_percent_broken_images_cost_no_step_and_are_named_once(broken_data, tmp_path, captchas):
    """Two and a half epochs, so that every broken image comes up twice."""
    data, broken = broken_data
    options = options_with(data, tmp_path, captchas, "--train-iters", "12", "--max-broken-share", "0.5")
    results = run_ranks(run_script, 2, options)
    assert [status for status, _ in results] == [0, 0]
    steps = [record["step"] for record in read_records(tmp_path / "run" / "train.jsonl") if "loss" in record]
    assert steps == list(range(1, 13))
    assert broken_in(tmp_path / "run") == dict.fromkeys(broken, 1)


def test_too_many_stop_every_rank_with_the_list_and_keep_the_adapter(broken_data, tmp_path, captchas):
    """At the end of the first epoch, the fifth step of eight samples; steps 2 and 4 saved."""
    data, broken = broken_data
    results = run_ranks(run_script, 2, options_with(data, tmp_path, captchas, "--train-iters", "12"))
    assert [status for status, _ in results] == [2, 2]
    message = "".join(errors for _, errors in results)
    assert message.count("12 of the first 40 training samples cannot be used, --max-broken-share allows") == 1
    assert "Traceback" not in message
    assert {path: message.count(f"  {path}: ") for path in broken} == dict.fromkeys(broken, 1), message
    assert broken_in(tmp_path / "run") == dict.fromkeys(broken, 1)
    assert max(record["step"] for record in read_records(tmp_path / "run" / "train.jsonl") if "loss" in record) == 4
    assert (tmp_path / "run" / "adapter" / "4" / "adapter_model.safetensors").is_file()


def test_a_broken_validation_image_is_named_once_and_the_loss_is_that_of_the_others(tmp_path, captchas):
    folder = write_images(tmp_path / "valid", ["001.png", "002.png", "003.png"])
    (folder / "002.png").write_bytes(b"")
    options = options_for(captchas, tmp_path, "--valid-data", str(folder), "--train-iters", "2", "--eval-interval", "1")
    assert [status for status, _ in run_ranks(run_script, 2, options)] == [0, 0]
    assert broken_in(tmp_path / "run") == {str(folder / "002.png"): 1}
    records = read_records(tmp_path / "run" / "train.jsonl")
    assert [record["step"] for record in records if "valid_loss" in record] == [1, 2]
