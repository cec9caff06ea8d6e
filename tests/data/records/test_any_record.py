"""Whatever an object, a table or a parquet file holds, it is read, or it is one DataError."""

import json
import pickle
import random

import pyarrow
import pytest
from pyarrow import parquet

from sat_lora.data.readers.parquet_files import ParquetImage
from sat_lora.data.records.registry import RECORDS
from sat_lora.data.samples import Item, read_items
from sat_lora.errors import DataError
from tests.support.layouts import SEVERAL, llava, ours, roles, write_csv, write_parquet, write_parquet_bytes
from tests.support.tar_shards import png

TURNS = [("q1", "a1"), ("q2", "a2")]
SEEDS = [
    ours("a", TURNS, "a.png"),
    llava("a", TURNS),
    {"messages": roles(TURNS, {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}})},
    {"image": "a.png", "captions": [{"role": "caption", "content": "x"}]},
    {"instruction": "q", "input": "", "output": "x"},
    {"conversation": [{"human": "q", "assistant": "a"}], "image": {"bytes": "AAAA", "path": None}},
    {"image": "a.png", "prompt": "<box>", "answer": "<box>", "boxes": [[0, 0, 1, 1], [[0, 0, 1, 1]]]},
    {"messages": [{**turn, "weight": n // 2, "tool_calls": []} for n, turn in enumerate(roles(TURNS))], "tools": None},
    {"messages": json.dumps(roles(TURNS)), "answers": ["a", {"answer": "b"}]},
    {"conversations": {"from": ["human", "gpt"], "value": ["<img>a.png</img>q", "a"]}},
    {"prompt": "q", "answer": "a", "history": [["b", "c"]], "unlearnt": [0]},
]
VALUES = [
    None,
    True,
    0,
    -1.5,
    "",
    "x",
    "<image>",
    "\udbff",
    "\0",
    "../a.png",
    [],
    [[]],
    {},
    {"a": {}},
    ["q", "a"],
    [None],
]


def places(value, path=()):
    """Where a value may be replaced: the keys and indices that lead there."""
    yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield from places(inner, (*path, key))


def changed(record, generator: random.Random):
    """A copy with one value replaced, taken away, doubled or renamed."""
    record = json.loads(json.dumps(record))
    path = generator.choice([*places(record)][1:] or [()])
    if not path:
        return generator.choice(VALUES)
    parent = record
    for key in path[:-1]:
        parent = parent[key]
    kind = generator.randrange(4)
    if kind == 0:
        parent[path[-1]] = generator.choice(VALUES)
    elif kind == 1:
        del parent[path[-1]]
    elif kind == 2 and isinstance(parent, list):
        parent.append(parent[path[-1]])
    elif isinstance(parent, dict):
        parent[generator.choice(["role", "from", "text", "images", "history", "system", "label"])] = parent.pop(
            path[-1]
        )
    return record


@pytest.mark.parametrize("seed", range(len(SEEDS)))
@pytest.mark.parametrize("layout", [None, *RECORDS])
def test_an_object_that_was_changed_is_read_or_an_error(tmp_path, seed, layout):
    generator = random.Random(seed)
    path = tmp_path / "d.jsonl"
    read = 0
    for _ in range(60):
        path.write_text(json.dumps(changed(changed(SEEDS[seed], generator), generator)))
        try:
            items = read_items([path], data_format=layout, images_per_sample=generator.choice([1, 3]))
        except DataError as error:
            assert str(error).startswith(f"{path}: ")
            continue
        read += len(items)
        assert all(isinstance(item.answer, str) and isinstance(item.prompt, str | None) for item in items)
    assert read or layout is not None


@pytest.mark.parametrize("write", [write_csv, write_parquet_bytes])
def test_a_table_with_other_bytes_is_read_or_an_error(tmp_path, write):
    path = write(tmp_path, SEVERAL)
    content = path.read_bytes()
    generator = random.Random(3)
    for _ in range(60):
        damaged = bytearray(content)
        for _ in range(generator.randrange(1, 4)):
            damaged[generator.randrange(4, len(damaged))] = generator.randrange(256)
        path.write_bytes(damaged[: generator.choice([len(damaged)] * 3 + [generator.randrange(len(damaged))])])
        try:
            assert all(isinstance(item, Item) for item in read_items([path]))
        except DataError as error:
            assert str(path) in str(error)


def test_an_image_in_parquet_is_read_when_its_turn_comes(tmp_path):
    rows = [{"image": {"bytes": png((n, 0, 0)), "path": "x"}, "prompt": "q", "answer": str(n)} for n in range(5)]
    rows.append({"image": {"bytes": None, "path": "b.png"}, "prompt": "q", "answer": "5"})
    rows.append({"image": None, "prompt": "q", "answer": "6"})
    path = write_parquet(tmp_path, rows, group=2)
    items = read_items([path])
    assert [item.image for item in items[:3]] == [ParquetImage(str(path), n // 2, n % 2, "image") for n in range(3)]
    assert [item.image.read() for item in items[:5]] == [png((n, 0, 0)) for n in range(5)]
    assert items[5].image == tmp_path / "b.png" and items[6].image is None
    path.unlink()
    with pytest.raises(OSError, match="No such file"):
        ParquetImage(str(path), 7, 0, "image").read()


@pytest.mark.parametrize("kind", ["objects", "bytes", "large lists", "lists of two"])
def test_images_in_lists_are_read_when_their_turn_comes(tmp_path, kind):
    contents = [[png((n, 0, 9 * k)) for k in range(2 if "two" in kind else count)] for n, count in enumerate([2, 1, 3])]
    structs = [[{"bytes": content, "path": None} for content in images] for images in contents]
    element = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    kinds = {
        "objects": pyarrow.list_(element),
        "bytes": pyarrow.list_(pyarrow.binary()),
        "large lists": pyarrow.large_list(element),
        "lists of two": pyarrow.list_(element, 2),
    }
    cells = [*(contents if kind == "bytes" else structs), None, *([] if "two" in kind else [[]])]
    if kind == "objects":
        cells.append([{"bytes": None, "path": "b.png"}, structs[0][0]])
    texts = [["q"] * len(cells), [str(n) for n in range(len(cells))]]
    table = pyarrow.table([pyarrow.array(cells, kinds[kind]), *texts], names=["images", "prompt", "answer"])
    parquet.write_table(table, tmp_path / "d.parquet", row_group_size=2)
    items = read_items([tmp_path / "d.parquet"], images_per_sample=3)
    for row, images in enumerate(contents):
        wanted = [ParquetImage(str(tmp_path / "d.parquet"), row // 2, row % 2, "images", k) for k in range(len(images))]
        assert [*items[row].images] == wanted
        assert [image.read() for image in pickle.loads(pickle.dumps(items[row].images))] == images
    assert all(item.images == () for item in items[3:5])
    if kind == "objects":
        path, stored = items[5].images
        assert path == tmp_path / "b.png" and stored.read() == contents[0][0]


def test_a_null_among_the_images_of_a_row_is_named(tmp_path):
    rows = [{"images": [{"bytes": png(), "path": None}, None], "prompt": "q", "answer": "x"}]
    with pytest.raises(DataError, match='row 1: "images" is null'):
        read_items([write_parquet(tmp_path, rows)], images_per_sample=2)
