"""Labels and images of CogVLM-SFT-311K's folders belong together by their names; turns in cells, misnamed files."""

import json
import unicodedata

import pytest

from sat_lora.data.samples import DataCounts, read_items
from sat_lora.errors import DataError
from tests.support.layouts import roles, write_parquet
from tests.support.picture_files import write_images

TURNS = roles([("q", "a")])


def folder_of(tmp_path, images, labels):
    write_images(tmp_path / "images", images)
    (tmp_path / "labels_en").mkdir()
    for name, more in labels.items():
        (tmp_path / "labels_en" / name).write_text(json.dumps({"conversations": TURNS, **more}))
    return tmp_path


@pytest.mark.parametrize(
    "images, labels, words",
    [
        (["1.png", "2.png"], {"1.json": {"image": "2.png"}}, "1.json: \"image\" names '2.png', and the image of that"),
        (["1.png"], {"1.json": {"image": "images/2.png"}}, "rename the label, or give --ignore-keys image if"),
        (["1.png"], {"1.json": {"images": ["C:\\x\\2.png"]}}, "\"images\" names '2.png'"),
        (["1.png"], {"1.json": {"file_name": "01.png"}}, "\"file_name\" names '01.png'"),
        (["1.png"], {"1.json": {"images": ["1.png", "2.png"]}}, '"images" names 2 images, and 1 lie beside it'),
        (["1.png", "1.jpg"], {"1.json": {}}, "1.json: may be of 1.jpg or 1.png; leave one of them in images"),
        (["1.png", "1.PNG"], {"1.json": {}}, "may be of 1.PNG or 1.png"),
    ],
)
def test_a_label_that_may_be_of_another_image_is_an_error(tmp_path, images, labels, words):
    path = folder_of(tmp_path, images, labels)
    with pytest.raises(DataError) as error:
        read_items([path])
    assert words in str(error.value)
    if '"image' in words and len(images) == 1 and "2 images" not in words:
        (item,) = read_items([path], ignore_keys=["image", "images", "file_name"])
        assert item.image == path / "images" / "1.png"


@pytest.mark.parametrize(
    "more", [{"image": "1.png"}, {"image": "coco\\1.jpg"}, {"image": None}, {"images": ["x/1.png"]}]
)
def test_a_label_that_names_its_own_image_is_read(tmp_path, more):
    (item,) = read_items([folder_of(tmp_path, ["1.png"], {"1.json": more})])
    assert item.image == tmp_path / "images" / "1.png"


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC"), ("NFC", "NFC")])
def test_names_that_are_the_same_letters_pair(tmp_path, forms):
    label, image = (unicodedata.normalize(form, "Käse 가") for form in forms)
    counts = DataCounts()
    path = folder_of(tmp_path, [f"{image}.png", "other.png"], {f"{label}.json": {"image": f"{image}.png"}})
    (item,) = read_items([path], counts=counts)
    assert item.image == tmp_path / "images" / f"{image}.png" and item.image.exists()
    assert counts.unused == {"images without a label": 1}


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("d.jsonl", "image,question,answer\na.png,q,x\n", "holds a table (columns between commas), and its name says"),
        ("d.json", "image\tquestion\tanswer\na.png\tq\tx\n", "call it d.tsv, or give --data-format csv"),
        ("d.ndjson", "\ufeffconversations;image\n[];a.png\n", "call it d.csv, or give --data-format csv"),
    ],
)
def test_a_table_that_is_named_as_json_is_told_so(tmp_path, name, text, words):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as error:
        read_items([tmp_path / name])
    assert words in str(error.value)
    if "question" in text and "\t" not in text:
        assert read_items([tmp_path / name], data_format="csv")[0].answer == "x"


@pytest.mark.parametrize(
    "turns",
    [
        json.dumps(TURNS),
        json.dumps([["q", "a"]]),
        json.dumps({"role": ["user", "assistant"], "content": ["q", "a"]}),
        {"role": ["user", "assistant"], "content": ["q", "a"], "name": [None, None]},
    ],
)
@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
def test_turns_of_a_cell_are_read(tmp_path, turns, kind):
    if kind == "parquet":
        path = write_parquet(tmp_path, [{"messages": turns}])
    elif kind == "jsonl":
        path = tmp_path / "d.jsonl"
        path.write_text(json.dumps({"messages": turns}))
    else:
        path = tmp_path / "d.csv"
        cell = (turns if isinstance(turns, str) else json.dumps(turns)).replace('"', '""')
        path.write_text(f'id,messages\n1,"{cell}"\n')
    (item,) = read_items([path])
    assert (item.prompt, item.answer) == ("q", "a")


def test_an_arrow_file_of_datasets_is_told_how_to_become_parquet(tmp_path):
    path = tmp_path / "data-00000-of-00001.arrow"
    path.write_bytes(b"\xff\xff\xff\xff\x08\x01\0\0\x10\0\0\0")
    with pytest.raises(DataError, match="is an Arrow file; write it as parquet.*load_from_disk.'"):
        read_items([path])


@pytest.mark.parametrize(
    "turns, words",
    [
        ("[{'role': 'user', 'content': 'q'}]", '"messages" is a text that is no JSON: '),
        ('[{"role": "user"', "(it ends too early)"),
        ("[{" * 200, '"messages" is a text that is no JSON: '),
        ({"role": ["user"], "content": ["q", "a"]}, 'the lists in "messages" are not of one length: "role" has 1'),
        ("hello", '"messages" is a text, wanted'),
        ({"role": "user"}, '"messages" is an object, wanted'),
    ],
)
def test_a_cell_without_turns_is_named(tmp_path, turns, words):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"messages": turns}))
    with pytest.raises(DataError) as error:
        read_items([path])
    assert "line 1" in str(error.value) and words in str(error.value)
