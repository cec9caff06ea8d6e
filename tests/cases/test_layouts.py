"""Kind 3: answers in tables, lists and texts in or beside a folder of images are known, and named for what they are."""

import json
import os

import pytest

from sat_lora.cli import main
from sat_lora.data.layouts import check_layout
from sat_lora.data.samples import read_items
from sat_lora.errors import DataError
from sat_lora.training.preflight import option_problems
from tests.support.configs import parse_options
from tests.support.scripts import load_script
from tests.support.tar_shards import png

NAMES = [f"{number:03}" for number in range(8)]
WORDS = ["cat", "dog", "cow", "hen", "pig", "fox", "owl", "bee"]
CAPTCHAS = ["7Kq2", "aB3d", "x9Yz", "Qw2e"]


def table(mark=",", names=NAMES, suffix="", head="id{}label", quote="", words=WORDS, end="\r\n") -> str:
    rows = [head.format(mark)] if head else []
    rows += [f"{quote}{name}{suffix}{quote}{mark}{quote}{word}{quote}" for name, word in zip(names, words)]
    return end.join(rows) + end


def texts(folder: str, content: str = "x", suffix=".txt", before="", names=NAMES) -> dict[str, str]:
    return {f"{folder}/{before}{name}{suffix}": content for name in names}


@pytest.fixture
def folder(tmp_path):
    """Writes images and other files, and gives the path of the images."""

    def folder(where="d/images", files=(), names=NAMES, suffix=".png"):
        for name in names:
            path = tmp_path / where / (name + suffix)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png())
        for name, content in dict(files).items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return tmp_path / where

    return folder


def refusal(path, **settings) -> str:
    with pytest.raises(DataError, match="is laid out in another way: .*file names would be learnt") as error:
        read_items([path], **settings)
    return str(error.value)


SPACED = ["a b 1", "c d 2", "e f 3"]
CHINESE = ["图一", "图二", "图三"]
FRENCH = ["été1", "nôtre", "où"]


@pytest.mark.parametrize(
    "name, content, names",
    [
        ("train.csv", table(), NAMES),
        ("labels.csv", table(suffix=".png"), NAMES),
        ("train.csv", table(";"), NAMES),
        ("train.tsv", table("\t"), NAMES),
        ("results.csv", table("|", suffix=".png"), NAMES),
        ("train.csv", b"\xff\xfe" + table("\t").encode("utf-16-le"), NAMES),
        ("labels.txt", b"\xfe\xff" + table("\t").encode("utf-16-be"), NAMES),
        ("train.csv", "\ufeff" + table(), NAMES),
        ("train.csv", table(names=CHINESE, head="图片{}标签").encode("gbk"), CHINESE),
        ("train.csv", table(";", FRENCH).encode("latin-1"), FRENCH),
        ("train.csv", table(names=[str(int(name)) for name in NAMES]), NAMES),
        ("train.csv", table(quote='"'), NAMES),
        ("train.csv", table(names=SPACED, suffix=".png"), SPACED),
        ("x.csv", table(names=CAPTCHAS, head=""), CAPTCHAS),
        ("train.csv", table(names=[f"images\\{name}" for name in NAMES], suffix=".png"), NAMES),
        ("train.csv", table(names=WORDS, words=NAMES, head="label{}image"), NAMES),
        ("train.csv", "sep=;\n" + table(";"), NAMES),
        ("train.csv", "# made by hand\n" + table(), NAMES),
        ("train.csv", table(words=['"two\nlines; and, marks"'] * 8), NAMES),
        ("train.csv", ",id,label\n" + "".join(f"{n},{name},x\n" for n, name in enumerate(NAMES)), NAMES),
        ("gt.txt", table(" ", suffix=".png", head="", end="\n"), NAMES),
        ("gt.txt", table(" ", head="", end="\n"), NAMES),
        ("rec_gt_train.txt", table("\t", [f"images/{name}" for name in NAMES], ".png", ""), NAMES),
        ("answers.yaml", table(": ", head="", end="\n"), NAMES),
        ("captions.json", json.dumps(dict(zip(NAMES, WORDS))), NAMES),
        ("captions.json", json.dumps([{"id": name, "caption": "x"} for name in NAMES]), NAMES),
        ("project-1.json", json.dumps([{"data": {"image": f"/data/upload/1/8a7b6c5d-{n}.png"}} for n in NAMES]), NAMES),
        ("list.xml", "".join(f"<image><name>{name}</name></image>" for name in NAMES), NAMES),
        ("train.jsonl", "\n".join(json.dumps({"image": f"images/{n}.png", "answer": "x"}) for n in NAMES), NAMES),
        ("labels.xlsx", b"PK\x03\x04", NAMES),
        ("metadata.parquet", b"PAR1", NAMES),
    ],
)
def test_a_table_or_list_of_answers_is_known_in_and_beside_the_folder(folder, name, content, names):
    message = refusal(folder("d/images", {f"d/{name}": content}, names))
    assert name in message and "--names-are-answers" in message
    refusal(folder("e", {f"e/{name}": content}, names))


