"""Kind 3: a key that is not known is an error with the nearest known name; no other layout is trained by accident."""

import json

import pytest

from sat_lora.data.records.record import RecordOptions
from sat_lora.data.samples import BrokenSample, DataCounts, read_items
from sat_lora.data.shards.shards import find_records
from sat_lora.errors import DataError
from sat_lora.training.preflight import option_problems
from tests.support.configs import parse_options
from tests.support.picture_files import write_images
from tests.support.tar_shards import png, write_shard

GOOD = {"image": "a.png", "prompt": "q", "answer": "x"}


@pytest.fixture
def refused(tmp_path):
    def refused(*entries, **settings) -> str:
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        with pytest.raises(DataError) as error:
            read_items([path], **settings)
        assert str(error.value).startswith(f"{path}: ")
        return str(error.value)

    return refused


def without(name, **more):
    return {**{key: value for key, value in GOOD.items() if key != name}, **more}


@pytest.mark.parametrize(
    "entry, key, meant",
    [
        (without("prompt", promt="q"), "promt", "prompt"),
        (without("prompt", qustion="q"), "qustion", "prompt"),
        (without("image", image_pth="a.png"), "image_pth", "image"),
        (without("answer", anser="x"), "anser", "answer"),
        (without("answer", respones="x"), "respones", "answer"),
    ],
)
def test_a_key_that_is_not_known_is_named_with_the_nearest_one(refused, entry, key, meant):
    message = refused(GOOD, entry, GOOD, entry)
    assert f'line 2: the key "{key}" is not known, did you mean "{meant}"?' in message
    assert 'wanted {"image": ..., "prompt": ..., "answer": ...}' in message
    assert "the same in 1 more: 4" in message and "2 lines cannot be used" in message


@pytest.mark.parametrize(
    "entry",
    [
        without("prompt", instruction="q"),
        without("prompt", Prompt="q"),
        without("prompt", input="q"),
        without("prompt", question="q", question_id=3),
        without("prompt", query="q"),
        without("image", file_name="a.png"),
        without("image", Image="a.png"),
        without("image", images=["a.png"]),
        without("image", image_path="a.png"),
        without("answer", caption="x"),
        without("answer", response="x"),
        without("answer", label="x"),
        without("answer", **{"answer ": "x"}),
        {"img": "a.png", "question": "q", "multiple_choice_answer": "x"},
        {"image": "a.png", "instruction": "q", "input": "", "output": "x"},
        {"query": "<image>\nq", "response": "x", "history": [], "images": ["a.png"]},
    ],
)
def test_what_others_call_our_keys_is_read_where_it_can_mean_nothing_else(tmp_path, entry):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(entry))
    (item,) = read_items([path])
    assert (item.image, item.prompt, item.answer) == (tmp_path / "a.png", "q", "x")


@pytest.mark.parametrize(
    "entry, name, keys",
    [
        (without("prompt", question="q", query="r"), "prompt", '"question" or "query"'),
        (without("answer", response="x", label="y"), "answer", '"response" or "label"'),
        (without("image", img="a.png", file_name="b.png"), "image", '"img" or "file_name"'),
    ],
)
def test_two_keys_that_may_be_meant_are_asked_about(refused, tmp_path, entry, name, keys):
    assert f"{name} may be {keys}: --columns {name}=KEY says which" in refused(entry)
    chosen = keys.split('"')[1]
    other = keys.split('"')[3]
    (item,) = read_items([tmp_path / "data.jsonl"], columns=[f"{name}={chosen}"], ignore_keys=[other])
    assert (item.image, item.prompt, item.answer) == (tmp_path / "a.png", "q", "x")


@pytest.mark.parametrize(
    "entry, whose",
    [
        ({"images": [], "annotations": []}, "COCO"),
        ({**GOOD, "annotations": [{"result": []}]}, "Label Studio"),
        ({"image": "a.png", "question": "q", "qas": []}, "Visual Genome"),
    ],
)
def test_the_layouts_of_others_are_named(refused, entry, whose):
    message = refused(entry)
    assert "such keys are those of " + whose in message and "--ignore-keys" not in message


def test_keys_that_carry_nothing_to_learn_are_passed_over_and_counted(tmp_path):
    path = tmp_path / "data.jsonl"
    entries = [{**GOOD, "id": 7, "source": "web", "_made": "by hand"}, {**GOOD, "id": 8, "score": 0.5}, GOOD]
    path.write_text("\n".join(map(json.dumps, entries)))
    counts = DataCounts()
    assert len(read_items([path], counts=counts)) == 3
    assert counts.passed_over == {"id": 2, "source": 1, "_made": 1, "score": 1}
    assert ('times "id" (not read)', 2) in counts.left_out()


