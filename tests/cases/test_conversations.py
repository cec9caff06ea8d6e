"""Kind 9: conversations and images as people write them: read, or one message that says what is wrong and where."""

import json

import pytest
from PIL import Image

from sat_lora.data.records.record import IMAGE
from sat_lora.data.samples import BrokenSample, Item, read_items
from sat_lora.errors import ConfigError, DataError
from sat_lora.training.preflight import option_problems
from sat_lora.training.prepare import dataset_maker
from tests.support.configs import parse_options
from tests.support.datasets import dataset
from tests.support.layouts import encoded, llava, roles, write_parquet, write_pictures, write_sft
from tests.support.picture_files import write_images
from tests.support.tar_shards import png

TWO = [("q1", "a1"), ("q2", "a2")]
USER = {"role": "user", "content": "q"}
REPLY = {"role": "assistant", "content": "a"}


@pytest.fixture
def write(tmp_path):
    def write(*records, name="data.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return write


def refusal(path, **settings) -> str:
    with pytest.raises((DataError, ConfigError)) as error:
        read_items([path], **settings)
    return str(error.value)


@pytest.mark.parametrize(
    "turns",
    [
        roles(TWO),
        [{"from": who, "value": text} for turn in TWO for who, text in zip(("human", "gpt"), turn)],
        [{"from": who, "value": text} for turn in TWO for who, text in zip(("user", "assistant"), turn)],
        [{"role": who, "content": text} for turn in TWO for who, text in zip(("Human", "model "), turn)],
        [{"human": query, "assistant": answer} for query, answer in TWO],
        [{"user": query, "bot": answer, "source": "x"} for query, answer in TWO],
        [list(turn) for turn in TWO],
        [[who, text] for turn in TWO for who, text in zip(("user", "assistant"), turn)],
        [[who, text] for turn in TWO for who, text in zip(("Human ", "gpt"), turn)],
        [{"role": "user", "content": [{"text": "q1"}]}, *roles(TWO)[1:]],
        [{"role": "user", "content": ["q", {"type": "input_text", "text": "1"}], "name": "x"}, *roles(TWO)[1:]],
    ],
)
@pytest.mark.parametrize("key", ["messages", "conversations", "dialog"])
def test_turns_are_known_however_their_roles_are_called(write, turns, key):
    (item,) = read_items([write({key: turns, "id": 1})])
    assert (item.history, item.prompt, item.answer, item.images) == ((TWO[0],), *TWO[1], ())


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": "system", "content": "Be brief."}, *roles(TWO)]},
        {"system": "Be brief.", "conversations": roles(TWO)},
        {"system": "Be brief.", "query": "q2", "response": "a2", "history": [["q1", "a1"]]},
    ],
)
def test_a_system_text_has_no_place_and_is_left_out_by_name_alone(write, record, tmp_path):
    (item,) = read_items([write(record)])
    assert (item.system, item.history, item.prompt, item.answer) == ("Be brief.", (TWO[0],), *TWO[1])
    options = parse_options(["--train-data", str(tmp_path / "data.jsonl"), "--version", "chat"], environ={})
    (problem,) = option_problems(options, {}, "cpu")[1]
    assert "chat has no place for a system text" in problem and "--ignore-keys system leaves it out" in problem


def test_a_system_text_is_left_out_where_the_user_says_so(write):
    record = {"messages": [{"role": "system", "content": "Be brief."}, *roles(TWO)]}
    for given in (record, {"system": "Be brief.", "messages": roles(TWO)}):
        (item,) = read_items([write(given)], ignore_keys=["system"])
        assert item.system is None and item.history == (TWO[0],)