@pytest.mark.parametrize(
    "images, files",
    [
        ("d/images", texts("d/labels", "0 .5 .5 .1 .1")),
        ("d/images/train", texts("d/labels/train", "0 .5 .5 .1 .1")),
        ("d/train/images", texts("d/train/labels", "0 .5 .5 .1 .1")),
        ("d/images", texts("d/annotations", "{}", ".json")),
        ("d/images", texts("d/captions", suffix=".caption")),
        ("d/images", texts("d/txt")),
        ("d/images", texts("d/Beschriftung")),
        ("d/JPEGImages", texts("d/Annotations", "<annotation/>", ".xml")),
        ("d/ch4_training_images", texts("d/ch4_training_gt", before="gt_")),
        ("d/img", texts("d/ann", "{}", ".png.json")),
        ("d/train2017", {"d/annotations/x.json": json.dumps({"images": [{"file_name": f"{n}.png"} for n in NAMES]})}),
        ("d/train", {"d/train.csv": table()}),
        ("d", texts("d", before="gt_")),
        ("d", texts("d", suffix=".tags")),
        ("d/images", texts("d/labels", names=NAMES[:4])),
    ],
)
def test_texts_of_the_same_names_are_known_in_and_beside_the_folder(folder, images, files):
    assert any(name.rpartition("/")[2] in refusal(folder(images, files)) for name in files)


@pytest.mark.parametrize(
    "cats, dogs",
    [
        (NAMES, NAMES),
        ([f"cat.{number}" for number in range(5)], [f"dog.{number}" for number in range(7)]),
        (["cat", "cat (2)", "Cat_3", "cat-4", "cat5"], ["dog1", "dog02"]),
        ([f"IMG_{number:04}" for number in range(1, 6)], [f"IMG_{number:04}" for number in range(6, 15)]),
    ],
)
def test_folders_that_are_the_answers_are_known(folder, cats, dogs):
    folder("d/train/cat", names=cats)
    root = folder("d/train/dog", names=dogs).parents[1]
    assert "its images are numbered in folders (train/cat/" in refusal(root)


@pytest.mark.parametrize("names", [[*"0123456789"], CAPTCHAS, WORDS, ["0042", "9310", "0777", "1234"]])
def test_names_that_are_answers_may_lie_in_several_folders(folder, names):
    folder("d/a font", names=names)
    assert len(read_items([folder("d/another font", names=names).parent])) == 2 * len(names)


def test_a_long_table_in_chinese_is_read_at_whole_characters(folder):
    rows = "".join(f"图片{number},一只猫和一只狗 {number}\n" for number in range(9_000))
    names = [f"图片{number}" for number in range(5_000, 5_040)]
    for encoding in ("utf-8", "utf-16-le", "gb18030"):
        content = f"\ufeff编号,标签\n{rows}" if "utf" in encoding else rows
        assert "train.csv" in refusal(folder(files={"d/train.csv": content.encode(encoding)}, names=names))


def test_masks_are_no_images_to_learn(folder):
    folder("d/images")
    assert "masks/000.png looks like the mask of another image" in refusal(folder("d/masks").parent)


@pytest.mark.parametrize(
    "name, content, kind",
    [
        ("x.xml", "<annotations><image name='0'/></annotations>", "holds annotations of CVAT (XML)"),
        ("x.xml", "<annotation><filename>a</filename></annotation>", "holds annotations of Pascal VOC (XML)"),
        ("x.txt", "0 0.5 0.5 0.1 0.1\n1 0.5 0.5 0.1 0.1\n", "holds the boxes of YOLO"),
        ("x.json", '{"version": "5", "flags": {}, "shapes": [], "imagePath": "a"}', "is of LabelMe"),
        ("x.json", '[{"id": 1, "data": {}, "annotations": []}]', "is of Label Studio"),
        ("x.json", '[{"conversations": [{"from": "human"}]}]', "is of LLaVA, ShareGPT and CogVLM-SFT-311K"),
    ],
)
def test_the_format_of_the_answers_is_named(folder, name, content, kind):
    files = texts("d/labels", content, os.path.splitext(name)[1])
    assert f"({min(files).rpartition('/')[2]} {kind})" in refusal(folder("d/images", files))


