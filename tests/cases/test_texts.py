"""Kind 5: texts as editors and systems write them; and of kind 15, JSON that is meant to do harm."""

import json
import os
import time

import pytest
import torch

from sat_lora.cogvlm.inputs.tokens import text_tokens
from sat_lora.data.samples import BrokenSample, ImageTextDataset, Item, read_items
from sat_lora.errors import DataError
from sat_lora.training.answers.answering import length_of_answer
from sat_lora.training.preflight import option_problems
from tests.support.configs import parse_options
from tests.support.picture_files import write_images
from tests.support.sentence_pieces import TEXT, sentence_piece_tokenizer

GOOD = {"image": "a.png", "prompt": "q", "answer": "x"}
TWO = [GOOD, {**GOOD, "answer": "été 猫"}]


def answers(path, **settings):
    return [item.answer for item in read_items([path], **settings)]


def refusal(path, **settings) -> str:
    with pytest.raises(DataError) as error:
        read_items([path], **settings)
    assert "\x1b" not in str(error.value)
    return str(error.value)


@pytest.fixture
def write(tmp_path):
    def write(content: str | bytes, name="data.jsonl"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", errors="surrogatepass"))
        return path

    return write


@pytest.fixture
def dataset(tokenizer):
    def dataset(*items, **settings):
        common = dict(version="base", prompt="Q:", image_size=(21, 21), image_length=9, max_length=60)
        return ImageTextDataset(items, tokenizer, **{**common, **settings})

    return dataset


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\n\r\n", "\n\x0c", "\n\ufeff", "\r\n \t\r\n"], ids=repr)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "utf-32-be"])
def test_lines_end_as_they_do_and_encodings_are_known_by_their_marks(write, end, encoding):
    text = end.join(json.dumps(entry, ensure_ascii=False) for entry in TWO)
    assert answers(write(text.encode(encoding))) == ["x", "été 猫"]


@pytest.mark.parametrize("character", "\u2028\u2029\x85\u200b\xa0\u3000\ufeff\x7f", ids=lambda c: f"U+{ord(c):04X}")
def test_a_character_inside_a_text_ends_no_line(write, character):
    text = "".join(json.dumps({**GOOD, "answer": f"a{character}b"}, ensure_ascii=False) + "\n" for _ in range(2))
    assert answers(write(text)) == [f"a{character}b"] * 2


@pytest.mark.parametrize("character", "\x0b\x0c\x1c\x1e\t\x00", ids=lambda c: f"U+{ord(c):04X}")
def test_a_control_character_is_read_escaped_and_named_otherwise(write, character):
    assert answers(write(json.dumps({**GOOD, "answer": f"a{character}b"}))) == [f"a{character}b"]
    message = refusal(write(json.dumps(GOOD) + '\n{"prompt": "q", "answer": "a' + character + 'b"}'))
    assert "line 2 is not JSON: Invalid control character at column 29" in message


@pytest.mark.parametrize("name", ["data.json", "data.jsonl", "DATA.JSON", "data.txt", "data", "data.ndjson"])
@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_is_read_under_any_name(write, name, indent):
    path = write(json.dumps(TWO, indent=indent), name)
    items = read_items([path])
    assert [item.answer for item in items] == ["x", "été 猫"]
    assert items[1].place == f"{path}, object 2 (line {1 if indent is None else 7})"


def test_objects_over_several_lines_are_read(write):
    path = write("\n".join(json.dumps(entry, indent=1) for entry in TWO), "data.json")
    assert answers(path) == ["x", "été 猫"]
    assert answers(write(json.dumps(GOOD), "one.json")) == ["x"]


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"prompt": "q", "answer": "x",}', "(a comma too many)"),
        ('{"prompt": "q", "answer": "x"},', "(a comma too many)"),
        ('[{"prompt": "q", "answer": "x"},]', "(a comma too many)"),
        ('{"prompt": "q", "answer": "x"} # why', "(JSON has no comments)"),
        ("// why", "(JSON has no comments)"),
        ("{'prompt': 'q', 'answer': 'x'}", "json.dumps writes JSON"),
        ('{"prompt": None, "answer": "x"}', "JSON says null, true and false"),
        ("{“prompt”: “q”}", "typographic quotes"),
        ('{"image": "b\\c.png", "answer": "x"}', "(a backslash is written \\\\)"),
        ('{"prompt": "q", "answer": "x"}{"prompt": "q", "answer": "x"}', "(one object per line)"),
        ('{"prompt": "q", "answer": "x', "(it ends too early)"),
        ('[{"prompt": "q", "answer": "x"}', "(it ends too early)"),
        ('[{"prompt": "q", "answer": "x"}\n{"prompt": "q", "answer": "x"}]', "a comma is missing"),
        ("\0\0\0\0\0\0\0\0 {", "(NUL bytes: the file was cut off"),
        ('{"prompt": "q", "prompt": "r", "answer": "x"}', 'the key "prompt" comes twice'),
        ("prompt: q", "(a sample begins with {)"),
        ('{"prompt": "q", "answer": "x", "id": ' + "9" * 5000 + "}", "a number has thousands of digits"),
    ],
)
def test_what_is_no_json_is_named_with_its_usual_cause(write, text, words):
    assert words in refusal(write(text)), refusal(write(text))