@pytest.mark.parametrize(
    "turns, words",
    [
        ([REPLY, USER], "turn 1 of \"messages\" is of the assistant, wanted the user"),
        ([USER, USER, REPLY], "turn 2 of \"messages\" is of the user, wanted the assistant"),
        ([USER, REPLY, REPLY], "turn 3 of \"messages\" is of the assistant, wanted the user"),
        ([USER, REPLY, USER], "the last turn is of the user, and nobody answers"),
        ([USER], "the last turn is of the user, and nobody answers"),
        ([USER, {"role": "system", "content": "x"}, REPLY], "turn 2 of \"messages\" is of the system"),
        ([{"role": "system", "content": "x"}], "there is no turn"),
        ([USER, {"role": "tool", "content": "a"}], "turn 2 of \"messages\" is of 'tool'; known are user"),
        ([USER, {"role": "assistant"}], "turn 2 of \"messages\" is not {\"role\": ..., \"content\": ...}"),
        ([USER, {"role": "assistant", "content": None}], "has no text in \"content\""),
        ([USER, {**REPLY, "weight": 0}], "the last answer of \"messages\" is not to be learnt (\"weight\")"),
        ([USER, {**REPLY, "loss": False}], "or give --ignore-keys loss to learn it"),
        ([USER, {**REPLY, "weight": 0.5}], "turn 2 of \"messages\" has \"weight\" 0.5: an answer is learnt (1) or not"),
        ([USER, {**REPLY, "loss": "no"}], "has \"loss\" \"no\": an answer is learnt (1) or not (0); --ignore"),
        ([USER, {**REPLY, "tool_calls": [{"id": 1}]}], "\"tool_calls\", which is not read; --ignore-keys tool_calls"),
        ([USER, {**REPLY, "content": " "}], "\"answer\" is empty"),
        ([USER, {**REPLY, "content": ""}, USER, REPLY], "answer 1 of its turns is empty"),
        ([{"human": "q", "assistant": "a", "mood": "x"}], "pair 1 of \"messages\" has \"mood\", which is not read"),
        ([{"human": "q", "assistant": "a", "system": "x"}], "pair 1 of \"messages\" has \"system\", which is not read"),
        ([USER, {"role": "assistant", "content": [{"type": "image"}]}], "of the assistant has an image"),
        ([USER, {**REPLY, "image": "a.png"}], "of the assistant has an image; images stand in turns of the user"),
        ([{"role": "user", "content": ["q"], "image": "a.png"}, REPLY], "among its parts and beside them"),
        ([{"role": "user", "content": [{"type": "input_audio"}]}, REPLY], "has a part of type 'input_audio'"),
        ([["user", "q"], ["user", "r"]], "turn 2 of \"messages\" is of the user, wanted the assistant"),
        ([["assistant", "a"], ["user", "q"]], "turn 1 of \"messages\" is of the assistant, wanted the user"),
        ([["user", "q"], ["assistant", "a"], ["user", "r"]], "the last turn is of the user, and nobody answers"),
        ([], "\"messages\" is an empty list"),
        (["q", "a"], "the turns of \"messages\" are none that are known: got a text"),
        ([{"speaker": "x", "text": "y"}], "got the keys \"speaker\", \"text\""),
        ("q", "\"messages\" is a text, wanted"),
    ],
)  # fmt: skip
def test_turns_that_make_no_conversation_are_named_with_their_line(write, turns, words):
    message = refusal(write({"messages": roles(TWO)}, {"messages": turns}))
    assert "line 2: " in message and words in message, message


@pytest.mark.parametrize(
    "record, words",
    [
        ({"messages": [USER, REPLY], "prompt": "q", "answer": "a"}, '"prompt", "answer" beside "messages"'),
        ({"messages": [USER, REPLY], "conversations": [USER, REPLY]}, "could each be the turns; --columns messages"),
        ({"messages": [USER, REPLY], "images": ["a.png"]}, "no places for images in its texts and 1 image; write"),
        ({"image": "a.png", "conversations": llava("a", TWO)["conversations"][1:]}, "is of the assistant"),
        ({"conversations": llava("a", TWO)["conversations"]}, "1 place for images in its texts and no images; name"),
        ({**llava("a", TWO), "image": ["a.png", "b.png"]}, "2 images, and the base takes one"),
        ({"image": "a.png", "prompt": "<image> and <image>?", "answer": "x"}, "2 places for images in its texts and 1"),
        ({"prompt": "What is <image>?", "answer": "x"}, "or give another --image-mark if <image> is a text like any"),
        ({"image": "a.png", "prompt": "q", "answer": "x", "history": ["q", "a"]}, '"history" is no list of [query'),
        ({"image": "a.png", "prompt": "q", "answer": "x", "system": ["s"]}, '"system" is a list'),
        ({"image": {"url": "http://x/a.png"}, "prompt": "q", "answer": "x"}, "nothing is fetched"),
        ({"image": {"bytes": None}, "prompt": "q", "answer": "x"}, 'has neither "bytes" nor "path" nor "url"'),
        ({"image": "data:image/png;base64,", "prompt": "q", "answer": "x"}, "holds no bytes"),
        ({"image": "iVBORw0KGgo" + "A" * 51, "prompt": "q", "answer": "x"}, "base64 that cannot be decoded"),
        ({"image": "a.png", "prompt": f"{IMAGE}?", "answer": "x"}, "half a character (U+DBFF)"),
    ],
)  # fmt: skip
def test_images_and_texts_that_do_not_fit_are_named_with_their_line(write, record, words):
    message = refusal(write({"prompt": "q", "answer": "a"}, record))
    assert "line 2: " in message and words in message, message


