"""Films as CogVLM2-Video sees them: which frames, how they are cut, and their places in the text."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from PIL import Image

from sat_lora import DataError
from sat_lora.cogvlm.inputs.frames import MOST_FRAMES, chosen_frames, frame_tensor, load_frames, with_frames
from sat_lora.cogvlm.inputs.image import MEAN, STD
from sat_lora.cogvlm.inputs.text import build_sample
from sat_lora.data.samples import ImageTextDataset, Item, collate


def times(seconds, rate=10):
    return [number / rate for number in range(int(seconds * rate))]


@pytest.mark.parametrize(
    ("seconds", "version", "numbers"),
    [
        (3, "chat_old", [0, 10, 20, 29]),  # 2.9 is the nearest to 3
        (0.2, "chat_old", [0]),
        (100, "chat_old", [10 * second for second in range(24)]),
        (0.1, "base", [0] * 24),
        (120, "base", [int(599 * part / 23) for part in range(24)]),  # of the first minute
        (4.8, "base", [int(47 * part / 23) for part in range(24)]),
    ],
)
def test_frames_are_chosen_as_published(seconds, version, numbers):
    assert chosen_frames(times(seconds), version) == numbers
    assert chosen_frames([], version) == []


def test_a_frame_keeps_its_aspect_ratio_and_its_middle():
    wide = Image.new("RGB", (40, 20), "white")
    wide.paste("red", (15, 0, 25, 20))
    frame = frame_tensor(wide, (10, 10))
    colours = frame * STD + MEAN
    assert frame.shape == (3, 10, 10) and frame_tensor(wide.rotate(90, expand=True), (10, 10)).shape == (3, 10, 10)
    assert torch.allclose(colours[:, :, 5], torch.tensor([1.0, 0, 0])[:, None], atol=1e-5)
    assert torch.allclose(colours[:, :, 0], torch.ones(3)[:, None], atol=1e-5)  # not squeezed: the red ends before
    assert float((1 - colours[1, 0]).sum()) == pytest.approx(5, abs=1e-3)  # 10 of 40 columns are half of those left


def write_frames(folder, count):
    folder.mkdir()
    for number in range(count):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"frame{number}.png")
    (folder / "notes.txt").write_text("none")
    return folder


def reds(frames):
    return [round(float((frame * STD + MEAN)[0, 0, 0] * 255)) for frame in frames]


def test_a_folder_has_its_frames_in_the_order_of_their_numbers(tmp_path):
    assert reds(load_frames(write_frames(tmp_path / "short", 12), (4, 4), "base")) == [*range(12)]
    assert reds(load_frames(write_frames(tmp_path / "long", 50), (4, 4), "chat")) == [*range(24)]
    assert reds(load_frames(tmp_path / "long", (4, 4), "base")) == [int(49 * part / 23) for part in range(24)]
    assert reds(load_frames(tmp_path / "long" / "frame7.png", (4, 4), "base")) == [7]
    assert reds(load_frames((tmp_path / "long" / "frame9.png").read_bytes(), (4, 4), "base")) == [9]


def test_films_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    film = tmp_path / "film.mp4"
    film.write_bytes(b"film")
    with pytest.raises(DataError, match="empty: no pictures in it; a folder has the frames of a film as pictures"):
        load_frames(tmp_path / "empty", (4, 4), "base")
    with pytest.raises(DataError, match="gone.mp4: cannot be read as a film: there is no such file"):
        load_frames(tmp_path / "gone.mp4", (4, 4), "base")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(
        DataError, match=r"film.mp4: films are read by PyAV, .* pip install 'sat_lora\[video\]', or give"
    ):
        load_frames(film, (4, 4), "base")


class Film:
    """What PyAV gives of a film: packets in the order of decoding, some without a time, and frames in their order."""

    def __init__(self, frames, rate=10):
        self.frames = frames
        self.rate = rate
        codec = SimpleNamespace(width=8, height=8)
        self.streams = SimpleNamespace(video=[SimpleNamespace(codec_context=codec)])

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def demux(self, stream):
        order = [*range(self.frames)]
        order[1:3] = order[1:3][::-1]
        yield from (SimpleNamespace(pts=100 + number, time_base=1 / self.rate, size=9) for number in order)
        yield SimpleNamespace(pts=None, time_base=1 / self.rate, size=0)

    def decode(self, video):
        for number in range(self.frames):
            yield SimpleNamespace(to_image=lambda number=number: Image.new("RGB", (8, 8), (number, 0, 0)))


@pytest.mark.parametrize(
    ("version", "numbers"), [("chat_old", [0, 10, 20, 29]), ("base", [int(29 * part / 23) for part in range(24)])]
)
def test_the_frames_of_a_file_are_those_of_their_times(tmp_path, monkeypatch, version, numbers):
    film = tmp_path / "film.MP4"
    film.write_bytes(b"film")
    library = ModuleType("av")
    library.open = lambda path, **settings: Film(30)
    monkeypatch.setitem(sys.modules, "av", library)
    assert reds(load_frames(film, (4, 4), version)) == numbers
    library.open = lambda path, **settings: Film(0)
    with pytest.raises(DataError, match="film.MP4: cannot be read as a film: it has no frame"):
        load_frames(film, (4, 4), version)


class Words:
    """A tokenizer of which each character is a token."""

    bos_token_id, eos_token_id, unk_token_id = 1, 2, 3
    all_special_ids, all_special_tokens, added_tokens_decoder = [1, 2], ["<s>", "</s>"], {}

    def encode(self, text, add_special_tokens=False, **settings):
        return [ord(character) for character in text]


def test_frames_that_touch_share_one_position_and_numbers_stand_between_the_others():
    """Everything between the first begin and the last end of image; with numbers each frame is an image of its own."""
    touching = build_sample(Words(), with_frames(("", "q"), [3], "base"), None, 4, 99, joins_images=True)
    assert touching.position_ids.tolist() == [0, 1, *[2] * 16, 3, 4]
    assert touching.image_embed_mask.tolist() == [0, *[1] * 18, 0]
    numbered = build_sample(Words(), with_frames(("", "q"), [2], "chat_old"), None, 4, 99, joins_images=True)
    assert numbered.position_ids.tolist() == [0, 1, *[2] * 4, 3, 4, 5, *[6] * 4, 7, 8, 9]
    assert numbered.input_ids.tolist() == [1, *[0] * 6, ord("0"), *[0] * 6, ord("1"), ord("q")]
    assert with_frames(("a", "b", "c"), [2, 1], "chat") == ("a", "0", "1b", "0c")


def test_a_sample_has_as_many_images_as_its_film_has_frames(tmp_path):
    folder = write_frames(tmp_path / "film", 5)
    settings = dict(version="base", prompt="q", image_size=(4, 4), image_length=4, max_length=300, takes_frames=True)
    dataset = ImageTextDataset([Item(folder, "a"), Item(None, "b")], Words(), **settings)
    batch = collate([dataset[0], dataset[1]], image_size=(4, 4))
    assert batch["images"].shape == (5, 3, 4, 4) and batch["image_embed_mask"].sum(1).tolist() == [30, 0]
    assert not batch["broken"]
    assert int(dataset.lay_out(dataset.items[0]).image_embed_mask.sum()) == 6 * MOST_FRAMES  # nobody has looked yet
