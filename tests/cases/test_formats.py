"""Kind 3: files of other formats, given as data, are named for what they are, with what to do."""

import json

import pytest

from sat_lora.data.samples import read_items
from sat_lora.errors import DataError


def refusal(path) -> str:
    with pytest.raises(DataError) as error:
        read_items([path])
    return str(error.value)


@pytest.mark.parametrize(
    "content, whose",
    [
        ([{"id": 1, "annotations": [{"result": []}], "data": {"image": "a"}, "predictions": []}], "Label Studio"),
        ([{"image": "a", "id": 1, "label": [], "annotator": 1, "annotation_id": 5, "lead_time": 1.0}], "Label Studio"),
        ({"version": "5", "flags": {}, "shapes": [], "imagePath": "a.png", "imageData": None}, "LabelMe"),
        ({"_via_settings": {}, "_via_img_metadata": {}}, "VIA"),
        ({"a.png12": {"filename": "a.png", "size": 12, "regions": [], "file_attributes": {}}}, "VIA"),
        ({"info": {}, "images": [], "annotations": [{"caption": "x"}]}, "COCO"),
        ({"images": [], "annotations": [], "categories": []}, "COCO"),
        ({"info": {}, "annotations": [{"question_id": 1, "multiple_choice_answer": "a"}]}, "VQA"),
        ({"questions": [{"question": "q", "question_id": 1}]}, "VQA"),
        ({"dataset_name": "docvqa", "dataset_version": "1", "data": []}, "VQA"),
        ({"questions": [{"image_filename": "a.png", "question": "q"}]}, "CLEVR"),
        ([{"image": "a", "annotations": [{"label": "x", "coordinates": {}}]}], "CreateML"),
        ([{"id": 1, "regions": [{"phrase": "x"}]}], "Visual Genome"),
        ({"description": "", "tags": [], "size": {}, "objects": []}, "Supervisely"),
        ({"data_row": {}, "projects": {}}, "Labelbox"),
        ({"image": "a.png", "answer": "accept", "_input_hash": 1, "_task_hash": 2}, "Prodigy"),
        ({"file_name": "a", "ground_truth": '{"gt_parse": {}}'}, "Donut"),
    ],
)
def test_the_objects_of_other_formats_are_named(tmp_path, content, whose):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(content))
    message = refusal(path)
    assert f"such keys are those of {whose}" in message and "write a line for each" in message
    assert "--ignore-keys" not in message


@pytest.mark.parametrize(
    "name, content, kind",
    [
        ("a.xml", "<?xml version='1.0'?>\n<annotations>\n<version>1.1</version>", "holds annotations of CVAT (XML)"),
        ("a.xml", "<annotation verified='yes'>\n<folder>x</folder>", "holds annotations of Pascal VOC (XML)"),
        ("a.xml", "<PcGts xmlns='x'>", "holds a page of PAGE XML"),
        ("a.xml", "<data/>", "is XML"),
        ("a.txt", "0 0.5 0.5 0.2 0.2\n", "holds the boxes of YOLO"),
        ("a.txt", "0 0.5 0.5 0.2 0.2 0.5 0.7\n1 0 1 0 1 0 1\n", "holds the boxes of YOLO"),
        ("data.yaml", "train: images/train\nnames: [a]\n", "is YAML"),
        ("a.txt", "a.png\tx\nb.png\ty\n", "holds a table (columns between tabs)"),
        ("a.txt", "images/a.png\nimages/b.png\n", "holds a list of images"),
        ("a.xlsx", b"PK\x03\x04", "is a table of Excel"),
        ("a.xls", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "is a table or document of Microsoft Office"),
        ("a.arrow", b"ARROW1\0\0", "is an Arrow file"),
        ("data.mdb", bytes(16) + b"\xde\xc0\xef\xbe", "is an LMDB database"),
        ("a.npy", b"\x93NUMPY\1\0", "is a NumPy array"),
        ("a.h5", b"\x89HDF\r\n\x1a\n", "is an HDF5 file"),
        ("a.png", b"\x89PNG\r\n\x1a\n", "is one picture"),
        ("a.unknown", b"\1\2\3", "is a file"),
    ],
)
def test_other_files_are_named(tmp_path, name, content, kind):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    instead = (
        "write a .jsonl file with a line {"
        if kind.startswith("holds")
        else "give the folder of the images, or a .jsonl"
    )
    assert refusal(path).startswith(f"{path} {kind}; {instead}")


def test_an_object_without_other_keys_is_read_whatever_its_texts_say(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"prompt": "conversations", "answer": "annotations", "_made": "x", "source": "y"}))
    assert read_items([path])[0].answer == "annotations"


@pytest.mark.parametrize("first", ["info", "licenses", "images", "categories"])
def test_a_file_of_coco_in_one_line_of_gigabytes_is_named_by_its_begin(tmp_path, first):
    content = {"info": {}, "licenses": [{"id": 1}], "images": [{"file_name": "a"}], "categories": [{"id": 1}]}
    text = json.dumps({first: content.pop(first), **content})
    with open(tmp_path / "instances.json", "wb") as file:
        file.write(text[:-1].encode())
        file.truncate(1 << 30)
    assert f"{tmp_path}/instances.json is of COCO, a layout that is not read here: write lines" in refusal(file.name)