@pytest.mark.parametrize(
    "turn",
    [
        {"from": "user", "value": "Picture 1: <img>a.png</img>\nq"},
        {"from": "user", "value": "<img>a.png</img>q"},
        {"role": "user", "content": "q", "image": "a.png"},
        {"role": "user", "content": "<image>\nq", "images": ["a.png"]},
        {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "q"}]},
        {"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "image_url", "image_url": "a.png"}]},
        {"role": "user", "content": [{"type": "input_image", "image_url": {"url": "a.png"}}, "q"]},
        {"role": "user", "content": [{"image": "a.png"}, {"text": "q"}]},
    ],
)
def test_an_image_that_stands_in_a_turn_is_that_of_the_sample(write, tmp_path, turn):
    reply = {"from": "gpt", "value": "x"} if "from" in turn else {"role": "assistant", "content": "x"}
    (item,) = read_items([write({"conversations": [turn, reply]})])
    assert (item.prompt, item.answer, item.images) == ("q", "x", (tmp_path / "a.png",))


def test_an_image_of_anthropic_s_messages_is_read(write):
    source = {"type": "base64", "media_type": "image/png", "data": encoded(png())}
    (item,) = read_items([write({"messages": roles([("q", "x")], {"type": "image", "source": source})})])
    assert (item.prompt, item.image) == ("q", png())


@pytest.mark.parametrize(
    "query, prompt",
    [
        ("<image>\nq", "q"),
        ("q\n<image>", "q"),
        ("<image>q", "q"),
        ("Look at <image> now.", "Look at now."),
        ("First\n<image>\nthen", "First\nthen"),
    ],
)
def test_one_image_stands_before_all_texts(write, tokenizer, tmp_path, query, prompt):
    write_images(tmp_path, ["a.png"])
    (item,) = read_items([write({"image": "a.png", "conversations": roles([(query, "a")])})])
    assert item.prompt == prompt
    sample = dataset([item], tokenizer)[0]
    assert sample.image_embed_mask.tolist()[1:12] == [1] * 11 and sample.image_embed_mask.sum() == 11


def test_several_images_stand_where_their_marks_do(write, tokenizer, tmp_path):
    write_images(tmp_path, ["a.png", "b.png", "c.png"])
    turns = [("<image>\nThis or <image>?", "x"), ("And\n<image>\nthis?", "y")]
    path = write({"images": ["a.png", "b.png", "c.png"], "messages": roles(turns)})
    assert "3 images, and the base takes one; leave the others out, or give --images-per-sample 3" in refusal(path)
    (item,) = read_items([path], images_per_sample=3)
    sample = dataset([item], tokenizer, version="chat", max_length=200)[0]
    text = tokenizer.decode(sample.input_ids[sample.image_embed_mask == 0])
    assert text == "<bos> [INST] This or ? [/INST] x [INST] Andthis? [/INST] y<eos>"
    places = (sample.image_embed_mask - sample.vision_expert_mask).nonzero()[:, 0].tolist()
    assert places == [11, 11 + len(" [INST] This or ") + 11, places[1] + len("? [/INST] x [INST] And") + 11]
    images = [sample.image, *sample.more_images]
    assert len(images) == 3 and not images[0].equal(images[1]) and not images[1].equal(images[2])
    marked = dataset([item], tokenizer, version="chat", max_length=200, special_tokens=True)[0]
    assert marked.input_ids.tolist() == sample.input_ids.tolist()