def test_bytes_that_are_no_utf_8_are_named_with_their_line(write):
    line = json.dumps(TWO[1], ensure_ascii=False)
    message = refusal(write(json.dumps(GOOD).encode() + b"\n" + line.replace("猫", "").encode("latin-1") + b"\n"))
    assert "line 2 is not UTF-8: byte 0xE9 at column 46; save the file as UTF-8" in message
    assert "cannot be read as text" in refusal(write(json.dumps(TWO).encode("utf-16")[:-1]))


@pytest.mark.parametrize(
    "content, words",
    [
        (b"\x1f\x8b\x08\x00", "is compressed (gzip): unpack it first"),
        (b"PK\x03\x04xx", "is an archive (zip)"),
        (b"PAR1xx", "cannot be read as parquet"),
        (b"<!DOCTYPE html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS"),
    ],
)
def test_other_kinds_of_files_are_named(write, content, words):
    assert words in refusal(write(content))
    assert words in refusal(write(content, "data.other"))
    assert answers(write("image,answer\na.png,x", "data.csv")) == ["x"]


@pytest.mark.parametrize("content", ["", "\n \r\n\t", "\ufeff", "[]"])
def test_a_file_without_samples_is_said_before_a_run(write, content):
    path = write(content)
    assert read_items([path]) == []
    options = parse_options(["--train-data", str(path)], environ={})
    assert f"--train-data: {path} has no lines in it" in option_problems(options, {}, "cpu")[1][0]


@pytest.mark.parametrize("text", ["x \ud83d", "\udc00", "caf\udce9"], ids=ascii)
@pytest.mark.parametrize("key", ["prompt", "answer"])
def test_half_a_character_is_one_broken_sample_with_its_line(write, dataset, key, text):
    items = read_items(
        [write("\n".join(map(json.dumps, [{"prompt": "q", "answer": "x"}, {"prompt": "q", "answer": "x", key: text}])))]
    )
    good, bad = (dataset(*items)[number] for number in range(2))
    assert not isinstance(good, BrokenSample) and isinstance(bad, BrokenSample)
    assert bad.path.endswith("data.jsonl, line 2") and f"line 2: the {key} holds" in bad.reason
    assert bad.reason.encode() and ("0xE9" in bad.reason) == (text == "caf\udce9")


def test_an_answer_to_be_generated_is_measured_or_broken(write, dataset):
    entries = [{"prompt": "q", "answer": text} for text in ("four", "x \ud83d", "<eos>", "y" * 5_000_000)]
    data = dataset(*read_items([write("\n".join(map(json.dumps, entries)))]), with_answer=False)
    four, broken, spelled, huge = (length_of_answer(data, item) for item in data.items)
    assert (four, spelled, huge) == (4, 5, 60)
    assert broken.path.endswith("data.jsonl, line 2") and "the answer holds half a character" in broken.reason