@pytest.mark.parametrize(
    "names, files",
    [
        (NAMES, {"d/README.md": "000.png shows 0", "d/README.txt": "000.png shows 0"}),
        ([*"012345678"], {"d/metrics.csv": "epoch,loss\n" + "".join(f"{number},2\n" for number in range(9))}),
        (WORDS, {"d/stats.csv": "class,count\n" + "".join(f"{word},3\n" for word in WORDS)}),
        (WORDS, {"d/words.txt": "\n".join(WORDS)}),
        (CAPTCHAS, {"d/labels.csv": table(names=CAPTCHAS, suffix=".png", words=CAPTCHAS)}),
        (NAMES, {"d/other/000.png": png(), **texts("d/other")}),
        (NAMES, {"other/images/000.png": png(), **texts("other/labels")}),
        (NAMES, {"d/other/000.png": png(), "d/other.csv": table(names=[f"other/{n}" for n in NAMES], suffix=".png")}),
        (NAMES, texts("d/predictions")),
        (NAMES, {"d/files.txt": "".join(f"images/{name}.png\n" for name in NAMES)}),
        (NAMES, {"d/evaluation-2.json": json.dumps({"broken": [f"images/{n}.png" for n in NAMES[:3]]})}),
        (NAMES, {"d/run.json": "{}", "d/train.jsonl": "".join(f'{{"broken": "{n}.png"}}\n' for n in NAMES)}),
        (NAMES, {"d/a.csv": "", "d/b.csv": b"\xff\xfe", "d/c.csv": bytes(9), "d/d.json": "[", "d/e.csv": '"'}),
    ],
)  # fmt: skip
def test_what_only_looks_like_answers_is_none(folder, names, files):
    assert [item.answer for item in read_items([folder("d/images", files, names)])] == sorted(names)


def test_a_few_images_of_a_long_table_are_found_in_it(folder):
    rows = "".join(f"{number:06},word {number}\n" for number in range(60_000))
    names = [f"{number:06}" for number in range(40_000, 40_030)]
    for encoding in ("utf-8", "utf-16"):
        assert "train.csv lists its images" in refusal(
            folder(files={"d/train.csv": rows.encode(encoding)}, names=names)
        )


def test_who_insists_learns_the_names(folder):
    path = folder("d/images", {"d/labels.csv": table()})
    assert len(read_items([path], names_are_answers=True)) == 8
    options = parse_options(["--train-data", str(path), "--names-are-answers"], environ={})
    assert option_problems(options, {}, "cpu") == ([], [])


def test_a_file_that_is_given_too_is_no_table_of_the_folder(folder):
    lines = "".join(json.dumps({"image": f"images/{name}.png", "answer": "x"}) + "\n" for name in NAMES)
    path = folder("d/images", {"d/more.jsonl": lines})
    assert len(read_items([path, path.parent / "more.jsonl"])) == 16
    assert "more.jsonl lists its images; give that file" in refusal(path)


def test_a_linked_folder_is_looked_at_where_it_lies(folder, tmp_path):
    folder("d/images", texts("d/labels"))
    (tmp_path / "linked").symlink_to("d/images")
    assert "labels/000.txt" in refusal(tmp_path / "linked")


@pytest.mark.parametrize("split, samples", [("train", 8000), ("valid", 200), ("test", 500)])
def test_the_demo_s_own_images_are_samples(split, samples, tmp_path):
    """Each of its folders has most of the strings 000 to 999: numbers, but not those that count images."""
    paths = [tmp_path / path for path, _ in load_script("make_captchas").plan(split, samples, 0)]
    check_layout(tmp_path / split, paths)


@pytest.mark.parametrize(
    "files, words",
    [
        ([], "found nothing; give a folder or file that has some"),
        (["data/train-00000-of-00001.parquet"], "give its file, {folder}/data/train-00000-of-00001.parquet"),
        (["train.jsonl", "test.jsonl"], "give its files, {folder}/test.jsonl, {folder}/train.jsonl"),
        (
            ["x-0.tar", "x-1.tar", "x-2.tar", "x-3.tar"],
            "give its files, {folder}/x-0.tar, {folder}/x-1.tar, {folder}/x",
        ),
        (["train.CSV", "readme.md"], "give its file, {folder}/train.CSV"),
        (["dataset_info.json", "state.json", "data-00000.arrow"], "write it as parquet, with to_parquet"),
        (["state.json", "d.arrow"], "load_from_disk('{folder}').to_parquet('mine.parquet')\""),
        (["x.arrow"], "load_from_disk('{folder}').to_parquet('mine.parquet')\""),
        (
            ["dataset_dict.json", "train/state.json", "train/d.arrow", "test/state.json", "test/d.arrow"],
            "load_from_disk('{folder}/test').to_parquet('test.parquet')\" (so for test, train)",
        ),
        (["notes.txt", ".hidden.jsonl"], "give a folder or file that has some"),
    ],
)
def test_a_folder_without_images_says_which_of_its_files_may_be_meant(tmp_path, files, words, base_folder, capsys):
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in files:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    (problem,) = option_problems(parse_options(["--train-data", str(folder)], environ={}), {}, "cpu")[1]
    assert f"{folder} has no images" in problem and words.format(folder=folder) in problem
    assert main(["data", str(folder), "--from_pretrained", str(base_folder), "--version", "base"]) == 2
    assert words.format(folder=folder) in capsys.readouterr().err
