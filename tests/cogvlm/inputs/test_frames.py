"""Films as CogVLM2-Video sees them: which frames, how they are cut, and their places in the text."""

import sys
from fractions import Fraction

import pytest
import torch
from PIL import Image

from sat_lora import DataError
from sat_lora.cogvlm.inputs import pictures
from sat_lora.cogvlm.inputs.films import (
    MOST_FRAMES,
    chosen_frames,
    count_frames,
    film_pictures,
    middle_picture,
    with_frames,
)
from sat_lora.cogvlm.inputs.image import MEAN, STD, frame_tensor, load_frames
from sat_lora.cogvlm.inputs.text import build_sample
from sat_lora.data.samples import ImageTextDataset, Item, collate
from tests.support.films import STEP, turn_film, write_film, write_sound


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
    counts = [count_frames(tmp_path / name, "base") for name in ("short", "long", "long/frame7.png", "gone.mp4")]
    assert counts == [12, 24, 1, MOST_FRAMES]  # what cannot be read may have all


def test_films_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    film = write_film(tmp_path / "film.mp4", 2)
    with pytest.raises(DataError, match="empty: no pictures in it; a folder has the frames of a film as pictures"):
        load_frames(tmp_path / "empty", (4, 4), "base")
    with pytest.raises(DataError, match="gone.mp4: cannot be read as a film: there is no such file"):
        load_frames(tmp_path / "gone.mp4", (4, 4), "base")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(DataError, match=r"film.mp4: .* read by PyAV, .* pip install 'sat_lora\[video\]', or give"):
        load_frames(film, (4, 4), "base")


