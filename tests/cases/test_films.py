"""Films wherever samples may have pictures: packed, looked through, asked about, and named in every layout."""

import base64
import json
import tarfile
from types import SimpleNamespace

import pytest
from PIL import Image

from sat_lora import ConfigError, DataError
from sat_lora.chat.terminal import dropped_image
from sat_lora.cogvlm.inputs.films import MOST_FRAMES
from sat_lora.cogvlm.inputs.picture_kinds import film_suffix
from sat_lora.cogvlm.inputs.pictures import MAX_PIXELS
from sat_lora.data.answer_lengths import answer_lengths
from sat_lora.data.overview.examine import examine
from sat_lora.data.overview.html_page import picture_tag
from sat_lora.data.reading import Reading
from sat_lora.data.samples import ImageTextDataset, Item, read_items
from sat_lora.data.shards.pack import pack_shards
from sat_lora.data.shards.shard_checks import problems_with_shards
from sat_lora.data.shards.shards import find_records
from sat_lora.serve.questions import RequestError, read_question
from tests.support.films import STEP, turn_film, write_film


class Characters:
    """A tokenizer of which each character is a token; a text of its own begins with another, as of SentencePiece."""

    bos_token_id, eos_token_id, unk_token_id = 1, 2, 3
    all_special_ids, all_special_tokens, added_tokens_decoder = [1, 2], ["<s>", "</s>"], {}

    def encode(self, text, add_special_tokens=False, **settings):
        return [9, *(ord(character) for character in text)]

    def decode(self, ids, **settings):
        return "".join(map(chr, ids))


def film_dataset(items=(), **settings):
    usual = dict(version="base", prompt="q", image_size=(8, 8), image_length=4, max_length=300, takes_frames=True)
    return ImageTextDataset([*items], Characters(), **{**usual, **settings})


def write_frames(folder, count=3):
    folder.mkdir()
    for number in range(count):
        Image.new("RGB", (8, 8), (STEP * number,) * 3).save(folder / f"{number}.png")
    return folder


def write_lines(path, *samples):
    path.write_text("".join(f"{json.dumps(sample)}\n" for sample in samples))
    return path


ASKED = {"prompt": "What?", "answer": "a cat"}


@pytest.mark.parametrize("name", ["a.mp4", "b.MKV", "c.avi", "d.ts", "unnamed"])
def test_a_packed_film_is_the_film(tmp_path, name):
    suffix = ".mp4" if name == "unnamed" else f".{name.partition('.')[2].lower()}"
    film = write_film(tmp_path / f"film{suffix}", codec="mpeg2video" if suffix == ".ts" else "mpeg4")
    film = film.rename(tmp_path / name)
    lines = write_lines(tmp_path / "films.jsonl", {"video": name, **ASKED})
    shard, count = pack_shards([lines], tmp_path / "shards")
    with tarfile.open(shard) as tar:
        assert count == 1 and {*tar.getnames()} == {"000000000.json", f"000000000{suffix}"}
    (record,) = find_records(shard)
    item = record.read()
    assert item.image == film.read_bytes()
    packed = film_dataset().make_sample(item)
    plain = film_dataset().make_sample(Item(film, "a cat", "What?"))
    assert packed.input_ids.tolist() == plain.input_ids.tolist() and len(packed.more_images) == MOST_FRAMES - 1
    assert all((ours == theirs).all() for ours, theirs in zip(packed.more_images, plain.more_images, strict=True))
    as_picture = film_dataset(takes_frames=False).make_sample(item)
    assert "it is a film; convert it to PNG or JPEG" in as_picture.reason


def test_a_film_that_cannot_be_read_is_packed_under_its_own_suffix(tmp_path):
    """It is one of the run's broken samples, as it was before, and no picture."""
    (tmp_path / "a.mp4").write_bytes(b"film")
    shard, _ = pack_shards([write_lines(tmp_path / "f.jsonl", {"video": "a.mp4", **ASKED})], tmp_path / "shards")
    with tarfile.open(shard) as tar:
        assert "000000000.mp4" in tar.getnames()


def test_a_folder_of_frames_is_not_packed_and_nothing_is_written(tmp_path):
    write_film(tmp_path / "a.mp4", 2)
    write_frames(tmp_path / "frames")
    lines = write_lines(tmp_path / "films.jsonl", {"video": "a.mp4", **ASKED}, {"video": "frames", **ASKED})
    with pytest.raises(DataError, match="frames: cannot be packed: a folder, no file; .* as a film, or train on"):
        pack_shards([lines], tmp_path / "shards")
    assert not (tmp_path / "shards").exists()


