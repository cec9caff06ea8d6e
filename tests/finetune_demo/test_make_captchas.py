"""The demo's captcha images."""

import hashlib
import sys
from pathlib import Path

import captcha.image
import pytest
from PIL import Image

from tests.support.paths import DEMO

sys.path.insert(0, str(DEMO))
from make_captchas import STRINGS, draw_captcha, make_captchas, plan, seeded_draws, split_strings

pytestmark = pytest.mark.timeout(60)
FEW = {"train": 30, "valid": 60, "test": 12}


def digests(folder: Path) -> dict[str, str]:
    """A digest of the content of every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def captchas(tmp_path_factory) -> Path:
    return make_captchas(tmp_path_factory.mktemp("demo") / "captchas", **FEW, seed=3, workers=1)


def test_every_string_belongs_to_one_set():
    split = split_strings(0)
    assert {name: len(strings) for name, strings in split.items()} == STRINGS
    assert sorted(sum(split.values(), [])) == [f"{number:03d}" for number in range(1000)]
    assert split != split_strings(1)


def test_sets_on_disk_share_no_string_and_have_the_sizes_asked_for(captchas):
    stems = {name: [file.stem for file in (captchas / name).glob("*/*.png")] for name in FEW}
    assert {name: len(found) for name, found in stems.items()} == FEW
    assert not set(stems["train"]) & set(stems["valid"])
    assert not (set(stems["train"]) | set(stems["valid"])) & set(stems["test"])
    for name, found in stems.items():
        assert set(found) <= set(split_strings(3)[name])


def test_a_string_has_one_image_per_folder(captchas):
    assert [folder.name for folder in sorted((captchas / "valid").iterdir())] == ["000", "001"]
    assert len(list((captchas / "valid" / "000").iterdir())) == STRINGS["valid"]
    paths = [path for path, _ in plan("train", 8000, 0)]
    assert len(set(paths)) == len(paths)


def test_images_are_112_pixels_square_in_colour(captchas):
    for file in captchas.rglob("*.png"):
        with Image.open(file) as image:
            assert (image.size, image.mode) == ((112, 112), "RGB")


def test_neither_workers_nor_other_images_change_an_image(captchas, tmp_path):
    more = make_captchas(tmp_path / "captchas", **{**FEW, "train": 40}, seed=3, workers=3)
    once, twice = digests(captchas), digests(more)
    assert once.items() <= twice.items()
    assert len(twice) == len(once) + 10


def test_the_seed_and_the_path_change_an_image():
    one, same, other = draw_captcha("123", "a"), draw_captcha("123", "a"), draw_captcha("123", "b")
    assert one.tobytes() == same.tobytes()
    assert one.tobytes() != other.tobytes()


def test_the_stem_is_what_is_drawn(captchas, monkeypatch):
    drawn = []
    draw = captcha.image.ImageCaptcha.generate_image
    monkeypatch.setattr(
        captcha.image.ImageCaptcha, "generate_image", lambda self, text: drawn.append(text) or draw(self, text)
    )
    path, seed = plan("test", 1, 3)[0]
    image = draw_captcha(Path(path).stem, seed)
    with Image.open(captchas / path) as written:
        assert written.tobytes() == image.tobytes()
    assert drawn == [Path(path).stem]


def test_drawing_leaves_the_captcha_package_as_it_was():
    secrets = captcha.image.secrets
    with pytest.raises(KeyError), seeded_draws("a"):
        assert captcha.image.secrets is not secrets
        raise KeyError
    assert captcha.image.secrets is secrets


def test_a_folder_that_exists_is_left_alone(captchas, capsys):
    before = digests(captchas)
    make_captchas(captchas, train=1, valid=1, test=1, seed=9)
    assert digests(captchas) == before
    assert str(captchas) in capsys.readouterr().out


def test_a_failed_run_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("make_captchas.Pool", None)
    with pytest.raises(TypeError):
        make_captchas(tmp_path / "captchas", **FEW)
    assert list(tmp_path.iterdir()) == []