def test_other_keys_are_passed_over_where_the_user_says_so(refused, tmp_path):
    assert "--ignore-keys weight passes over" in refused({**GOOD, "weight": 2})
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({**GOOD, "weight": 2}))
    assert len(read_items([path], ignore_keys=["weight"])) == 1
    options = parse_options(["--ignore-keys", "weight", "--train-data", str(path)], environ={})
    write_images(tmp_path, ["a.png"])
    assert option_problems(options, {}, "cpu") == ([], [])


@pytest.mark.parametrize(
    "more",
    [
        *({"image_id": "000123"}, {"id": "a.png"}, {"source": "photos/a.JPEG"}, {"meta": {"image": "a"}}),
        *({"extra": ["a.png"]}, {"metadata": {"files": [{"path": "x/a.webp"}]}}, {"_image": "a"}),
    ],
)
def test_no_sample_is_text_alone_because_its_image_has_another_name(refused, more):
    assert f'the key "{next(iter(more))}" is not known' in refused(without("image", **more))


@pytest.mark.parametrize(
    "more",
    [
        *({"_prompt": "Name it."}, {"_question": "Name it."}, {"comment": "What is it?"}, {"task": "Read the text."}),
        *({"note": "这是什么？"}, {"title_": "x", "info": "Who is this? "}),
    ],
)
def test_no_sample_is_asked_another_question_because_its_own_has_another_name(refused, more):
    assert f'the key "{next(iter(more))}" is not known' in refused(without("prompt", **more))


def test_why_a_note_is_not_passed_over_is_said(refused):
    message = refused(without("prompt", comment="What is it?"))
    assert 'the key "comment" is not known where there is no prompt: it seems to hold one' in message
    assert "--ignore-keys comment passes over" in message
    message = refused(without("image", meta={"path": "a.png"}))
    assert 'the key "meta" is not known where there is no image: it seems to hold one' in message


def test_what_is_noted_beside_a_prompt_is_no_question(tmp_path):
    path = tmp_path / "data.jsonl"
    entries = [{**GOOD, "comment": "sure?", "_prompt": "draft", "meta": {"image": "a"}}, without("prompt", task="vqa")]
    path.write_text("\n".join(map(json.dumps, entries)))
    assert len(read_items([path])) == 2


@pytest.mark.parametrize(
    "entry, words",
    [
        ({**GOOD, "answer": 42}, '"answer" is the number 42, wanted a text in quotes'),
        ({**GOOD, "answer": True}, '"answer" is true'),
        ({**GOOD, "answer": None}, '"answer" is null'),
        ({**GOOD, "answer": ""}, '"answer" is empty; wanted {"image": ...'),
        (without("answer", response=" "), '"answer" is empty'),
        ({**GOOD, "history": [["q", "a"], ["q", ""]]}, "answer 2 of its turns is empty"),
        ({**GOOD, "history": [["q", "a"]], "unlearnt": [1]}, '"unlearnt" is no list of places in "history"'),
        ({**GOOD, "history": [["q", "a"]], "unlearnt": [True]}, '"unlearnt" is no list of places in "history"'),
        ({"prompt": "", "answer": "x"}, 'neither "image" nor "prompt" is there'),
        ({**GOOD, "answer": float("nan")}, '"answer" is the number nan'),
        ({**GOOD, "answer": ["x"]}, '"answer" is a list'),
        (
            {**GOOD, "image": ["a.png", "b.png"]},
            "2 images, and the base takes one; leave the others out, or give --images-per-sample 2",
        ),
        ({**GOOD, "image": ""}, '"image" is empty; leave it out, or give null'),
        ({**GOOD, "image": False}, '"image" is false'),
        ({**GOOD, "prompt": {"text": "q"}}, '"prompt" is an object'),
        (without("answer"), '"answer" is missing; wanted {"image": ...'),
        ({"answer": "x"}, 'neither "image" nor "prompt" is there'),
        ([GOOD], "got a list"),
        ("x", 'got a text: "x"'),
    ],
)
def test_a_value_of_another_type_is_named_with_its_line(refused, entry, words):
    message = refused(GOOD, GOOD, entry)
    assert "line 3: " in message and words in message


def test_what_a_sample_lacks_is_counted(tmp_path):
    path = tmp_path / "data.jsonl"
    entries = [GOOD, without("prompt"), {**GOOD, "image": None}, without("image"), {**GOOD, "prompt": " "}]
    path.write_text("\n".join(map(json.dumps, entries)))
    counts = DataCounts()
    read_items([path, write_images(tmp_path / "images", ["1.png", "2.png"])], counts=counts)
    assert (counts.labelled_by_name, counts.labelled_by_text, counts.text_only) == (2, 5, 2)
    assert counts.without_prompt == {str(path): 2}
    lacking = [("images (samples of text alone)", 2), ("prompts (--prompt is asked)", 2)]
    assert counts.left_out() == lacking


