"""Mutated files of samples: read, or refused by one DataError; no hang, and no file of others is opened."""

import json

import pytest

from sat_lora.cogvlm.inputs.text import Sample
from sat_lora.data.samples import BrokenSample, ImageTextDataset, read_items
from sat_lora.data.shards.shards import find_records
from sat_lora.errors import DataError
from tests.support.mutations import mutated, refusal, within
from tests.support.picture_files import write_images
from tests.support.tar_shards import png, write_shard

ENTRIES = [
    {"image": "000.png", "prompt": "What is it?", "answer": "a cat"},
    {"image": "sub/001.png", "answer": "ein Kätzchen 猫", "id": 7},
    {"prompt": "2+2?", "answer": "4 </s> \u2028 <EOI>"},
    {"image": "000.png", "prompt": "", "answer": "x", "system": ""},
]
SEEDS = [
    "".join(json.dumps(entry) + "\n" for entry in ENTRIES).encode(),
    "\r\n".join(json.dumps(entry, ensure_ascii=False) for entry in ENTRIES).encode(),
    json.dumps(ENTRIES).encode(),
    json.dumps(ENTRIES, indent=2, ensure_ascii=False).encode(),
    json.dumps(ENTRIES[0], indent=1).encode(),
]


def read_all(path, tokenizer) -> int:
    settings = dict(version="vqa", prompt="Q:", image_size=(21, 21), image_length=9, max_length=60)
    dataset = ImageTextDataset(read_items([path]), tokenizer, **settings)
    samples = [dataset[number] for number in range(min(6, len(dataset)))]
    assert all(isinstance(sample, Sample | BrokenSample) for sample in samples)
    return len(samples)


def read_mutated(tmp_path, tokenizer, times) -> tuple[int, int]:
    """(files refused, samples of the others)."""
    folder = tmp_path / "data"
    write_images(folder, ["000.png"])
    path, refused, samples = folder / "data.jsonl", 0, []
    read_all_of = lambda: samples.append(read_all(path, tokenizer))  # noqa: E731
    path.write_bytes(SEEDS[0])
    read_all_of()
    for number, content in mutated(SEEDS, times=times, seed=1):
        path.write_bytes(content)
        try:
            with within(folder, seconds=20):
                refused += refusal(read_all_of) is not None
        except Exception as error:
            raise AssertionError(f"mutation {number}: {content[:2000]!r}") from error
    return refused, sum(samples)


def test_three_hundred_mutated_files_are_read_or_refused(tmp_path, tokenizer):
    refused, samples = read_mutated(tmp_path, tokenizer, 300)
    assert 100 < refused < 290 and samples > 50


@pytest.mark.matrix
@pytest.mark.timeout(900)
def test_ten_thousand_mutated_files_are_read_or_refused(tmp_path, tokenizer):
    refused, samples = read_mutated(tmp_path, tokenizer, 10_000)
    assert 4_000 < refused < 9_700 and samples > 1_500


def test_the_mutated_json_of_a_shard_is_a_sample_or_a_broken_one(tmp_path):
    contents = [content for _, content in mutated([json.dumps(e).encode() for e in ENTRIES], times=200, seed=2)]
    members = [(f"{n:03}.{kind}", part) for n, c in enumerate(contents) for kind, part in (("png", png()), ("json", c))]
    shard = write_shard(tmp_path / "s.tar", *members)
    items = [record.read() for record in find_records(str(shard))]
    broken = [item for item in items if isinstance(item, BrokenSample)]
    assert len(items) == 200 and 50 < len(broken) < 199
    assert all(item.path.startswith(f"{shard}/") and item.reason.startswith(item.path) for item in broken)


def test_a_mutation_is_the_same_however_many_there_are():
    assert [*mutated(SEEDS, times=5, seed=3)] == [*mutated(SEEDS, times=9, seed=3)][:5]


def test_what_is_opened_outside_is_noticed(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "secret.txt").write_text("x")
    with pytest.raises(AssertionError, match=r"secret\.txt"), within(tmp_path / "data", seconds=5):
        (tmp_path / "secret.txt").read_text()


def test_a_reader_that_hangs_is_noticed(tmp_path):
    with pytest.raises(TimeoutError), within(tmp_path, seconds=0.05):
        while True:
            pass


def test_only_data_errors_count_as_refused():
    def refuse():
        raise DataError("no")

    def fail():
        raise KeyError("no")

    assert str(refusal(refuse)) == "no" and refusal(int) is None
    with pytest.raises(KeyError):
        refusal(fail)