def numbers_of(frames):
    """Return which frames of `write_film` these are, by their grey. The loss of an encoder is less than half a STEP."""
    greys = [sum(picture.getpixel((picture.width // 2, picture.height // 2))) / 3 for picture in frames]
    assert all(abs(grey - STEP * round(grey / STEP)) < STEP / 4 for grey in greys)
    return [round(grey / STEP) for grey in greys]


TEN = [int(9 * part / 23) for part in range(24)]


@pytest.mark.parametrize(
    ("name", "film", "seconds"),
    [
        ("a.mp4", {}, [0, 9]),
        ("b.MP4", {"b_frames": 2}, [0, 9]),
        ("c.avi", {}, [0, 9]),
        ("d.mkv", {"rate": 3, "b_frames": 2}, [0, 3, 6, 9]),
        ("e.webm", {"codec": "libvpx", "rate": Fraction(5, 2)}, [0, 2, 5, 7, 9]),
        ("f.mpg", {"codec": "mpeg1video", "rate": 25, "b_frames": 2}, [0]),
        ("g.ts", {"codec": "mpeg2video", "rate": Fraction(30000, 1001)}, [0]),
        ("h.mov", {"rate": Fraction(1, 2)}, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9]),
    ],
)
def test_the_frames_of_a_file_are_those_of_their_times(tmp_path, name, film, seconds):
    path = write_film(tmp_path / name, **film)
    assert numbers_of(film_pictures(path, "base")) == TEN
    assert numbers_of(film_pictures(path.read_bytes(), "chat_old")) == seconds  # as it lies in a shard
    assert (count_frames(path, "base"), count_frames(path.read_bytes(), "chat_old")) == (24, len(seconds))
    path.rename(tmp_path / "unnamed")
    assert numbers_of([middle_picture(tmp_path / "unnamed")]) == [seconds[len(seconds) // 2]]


def test_a_film_is_turned_as_a_viewer_shows_it(tmp_path):
    """Phones write how they were held; the red corner, top left as it was filmed, goes round, or to the other side."""
    film = write_film(tmp_path / "phone.mp4", 2, size=(64, 32), corner_is_red=True)
    turned = {}
    for matrix in ((1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0), (-1, 0, 0, 1), (0, 1, 1, 0)):
        frame = film_pictures(turn_film(film, matrix), "base")[0]
        quarters = {
            (x, y): frame.getpixel((x * frame.width // 4, y * frame.height // 4)) for x in (1, 3) for y in (1, 3)
        }
        turned[matrix] = (frame.size, [place for place, pixel in quarters.items() if pixel[0] > 200])
    assert turned == {
        (1, 0, 0, 1): ((64, 32), [(1, 1)]),
        (0, 1, -1, 0): ((32, 64), [(3, 1)]),
        (-1, 0, 0, -1): ((64, 32), [(3, 3)]),
        (0, -1, 1, 0): ((32, 64), [(1, 3)]),
        (-1, 0, 0, 1): ((64, 32), [(3, 1)]),
        (0, 1, 1, 0): ((32, 64), [(1, 1)]),
    }


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_a_moving_picture_is_a_film(tmp_path, kind):
    """Half a second a picture, but for the second, which is shown for two."""
    steps = [Image.new("RGB", (16, 16), (STEP * number,) * 3) for number in range(6)]
    settings = dict(save_all=True, append_images=steps[1:], duration=[500, 2000, 500, 500, 500, 500], lossless=True)
    file = tmp_path / "moving"
    steps[0].save(file, kind, **settings)
    assert numbers_of(film_pictures(file, "chat_old")) == [0, 1, 2, 3, 5]  # begun at 0, 0.5, 2.5, 3, 3.5 and 4
    assert numbers_of(film_pictures(file.read_bytes(), "base")) == [int(5 * part / 23) for part in range(24)]
    assert numbers_of([middle_picture(file)]) == [2]
    assert (count_frames(file, "chat_old"), count_frames(file.read_bytes(), "base")) == (5, 24)


def test_an_animation_without_end_is_not_gone_through(tmp_path, monkeypatch):
    """A small file may hold thousands of large pictures, each of which would be decoded."""
    monkeypatch.setattr(pictures, "ANIMATED_PIXELS", 16 * 60 * 60 - 1)
    shades = [Image.new("L", (60, 60), shade) for shade in range(16)]
    file = tmp_path / "bomb.gif"
    shades[0].save(file, save_all=True, append_images=shades[1:], duration=20)
    with pytest.raises(DataError, match="bomb.gif: .* an animation of 16 pictures of 60 x 60 pixels, more than"):
        film_pictures(file, "base")


def failure_of(content, tmp_path, name="film.mp4"):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}: cannot be read as a film: ") as caught:
        film_pictures(tmp_path / name, "base")
    return str(caught.value).partition("cannot be read as a film: ")[2]


def test_what_is_no_film_says_what_it_is(tmp_path):
    film = write_film(tmp_path / "a.mp4", 30).read_bytes()
    codecs = {"avi": "mpeg4", "flv": "flv"}
    films = {kind: write_film(tmp_path / f"a.{kind}", 60, codec=codec).read_bytes() for kind, codec in codecs.items()}
    damaged = "it is damaged or cut short; copy it again"
    assert failure_of(film[: len(film) // 2], tmp_path) == damaged
    assert failure_of(films["avi"][: len(films["avi"]) * 3 // 4], tmp_path).endswith(f" are there; {damaged}")
    assert failure_of(films["flv"][:20], tmp_path) == damaged
    assert failure_of(b"hello\nfilm", tmp_path).startswith("it is text that begins 'hello'; give the film itself")
    assert failure_of(bytes(range(256)) * 9, tmp_path).startswith("it is damaged, or no film of a kind that is read;")
    sound = write_sound(tmp_path / "sound.mp4").read_bytes()
    assert failure_of(sound, tmp_path) == "it has no picture stream, only sound; give a film"
    with pytest.raises(DataError, match="a.mp4: .* frames have more than --max-pixels 1000 pixels"):
        film_pictures(tmp_path / "a.mp4", "base", max_pixels=1000)
    start = films["avi"].find(b"movi") + 4
    assert "cut short" in failure_of(films["avi"][:start], tmp_path)  # a header without frames


@pytest.mark.parametrize(
    "script",
    [
        "ffconcat version 1.0\nfile a.mp4\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\na.ts\n#EXT-X-ENDLIST\n",
        '<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period/></MPD>',
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
    ],
)
def test_a_script_opens_no_other_file(tmp_path, script, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_film(tmp_path / "a.mp4")
    write_film(tmp_path / "a.ts", codec="mpeg2video")
    for name in ("film.mp4", "film.ts", "film.avi"):
        assert failure_of(script.encode(), tmp_path, name).startswith("it is text that begins ")
    assert "it is " in failure_of(b"ffconcat version 1.0\nfile a.mp4\n#" + b"\xff" * 9, tmp_path)


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
    assert int(dataset.lay_out(dataset.items[0]).image_embed_mask.sum()) == 30
    unreadable = dataset.lay_out(Item(tmp_path / "gone.mp4", "a"))
    assert int(unreadable.image_embed_mask.sum()) == 6 * MOST_FRAMES