def test_another_mark_or_none_leaves_image_a_text(write):
    record = {"image": "a.png", "prompt": "What is <image>?", "answer": "x"}
    for mark in ("", "<|pic|>"):
        assert read_items([write(record)], image_mark=mark)[0].prompt == "What is <image>?"
    picture = encoded(png())
    record = {"messages": roles([("q", "a")], {"type": "image_url", "image_url": {"url": f"data:;base64,{picture}"}})}
    assert read_items([write(record)], image_mark="")[0].image == png()


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"data_format": "sharegpt"}, "has not the keys of --data-format sharegpt"),
        ({"data_format": "parquet"}, "cannot be read as parquet"),
        ({"data_format": "images"}, "data.jsonl is a file, and --data-format images reads folders"),
        ({"columns": ["prompt=nothing"]}, 'has no "nothing", which --columns names; got "q", "image"'),
        ({"columns": ["nothing=q"]}, "--columns: got nothing=q, wanted NAME=COLUMN with a name of image, prompt"),
        ({"columns": ["prompt=q", "prompt=image"]}, "--columns: prompt is given twice, q and image"),
        ({"columns": ["prompt=q", "answer=q"]}, "the column q is given twice, as prompt and as answer; it can be one"),
        ({"columns": ["prompt=q,image=pic"]}, 'no record has "pic", which --columns image=pic names; got "q", "image"'),
        ({"columns": ["system=imag,prompt=q"]}, 'which --columns system=imag names; did you mean "image"?; give a'),
        ({"columns": ["prompt=Q"]}, 'has no "Q", which --columns names; got "q"'),
        ({"columns": ["prompt"]}, "--columns: got prompt, wanted NAME=COLUMN"),
        ({"columns": ["image=q"]}, 'has "image" beside what --columns gives that name'),
    ],
)
def test_what_is_insisted_on_and_is_not_so_is_an_error(write, settings, words):
    path = write({"q": "What?", "image": "a.png", "answer": "x"})
    message = refusal(path, **settings)
    assert words in message, message


@pytest.mark.parametrize("kind", ["table", "parquet", "labels"])
def test_a_column_that_no_record_has_is_an_error_in_each_layout(tmp_path, kind):
    if kind == "table":
        path = tmp_path / "d.csv"
        path.write_text("picture,question,answer,lang\n,q,x,\n")
    elif kind == "parquet":
        path = write_parquet(tmp_path, [{"picture": None, "question": "q", "answer": "x", "lang": None}])
    else:
        path = write_sft(tmp_path, [("a", TWO)])
        (path / "labels_en" / "a.json").write_text(json.dumps({"conversations": roles(TWO), "lang": "en"}))
    assert f"{path}" in refusal(path, columns=["system=langs"])
    assert 'no record has "langs"' in refusal(path, columns=["system=langs"])
    assert 'names; did you mean "lang"?' in refusal(path, columns=["system=langs"])
    assert len(read_items([path], columns=["system=lang"])) == 1


def test_columns_are_mapped(write):
    path = write({"problem": "What?", "solution": "x", "pic": "a.png"})
    (item,) = read_items([path], columns=["prompt=problem,answer=solution", "image=pic"])
    assert (item.prompt, item.answer, item.image) == ("What?", "x", path.parent / "a.png")


def test_a_table_with_other_rows_is_named(tmp_path):
    path = tmp_path / "data.csv"
    for text, words in [
        (
            "image,answer\na.png,x,y\n",
            "row 2 has 3 cells and the first 2; a text with a separator in it stands in quotes",
        ),
        ("image,answer\na.png\n", "row 2 has 1 cells and the first 2"),
        ("image,image,answer\na,b,c\n", 'the first row has "image" twice'),
        ("bild,antwort\na.png,x\n", 'no name of a column that is known; wanted "image", "prompt", "answer"'),
        ("image,answer\na.png,\n", '1 row cannot be used:\n  row 2: "answer" is missing'),
        ('image,answer\na.png,"x\n', "cannot be read"),
        (b"image,answer\na.png,caf\xe9\n", "save it as UTF-8"),
    ]:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        message = refusal(path)
        assert words in message, message
    path.write_text("bild,antwort\na.png,x\n")
    assert read_items([path], columns=["image=bild", "answer=antwort"])[0].answer == "x"