def test_the_film_of_a_shard_that_is_missing_is_named(tmp_path):
    (tmp_path / "0.json").write_text(json.dumps({"video": "a.mp4", "prompt": "<video>What?", "answer": "a"}))
    with tarfile.open(tmp_path / "alone.tar", "w") as tar:
        tar.add(tmp_path / "0.json", "0.json")
    (record,) = find_records(str(tmp_path / "alone.tar"))
    assert "its json names an image, 'a.mp4', but none lies beside it" in record.read().reason
    write_film(tmp_path / "a.mp4", 2)
    with tarfile.open(tmp_path / "both.tar", "w") as tar:
        tar.add(tmp_path / "0.json", "0.json")
        tar.add(tmp_path / "a.mp4", "0.mp4")
    (record,) = find_records(str(tmp_path / "both.tar"))
    assert record.read().prompt == "What?"


@pytest.mark.parametrize("version", ["base", "chat_old"])
def test_what_is_shown_of_a_film_before_the_run_is_what_is_trained_on(tmp_path, version):
    write_film(tmp_path / "a.avi", 12, rate=4)  # 3 s: fewer frames than a film may have
    write_frames(tmp_path / "frames")
    Image.new("RGB", (8, 8)).save(tmp_path / "still.png")
    names = ("a.avi", "frames", "still.png")
    lines = write_lines(
        tmp_path / "f.jsonl", *({"video": name, **ASKED} for name in names), {"prompt": "q", "answer": "a"}
    )
    dataset = film_dataset(read_items([lines]), version=version)
    lengths = [len(dataset.lay_out(item).input_ids) for item in dataset.items]
    assert lengths == [len(sample.input_ids) for sample in dataset] and len({*lengths}) == len(lengths)
    overview = examine([str(lines)], Reading(), dataset, 10, lambda items, title: items)
    assert overview.lengths.numbers == lengths and not overview.broken


def test_the_overview_looks_at_a_frame_of_each_film(tmp_path):
    """Films, folders with frames, moving pictures; and for a base that takes none they are broken, as they were."""
    film = write_film(tmp_path / "a.mp4", 10, size=(64, 32))
    turn_film(film, (0, 1, -1, 0))
    write_frames(tmp_path / "frames")
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(film.read_bytes()[:700])
    lines = write_lines(tmp_path / "f.jsonl", *({"video": name, **ASKED} for name in ("a.mp4", "frames", "cut.mp4")))
    walk = lambda items, title: items  # noqa: E731
    overview = examine([str(lines)], Reading(), film_dataset(), 10, walk)
    assert overview.looked_at == 2 and overview.heights.numbers == [64, 8] and len(overview.broken) == 1
    assert "it is damaged or cut short; copy it again" in overview.broken[f"{lines}, line 3"]
    plain = examine([str(lines)], Reading(), film_dataset(takes_frames=False), 10, walk)
    assert plain.looked_at == 0 and len(plain.broken) == 3
    for image in (film, tmp_path / "frames", film.read_bytes()):
        assert picture_tag(image, "", 10**6, takes_frames=True).startswith('<img alt="" src="data:image/jpeg')
        assert picture_tag(image, "", 10**6, takes_frames=False).startswith('<p class="broken">')


@pytest.mark.parametrize("key", ["source", "note", "meta", "id", "_origin"])
@pytest.mark.parametrize("name", ["a.mp4", "films/b.WEBM", "c.mkv?t=3"])
def test_a_film_under_a_key_of_metadata_is_not_passed_over(tmp_path, key, name):
    value = {"path": name} if key == "meta" else name
    with pytest.raises(DataError, match=f'"{key}" is not known where there is no image: it seems to hold one'):
        read_items([write_lines(tmp_path / "f.jsonl", {key: value, **ASKED})])
    assert read_items([write_lines(tmp_path / "f.jsonl", {key: value, "video": "a.mp4", **ASKED})])[0].image
    assert read_items([write_lines(tmp_path / "g.jsonl", {key: "index.ts", **ASKED})])  # a program


ANSWER = {"from": "gpt", "value": "a cat"}
DATA_URL = f"data:video/mp4;base64,{base64.b64encode(b'film').decode()}"


@pytest.mark.parametrize(
    "sample",
    [
        {"video": "a.mp4", "conversations": [{"from": "human", "value": "<video>\nWhat?"}, ANSWER]},
        {"video": "a.mp4", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, ANSWER]},
        {
            "videos": ["a.mp4"],
            "messages": [{"role": "user", "content": "What?<video>"}, {"role": "gpt", "content": "a"}],
        },
        {"video": "a.mp4", "prompt": "<video>What?", "answer": "a"},
        {"image": "a.mp4", "prompt": "<video>\nWhat?", "answer": "a"},
        {"video_path": "a.mp4", "question": "What?\n<video>", "answer": "a"},
        {"query": "<video>What?", "response": "a", "videos": ["a.mp4"]},
        *(
            {"messages": [{"role": "user", "content": [part, "What?"]}, {"role": "assistant", "content": "a"}]}
            for part in (
                {"type": "video", "video": "a.mp4"},
                {"type": "video_url", "video_url": {"url": "a.mp4"}},
                {"type": "input_video", "path": "a.mp4"},
                {"video": "a.mp4"},
            )
        ),
        {
            "messages": [
                {"role": "user", "content": "<video>What?", "videos": ["a.mp4"]},
                {"role": "gpt", "content": "a"},
            ]
        },
    ],
)
def test_films_of_others_are_read_where_they_stand(tmp_path, sample):
    (item,) = read_items([write_lines(tmp_path / "f.jsonl", sample)])
    assert (item.image, item.prompt, item.history) == (tmp_path / "a.mp4", "What?", ())