def test_a_file_name_that_is_no_utf_8_is_one_broken_sample(tmp_path, dataset):
    folder = write_images(tmp_path / "images", ["1.png", "2.png"])
    os.rename(os.fsencode(folder / "2.png"), os.fsencode(folder) + b"/caf\xe9.png")
    good, bad = (dataset(*read_items([folder]))[number] for number in range(2))
    assert not isinstance(good, BrokenSample)
    assert bad.path.encode() and "holds byte 0xE9, which is no UTF-8" in bad.reason and "caf\\udce9.png" in bad.reason


@pytest.mark.parametrize(
    "text", ["<eos>", "a<eos>b", "<b>x</b> <bos><eos>", "<unk>", "<pad><pad>", "<EOI>", "<EOI><EOI>"]
)
@pytest.mark.parametrize("with_image", [True, False])
def test_a_text_that_spells_a_special_token_stays_a_text(tmp_path, tokenizer, dataset, text, with_image):
    image = write_images(tmp_path, ["a.png"]) / "a.png" if with_image else None
    sample = dataset(Item(image, text, text))[0]
    letters = [ord(character) - ord(" ") + 4 for character in text]
    assert sample.input_ids[~sample.image_embed_mask.bool()].tolist() == [1, *letters, *letters, 2]
    asked = dataset(Item(image, text, text), with_answer=False)[0]
    assert asked.input_ids[~asked.image_embed_mask.bool()].tolist() == [1, *letters]


def test_a_special_token_is_meant_where_the_user_says_so(dataset):
    sample = dataset(Item(None, "a<eos>b", "q"), special_tokens=True)[0]
    assert sample.input_ids.tolist() == [1, 85, 69, 2, 70, 2]


def test_texts_without_special_tokens_have_the_ids_they_had(tokenizer):
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        codes = torch.randint(32, 200, (30,), generator=generator).tolist()
        text = "".join(map(chr, codes))
        assert text_tokens(tokenizer, text) == tokenizer.encode(text, add_special_tokens=False)


def test_so_it_is_with_a_tokenizer_like_that_of_vicuna():
    fast = sentence_piece_tokenizer()
    generator = torch.Generator().manual_seed(1)
    for _ in range(300):
        first, length = torch.randint(0, len(TEXT) - 60, (2,), generator=generator).tolist()
        part = TEXT[first : first + 1 + length % 60] + "é猫 "
        assert text_tokens(fast, part) == fast.encode(part, add_special_tokens=False)
    for part in ("<s>old</s> new", "</s>", "</s></s>", "a <unk> b"):
        ids = text_tokens(fast, part)
        assert fast.decode(ids, skip_special_tokens=True) == " " + part and not {0, 1, 2} & {*ids}
        assert {0, 1, 2} & {*text_tokens(fast, part, special_tokens=True)}