def test_labels_and_images_of_a_folder_belong_together(tmp_path, tokenizer):
    samples = [("a", TWO), ("b", [("q", "a")])]
    folder = write_sft(tmp_path, samples)
    assert [len(item.history) for item in read_items([folder])] == [1, 0]
    assert read_items([folder / "labels_en"]) == read_items([folder])
    (folder / "labels_en").rename(folder / "labels")
    (folder / "labels_zh").mkdir()
    (folder / "labels_zh" / "a.json").write_text(json.dumps({"captions": [{"role": "caption", "content": "猫"}]}))
    assert f"{folder} has labels and labels_zh; give the one to learn, such as" in refusal(folder)
    (caption,) = read_items([folder / "labels_zh"])
    assert (caption.prompt, caption.answer, caption.image) == (None, "猫", folder / "images" / "a.png")
    (folder / "images" / "b.png").unlink()
    broken = dataset(read_items([folder / "labels"]), tokenizer, version="chat", max_length=200)[1]
    assert isinstance(broken, BrokenSample) and "images/b.jpg" in broken.reason and "b.json" in broken.reason
    (folder / "labels" / "b.json").write_text('{"conversations": []}')
    (folder / "labels" / "c.json").write_text("{,}")
    message = refusal(folder / "labels")
    assert "b.json" in message and "is an empty list" in message and "c.json" in message


def test_a_folder_of_such_folders_is_read_whole(tmp_path):
    all_sets = tmp_path / "all"
    all_sets.mkdir()
    for name, samples in (("single", [("a", [("q", "a1")])]), ("multi", [("a", TWO)])):
        (tmp_path / name).mkdir()
        write_sft(tmp_path / name, samples)
        (tmp_path / name / "sft").rename(all_sets / name)
    items = read_items([tmp_path / "all"])
    assert [item.answer for item in items] == ["a2", "a1"]
    (tmp_path / "all" / "other").mkdir()
    write_images(tmp_path / "all" / "other", ["x.png"])
    assert "is laid out in another way" in refusal(tmp_path / "all")


def test_excel_s_own_first_line_is_no_header(tmp_path):
    path = tmp_path / "data.csv"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_text('sep=;\nimage;prompt;answer\n\na.png;q;"x; ""y""\nz"\n', encoding=encoding)
        (item,) = read_items([path])
        assert (item.answer, item.line) == ('x; "y"\nz', "row 4")


def test_a_template_without_turns_is_said_before_the_run(write, tmp_path):
    write_pictures(tmp_path, [("a", TWO)])
    path = write(llava("a", TWO))
    options = parse_options(["--train-data", str(path), "--version", "base"], environ={})
    (problem,) = option_problems(options, {}, "cpu")[1]
    assert "base has no place for the turns before the last of a conversation; give one of chat, vqa" in problem
    options = parse_options(["--train-data", str(path), "--version", "chat"], environ={})
    assert option_problems(options, {}, "cpu") == ([], [])


def boxed(**changes):
    record = {
        "image": "a.png",
        "prompt": "Where is the dog <box>?",
        "answer": "At <box>.",
        "boxes": [[0, 0, 0.5, 1], [0.1, 0.1, 0.2, 0.2]],
    }
    return {**record, **changes}