def test_a_film_comes_as_a_data_url_too_and_the_mark_of_films_is_a_text_elsewhere(tmp_path):
    part = {"type": "video_url", "video_url": {"url": DATA_URL}}
    turns = [{"role": "user", "content": [{"type": "text", "text": "What?"}, part]}, {"role": "gpt", "content": "a"}]
    (item,) = read_items([write_lines(tmp_path / "f.jsonl", {"messages": turns})])
    assert (item.image, item.prompt) == (b"film", "What?")
    write_frames(tmp_path / "frames")
    (item,) = read_items([write_lines(tmp_path / "f.jsonl", {"video": "frames", "prompt": "<video>?", "answer": "a"})])
    assert (item.image, item.prompt) == (tmp_path / "frames", "?")
    sample = {"image": "a.png", "prompt": "What is <video> in HTML?", "answer": "a"}
    assert read_items([write_lines(tmp_path / "f.jsonl", sample)])[0].prompt == sample["prompt"]
    with pytest.raises(DataError, match="2 places for images in its texts and 1 image"):
        read_items([write_lines(tmp_path / "f.jsonl", {"video": "a.mp4", "prompt": "<video><video>", "answer": "a"})])


def test_answers_behind_the_numbers_of_frames_are_counted(tmp_path):
    """By the characters of question and answer alone they would fit; each number takes 2 or 3 tokens, too."""
    items = [Item(tmp_path / "a.mp4", "a" * 20, "What?")]
    for version in ("chat_old", "base"):
        needed = len(film_dataset(version=version, max_length=999).lay_out(items[0]).input_ids)
        cut = answer_lengths(film_dataset(items, version=version, max_length=needed - 1))
        assert (cut.cut, cut.longest) == (1, needed)
        assert answer_lengths(film_dataset(items, version=version, max_length=needed)).cut == 0


def trial_by(try_item):
    return SimpleNamespace(max_pixels=MAX_PIXELS, try_item=try_item)


def test_shards_whose_films_do_not_fit_are_refused_early(tmp_path):
    write_film(tmp_path / "a.mp4", 2)
    shard, _ = pack_shards([write_lines(tmp_path / "f.jsonl", {"video": "a.mp4", **ASKED})], tmp_path)

    def refuse(item):
        raise ConfigError(f"--max_length: 9 is too short for {film_suffix(item.image[:400])}")

    (problem,) = problems_with_shards([shard], "--train-data")
    assert problem.endswith("it is a film; convert it to PNG or JPEG")
    assert [*problems_with_shards([shard], "--train-data", trial=trial_by(lambda item: None))] == []
    problem = f"{shard}: --max_length: 9 is too short for .mp4"
    assert [*problems_with_shards([shard], "--train-data", trial=trial_by(refuse))] == [problem]


def test_a_film_is_dropped_into_a_conversation(tmp_path):
    film = write_film(tmp_path / "my film.MP4", 2)
    frames = write_frames(tmp_path / "frames")
    (tmp_path / "texts").mkdir()
    assert dropped_image(f"'{film}'") == film and dropped_image(f"file://{tmp_path}/my%20film.MP4 ") == film
    for folder in (f"{frames}/", str(frames)):
        assert dropped_image(folder, takes_frames=True) == frames and dropped_image(folder) is None
    assert (
        dropped_image(f"{tmp_path}/texts", takes_frames=True) is None and dropped_image(f"What is in {film}?") is None
    )


@pytest.mark.parametrize("kind", ["video_url", "video", "input_video"])
def test_the_server_says_that_films_are_not_served(tmp_path, kind):
    url = f"data:video/mp4;base64,{base64.b64encode(write_film(tmp_path / 'a.mp4', 2).read_bytes()).decode()}"
    for part in (
        {"type": kind, kind: {"url": url}},
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image_url", "image_url": {"url": url.replace("video/mp4", "image/png")}},
    ):
        body = {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}]}
        with pytest.raises(RequestError, match=r"messages\[0\].content\[0\].*: a film; pictures alone are served"):
            read_question(body, speakers=["base"], keeps_history=True)