def test_a_special_token_that_its_letters_make_again_is_cut_apart():
    """A vocabulary whose merges make `</s>` of its letters, with the id that ends a text."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate(["<unk>", "<s>", "</s>", *"</s>ab", "</", "s>"][:3])}
    for token in (*"</s>ab", "</", "</s"):
        vocabulary.setdefault(token, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocabulary, [("<", "/"), ("</", "s"), ("</s", ">")], unk_token="<unk>"))
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    names = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    assert fast.encode("a</s>b", add_special_tokens=False, split_special_tokens=True)[1] == 2
    tokens = fast.convert_ids_to_tokens(text_tokens(fast, "a</s>b</s>"))
    assert tokens == ["a", "<", "/", "s", ">", "b", "<", "/", "s", ">"]


@pytest.mark.parametrize(
    "image, words",
    [
        ("http://x.org/a.png", "nothing is fetched"),
        ("s3://bucket/a.png", "nothing is fetched"),
        ("file:///data/a.png", "give the path alone"),
        ("data:image/png;base64,AAAAA", "base64 that cannot be decoded"),
        ("C:\\data\\a.png", "is a path of Windows"),
        ("D:/a.png", "is a path of Windows"),
        ("\\\\server\\a.png", "is a path of Windows"),
        ("~/a.png", "~ is the shell's"),
        ("a\0.png", "holds a NUL"),
        ("a" * 300 + ".png", "is no path, 304 characters: aaa"),
        ("a/" * 3000 + "b.png", "is no path, 6005 characters: a/a"),
        ("猫" * 100 + ".png", "is no path, 104 characters: 猫"),
        ("../a.png", "leaves the folder of the file"),
        ("sub/../../a.png", "leaves the folder of the file"),
    ],
)
def test_an_image_path_that_cannot_be_meant_is_named_with_its_line(write, image, words):
    message = refusal(write("\n".join(map(json.dumps, [GOOD, {**GOOD, "image": image}]))))
    assert "line 2: " in message and words in message


def test_a_path_out_of_the_folder_is_read_where_the_user_names_its_folder(tmp_path):
    write_images(tmp_path / "images", ["a.png"])
    path = tmp_path / "lists" / "data.jsonl"
    path.parent.mkdir()
    path.write_text(json.dumps({**GOOD, "image": "../images/a.png"}))
    assert f"--images-from {tmp_path / 'images'} allows it" in refusal(path)
    assert "leaves the folder" in refusal(path, images_from=[tmp_path / "image"])
    assert answers(path, images_from=[tmp_path / "images"]) == ["x"]
    path.write_text(json.dumps({**GOOD, "image": str(tmp_path / "images" / "a.png")}))  # written for this machine
    assert answers(path) == ["x"]


@pytest.mark.parametrize(
    "image, hint",
    [
        ("A.PNG", "its folder has 'a.png'"),
        ("a.png ", "its folder has 'a.png'"),
        ("my%20photo.png", "its folder has 'my photo.png'"),
        ("cafe\u0301.png", "its folder has 'café.png'"),
        ("my_photo.png", "did you mean 'my photo.png'?"),
        ("imgs/a.png", "there is no folder "),
    ],
)
def test_an_image_that_is_not_there_comes_with_the_nearest_that_is(tmp_path, write, dataset, image, hint):
    write_images(tmp_path, ["a.png", "my photo.png", "café.png"])
    sample = dataset(*read_items([write(json.dumps({**GOOD, "image": image}))]))[0]
    assert isinstance(sample, BrokenSample)
    assert hint in sample.reason and "data.jsonl, line 1)" in sample.reason


def test_backslashes_are_read_as_windows_means_them(tmp_path, write, dataset):
    write_images(tmp_path / "sub", ["a.png"])
    (item,) = read_items([write(json.dumps({**GOOD, "image": "sub\\a.png"}))])
    assert item.image == tmp_path / "sub" / "a.png"
    (tmp_path / "sub\\a.png").touch()  # here a name like any other
    (item,) = read_items([write(json.dumps({**GOOD, "image": "sub\\a.png"}))])
    assert item.image == tmp_path / "sub\\a.png"


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"a":' * 100_000, '{"prompt": "q", "answer": "x", "meta": ' + "[" * 5000 + "]" * 5000 + "}"],
)
def test_deep_json_is_one_line_at_fault(write, text):
    started = time.monotonic()
    assert "nested deeper than" in refusal(write(text))
    assert time.monotonic() - started < 5


def test_a_line_and_an_array_have_a_limit_and_the_next_line_is_read(write, monkeypatch):
    monkeypatch.setattr("sat_lora.data.item_files.LINE_LIMIT", 100)
    monkeypatch.setattr("sat_lora.data.item_files.WHOLE_LIMIT", 100)
    long = json.dumps({**GOOD, "answer": "x" * 500})
    message = refusal(write("\n".join([json.dumps(GOOD), long, "{", json.dumps(GOOD), long])))
    assert "3 lines cannot be used" in message and "line 2 has more than" in message
    assert "the same in 1 more: 5" in message and "line 3 is not JSON" in message
    assert "one array of more than" in refusal(write(json.dumps([GOOD] * 9)))


@pytest.mark.parametrize("kind", ["pipe", "device", "loop", "nothing"])
def test_what_is_no_file_is_never_waited_for(tmp_path, kind):
    path = tmp_path / "data.jsonl"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind != "nothing":
        path.symlink_to("/dev/zero" if kind == "device" else path)
    started = time.monotonic()
    assert str(path) in refusal(path)
    assert time.monotonic() - started < 5
