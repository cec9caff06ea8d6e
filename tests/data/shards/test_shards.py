import io
import json
import os
import re
import tarfile

import pytest
from PIL import Image

from sat_lora.data.samples import BrokenSample, Item
from sat_lora.data.shards.shard_checks import problems_with_shards
from sat_lora.data.shards.shard_names import expand_shards
from sat_lora.data.shards.shards import count_shards, find_records
from sat_lora.errors import DataError
from tests.support.tar_shards import png, write_shard


def read(path):
    return [record.read() for record in find_records(str(path))]


def test_braces_name_every_shard_once():
    assert expand_shards(["a-{08..11}.tar", "b{x,y}.tar", "a-09.tar"]) == [
        *("a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar", "bx.tar", "by.tar")
    ]
    with pytest.raises(DataError, match=r"a-\{00\.\.1\.tar: .*; write shards as 'shards-\{000\.\.127\}\.tar'"):
        expand_shards(["a-{00..1.tar"])


def test_the_members_of_a_key_are_one_sample(tmp_path):
    shard = write_shard(
        tmp_path / "s.tar",
        ("d/1.json", json.dumps({"prompt": "Q?", "answer": "a"})), ("d/1.PNG", b"pixels"),
        ("d/2.jpg", b"more"), ("d/2.txt", "ü\n"),
        ("d/3.json", json.dumps({"prompt": "2+2?", "answer": "4"})),
        ("__meta__", "of WebDataset"), ("README", "no sample"),
    )  # fmt: skip
    assert read(shard) == [
        Item(b"pixels", "a", "Q?", f"{shard}/d/1"),
        Item(b"more", "ü", None, f"{shard}/d/2"),
        Item(None, "4", "2+2?", f"{shard}/d/3"),
    ]


def test_webdataset_reads_the_same_samples(tmp_path):
    from webdataset import WebDataset

    members = [(f"{n:03}.{kind}", f"{n} {kind}".encode()) for n in range(5) for kind in ("png", "txt")]
    shard = write_shard(tmp_path / "s.tar", *members)
    expected = [(s["__key__"], s["png"], s["txt"].decode()) for s in WebDataset(str(shard), shardshuffle=False)]
    assert [(item.name.rsplit("/", 1)[1], item.image, item.answer) for item in read(shard)] == expected
    assert len(expected) == 5


@pytest.mark.parametrize(
    "members, reason",
    [
        ([("k.png", b"x")], "wanted an image and KEY.txt or KEY.json .*; got .png"),
        ([("k.png", b"x"), ("k.json", "{")], "cannot be read: Expecting"),
        ([("k.png", b"x"), ("k.json", '{"answer": 7}')], r'its json: "answer" is the number 7, wanted a text'),
        ([("k.json", '{"answer": "7"}')], "without an image both texts; got .json"),
        ([("k.png", b"x"), ("k.txt", b"\xff")], "cannot be read: .txt is not UTF-8: invalid start byte at byte 0"),
    ],
)
def test_a_broken_sample_is_named_by_shard_and_key(tmp_path, members, reason):
    shard = write_shard(tmp_path / "s.tar", *members, ("l.png", b"y"), ("l.txt", "1"))
    broken, whole = read(shard)
    assert isinstance(broken, BrokenSample) and broken.path == f"{shard}/k"
    assert re.search(reason, broken.reason)
    assert whole.answer == "1"


@pytest.mark.parametrize("cut", [10240, 10241, 11000])  # the first is between two members
def test_a_cut_shard_gives_the_samples_before_the_cut_and_then_an_error(tmp_path, cut):
    shard = write_shard(
        tmp_path / "s.tar", *((f"{n}.{kind}", b"x" * 2000) for n in range(4) for kind in ("png", "txt"))
    )
    os.truncate(shard, cut)
    records = find_records(str(shard))
    next(records)
    with pytest.raises(DataError, match="s.tar: cannot be read as a tar file: .*; write or copy it again"):
        list(records)


def test_counting_names_every_bad_shard(tmp_path, single_process_group):
    good = write_shard(tmp_path / "a.tar", ("1.png", b""), ("1.txt", "1"), ("2.txt", "2"))
    ranks = dict(data_parallel_rank=0, data_parallel_size=1)
    assert [shard.samples for shard in count_shards([good], **ranks)] == [2]
    (tmp_path / "b.tar").write_bytes(b"no tar" * 500)
    with pytest.raises(DataError, match=r"(?s)b\.tar: cannot be read.*c\.tar: cannot be read"):
        count_shards([tmp_path / "{a,b,c}.tar"], **ranks)
    empty = write_shard(tmp_path / "d.tar")
    with pytest.raises(DataError, match=r"d\.tar: no samples there"):
        count_shards([empty], **ranks)


def test_all_missing_shards_are_named_at_once(tmp_path):
    write_shard(tmp_path / "s-1.tar", ("1.png", png()), ("1.txt", "1"))
    (problem,) = problems_with_shards([str(tmp_path / "s-{0..2}.tar")], "--train-data")
    assert problem == f"2 of 3 shards are missing: {tmp_path}/s-0.tar, {tmp_path}/s-2.tar; mend the path or copy them"


def test_what_shards_cannot_do_is_said_before_the_run(tmp_path):
    def problem(*paths, option="--train-data"):
        return "".join(problems_with_shards([str(path) for path in paths], option))

    good = write_shard(tmp_path / "good.tar", ("0.png", b"no image"), ("0.txt", "0"), ("1.png", png()), ("1.txt", "1"))
    assert problem(good) == ""
    assert "tar shards cannot be answered by generation" in problem(good, option="--test-data")
    assert f"tar shards and {tmp_path}: give tar shards alone" in problem(good, tmp_path)
    assert "pipe:cat x.tar: the samples of a pipe cannot be counted" in problem("pipe:cat x.tar")
    bad = write_shard(tmp_path / "bad.tar", ("0.png", b"no image"), ("0.txt", "0"))
    assert "none of the first 1 samples" in problem(bad) and "bad.tar/0: cannot be read as an image" in problem(bad)
    assert "no samples there" in problem(write_shard(tmp_path / "empty.tar"))


def test_a_gnu_tar_of_a_folder_is_a_shard(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in (("./d/1.png", b"p"), ("./d/1.txt", b"1")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            info.pax_headers = {"comment": "é" * 600}
            tar.addfile(info, io.BytesIO(content))
    assert read(tmp_path / "s.tar") == [Item(b"p", "1", None, f"{tmp_path}/s.tar/./d/1")]
    assert Image.open(io.BytesIO(png())).size == (21, 21)