@pytest.mark.parametrize(
    "changes, prompt, answer",
    [
        ({}, "Where is the dog [[000,000,500,999]]?", "At [[100,100,200,200]]."),
        ({"boxes": [[0, 0, 21, 42], [[1, 1, 3, 5], [1, 1, 2, 2]]]}, None, "At [[047,023,142,119;047,023,095,047]]."),
        ({"prompt": "Where?", "boxes": [[0.5, 0.5, 1, 1]]}, "Where?", "At [[500,500,999,999]]."),
        ({"answer": "<box>", "history": [["<box>", "a"]], "boxes": [[0, 0, 1, 1]] * 3}, None, "[[000,000,999,999]]"),
        ({"boxes": None, "prompt": "q"}, "q", "At <box>."),
    ],
)  # fmt: skip
def test_boxes_stand_where_their_marks_are(write, tmp_path, changes, prompt, answer):
    Image.new("RGB", (21, 42)).save(tmp_path / "a.png")
    (item,) = read_items([write(boxed(**changes))])
    assert item.answer == answer and prompt in (None, item.prompt)


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"boxes": [[0, 0, 22, 5], [0, 0, 1, 1]]},
            "the box [0, 0, 22, 5] lies outside of the picture of 21 x 42 pixels",
        ),
        ({"boxes": [[0, 0, -1, 5], [0, 0, 1, 1]]}, "lies outside of the picture of 21 x 42 pixels"),
        ({"boxes": [[5, 5, 5, 6], [0, 0, 1, 1]]}, "is empty; wanted left < right"),
        ({"boxes": [[0, 0, 1], [0, 0, 1, 1]]}, "is none of four numbers"),
        ({"boxes": [["0", 0, 1, 1], [0, 0, 1, 1]]}, 'number 1, ["0", 0, 1, 1], is none of four numbers'),
        ({"boxes": [[0, 0, 1, 1], [0, 0, None, 1]]}, "number 2, [0, 0, null, 1], is none of four numbers"),
        ({"boxes": [[0, 0, 1, 1], [[0, 0, 1, 1], 0]]}, "number 2, [[0, 0, 1, 1], 0], is none of four numbers"),
        ({"boxes": [[[[0, 0, 1, 1]]], [0, 0, 1, 1]]}, "is none of four numbers"),
        ({"boxes": [[0, 0, 10**400, 1], [0, 0, 1, 1]]}, "lies outside of the picture of 21 x 42 pixels"),
        ({"boxes": [[0, 0, 1.2, 1], [0, 0, 1, 1]]}, "has less than 2 pixels, and not all numbers"),
        ({"boxes": [[5, 5, 9, 9], [0.1, 0.1, 0.5, 0.5]]}, "the box [0.1, 0.1, 0.5, 0.5] has less than 2 pixels"),
        ({"boxes": []}, '"boxes" is empty, and <box> stands in its texts'),
        ({"boxes": [[0, 0, 1, 1]]}, '2 times <box> in its texts, and 1 in "boxes"'),
        ({"boxes": [0, 0, 1, 1]}, '"boxes" is no list of [left, top, right, bottom]'),
        ({"image": None}, '"boxes" without an image'),
        ({"image": "none.png", "boxes": [[0, 0, 9, 9]] * 2}, "its image cannot be read: No such file"),
    ],
)
def test_a_box_that_is_none_or_outside_of_its_picture_is_named_with_its_line(write, tmp_path, changes, words):
    Image.new("RGB", (21, 42)).save(tmp_path / "a.png")
    message = refusal(write(boxed(), boxed(**changes)))
    assert "line 2: " in message and words in message, message


@pytest.mark.parametrize("path", ["data.jsonl", "images"])
def test_tar_alone_is_no_file_and_no_folder(write, tmp_path, path):
    write({"prompt": "q", "answer": "a"})
    write_images(tmp_path / "images", ["1.png"])
    assert f"{path} is no .tar, and --data-format tar reads those alone" in refusal(tmp_path / path, data_format="tar")


@pytest.mark.parametrize("loss_on, learnt", [("all", "4<eos>7<eos>2<eos>"), ("last", "2<eos>")])
def test_the_loss_is_on_every_answer_or_on_the_last(base_folder, loss_on, learnt):
    options = ["--from_pretrained", str(base_folder), "--version", "chat", "--max_length", "90", "--loss-on", loss_on]
    config = parse_options([*options, "--train-data", "x"], environ={})
    data = dataset_maker(config.model, config.data, {"eva_args": {"image_size": [21, 21]}, "image_length": 9})
    item = Item(None, "2", "c?", history=(("a?", "4"), ("b?", "7")))
    sample = data([item])[0]
    assert data([]).tokenizer.decode(sample.labels[sample.labels != -100]) == learnt