@pytest.mark.parametrize(
    "text, name",
    [
        ("labels_zh/000.json", "labels_zh/000.json"),
        ("labels/other name.txt", "labels/other name.txt"),
        ("Annotations/000.xml", "Annotations/000.xml"),
        ("captions/all.txt", "captions/all.txt"),
        ("images/*.txt", "images/000.txt"),
        ("texts beside/*.caption", "texts beside/000.caption"),
        ("images/*.png.json", "images/000.png.json"),
        ("metadata.jsonl", "metadata.jsonl lists its images"),
        ("labels.csv", "labels.csv lists its images"),
        ("annotations.json", "annotations.json lists its images"),
        ("images/*.gt.txt", "images/000.gt.txt"),
        ("images/*.md", "images/000.md"),
        ("beside/*.lab", "beside/000.lab"),
    ],
)
def test_a_folder_whose_texts_are_the_answers_is_not_trained_on_file_names(tmp_path, text, name):
    images = write_images(tmp_path / "images", [f"{number:03}.png" for number in range(8)])
    for path in sorted(images.glob("*.png")) if "*" in text else [tmp_path / "x"]:
        where = tmp_path / text.replace("*", path.stem)
        where.parent.mkdir(exist_ok=True)
        listed = "\n".join(f"images/{one.name},a cat" for one in sorted(images.glob("*.png")))
        where.write_text(listed if "/" not in text else "a cat")
    with pytest.raises(DataError, match="is laid out in another way: .*file names would be learnt") as error:
        read_items([tmp_path])
    assert name in str(error.value)


@pytest.mark.parametrize("name", ["labels.xlsx", "metadata.parquet", "Captions_en.yaml", "labels.csv"])
def test_a_table_of_answers_beside_images_is_known_by_its_name(tmp_path, name):
    write_images(tmp_path / "images", [f"{number:03}.png" for number in range(8)])
    (tmp_path / name).write_text("id,label\n000,a cat\n")
    with pytest.raises(DataError, match=f"{name} looks like the answers"):
        read_items([tmp_path])


@pytest.mark.parametrize("text", ["README.txt", "notes/todo.json", "LICENSE", ".hidden/000.txt", "000.md", "list.txt"])
def test_other_texts_in_a_folder_of_images_are_no_layout(tmp_path, text):
    write_images(tmp_path, [f"{number:03}.png" for number in range(8)])
    (tmp_path / text).parent.mkdir(exist_ok=True)
    (tmp_path / text).write_text("Names are answers: 000.png shows 000.")
    assert len(read_items([tmp_path])) == 8


def test_the_json_of_a_shard_is_read_by_the_same_rules(tmp_path):
    contents = [
        {"question": "q", "answer": "x"},
        {"prompt": "q", "answer": "x", "url": "http://x", "width": 3, "sha256": "0", "image": "a.png"},
        {"prompt": "q", "answer": "x", "weight": 1},
    ]
    members = [(f"{n}.{k}", v) for n, c in enumerate(contents) for k, v in (("png", png()), ("json", json.dumps(c)))]
    members.append(("9.json", json.dumps({"prompt": "q", "answer": "x", "image": "a.png"})))
    shard = write_shard(tmp_path / "s.tar", *members)
    records = list(find_records(str(shard)))
    question, good, weight, imageless = (record.read() for record in records)
    assert (question.prompt, question.answer) == ("q", "x")
    assert (good.prompt, good.answer) == ("q", "x")
    assert isinstance(weight, BrokenSample)
    assert [*find_records(str(shard))][2].read(options=RecordOptions(ignored=["weight"])).answer == "x"
    assert "its json names an image, 'a.png', but none lies beside it" in imageless.reason


@pytest.mark.parametrize(
    "line, said",
    [
        ('{"0": {"image": "a.png", "answer": "x"}}', 'the key "0" is not known; wanted'),
        ('"image","prompt","answer"', "(a sample begins with {)"),
        ('{"image":\u00a0"a.png", "answer": "x"}', "(U+00A0 is no space of JSON)"),
        ('{"prompt": "q", "answer": "x", "source": "https://x.org/a.png?s=1"}', 'the key "source" is not known'),
    ],
)
def test_what_is_said_of_a_line_fits_it(tmp_path, line, said):
    (tmp_path / "x.jsonl").write_text(line + "\n", encoding="utf-8")
    with pytest.raises(DataError) as error:
        read_items([tmp_path / "x.jsonl"])
    assert said in str(error.value)
    assert ("--ignore-keys" in str(error.value)) == ("source" in line)


def test_samples_that_come_again_by_another_path_are_said(tmp_path):
    images = write_images(tmp_path / "images", ["1.png"])
    write_images(images / "deep", ["2.png"])
    file = tmp_path / "x.jsonl"
    file.write_text('{"prompt": "q", "answer": "x"}\n')
    for paths, again in [
        ([images], 0),
        ([images, images], 2),
        ([images, images / "deep"], 1),
        ([images / "deep", images / "." / "deep", images], 2),
        ([file, file], 1),
        ([file, images], 0),
    ]:
        counts = DataCounts()
        read_items(paths, counts=counts)
        assert dict(counts.left_out()).get("samples twice (paths overlap)", 0) == again
