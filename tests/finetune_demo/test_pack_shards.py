"""Packed captchas, and finetune_cogvlm.py on them."""

import contextlib
import io
import shutil

import pytest

from sat_lora.data.records.record import IMAGE, RecordOptions
from sat_lora.data.samples import read_items
from sat_lora.data.shards.shard_names import expand_shards
from sat_lora.data.shards.shards import find_records
from tests.support.demo_runs import launch, losses_of, options_for
from tests.support.layouts import LAYOUTS, SEVERAL, pictures, write_pictures
from tests.support.picture_files import write_images
from tests.support.scripts import load_script


def pack(data, out, samples_per_shard) -> str:
    """What the script says --train-data takes."""
    argv = [str(data), "--out", str(out), "--samples-per-shard", str(samples_per_shard)]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert load_script("pack_shards").main(argv) == 0
    return said.getvalue().rsplit("--train-data", 1)[1].strip().strip("'")


@pytest.mark.parametrize("samples_per_shard, shards", [(4, 3), (10, 1)])
def test_packed_samples_are_those_of_the_folder(tmp_path, samples_per_shard, shards):
    folder = write_images(tmp_path / "images", [f"{number}.png" for number in range(9)])
    lines = ('{"image": "3.png", "prompt": "Q?", "answer": "ü"}', '{"prompt": "2?", "answer": "2"}')
    (folder / "more.jsonl").write_text("\n".join(lines))
    for data in (folder, folder / "more.jsonl"):
        out = tmp_path / f"shards of {data.name}"
        found = expand_shards([pack(data, out, samples_per_shard)])
        assert sorted(found) == sorted(map(str, out.iterdir()))
        assert data != folder or len(found) == shards
        packed = [record.read() for shard in found for record in find_records(shard)]
        assert [(item.image, item.answer, item.prompt) for item in packed] == [
            (item.image and item.image.read_bytes(), item.answer, item.prompt) for item in read_items([data])
        ]


@pytest.mark.parametrize("layout", ["LLaVA", "data URLs", "parquet, bytes", "CogVLM-SFT-311K"])
def test_samples_of_any_layout_are_packed_with_their_turns(tmp_path, layout):
    write_pictures(tmp_path, SEVERAL)
    data = LAYOUTS[layout](tmp_path, SEVERAL)
    (shard,) = expand_shards([pack(data, tmp_path / "shards", 10)])
    packed = [record.read() for record in find_records(shard)]
    assert [(item.history, item.prompt, item.answer) for item in packed] == [
        ((*turns[:-1],), *turns[-1]) for _, turns in SEVERAL
    ]
    assert [item.image for item in packed] == [*pictures(SEVERAL).values()]


def test_several_images_of_a_sample_are_packed_in_their_order(tmp_path, capsys):
    write_images(tmp_path, ["1.png", "2.png"])
    data = tmp_path / "two.jsonl"
    data.write_text('{"images": ["2.png", "1.png"], "prompt": "<image> or <image>?", "answer": "x"}')
    script = load_script("pack_shards")
    assert script.main([str(data), "--out", str(tmp_path / "out")]) == 2
    assert "2 images, and the base takes one; leave the others out, or give --images-per-sample 2" in (
        capsys.readouterr().err
    )
    assert script.main([str(data), "--out", str(tmp_path / "out"), "--images-per-sample", "2"]) == 0
    (record,) = find_records(str(tmp_path / "out" / "shard-000000.tar"))
    assert [suffix for suffix, _, _ in record.members] == [".0.png", ".1.png", ".json"]
    item = record.read(options=RecordOptions(most_images=2))
    assert item.images == tuple((tmp_path / name).read_bytes() for name in ("2.png", "1.png"))
    assert item.prompt == f" or {IMAGE}?"


def test_shards_that_are_there_stay_and_half_a_set_is_none(tmp_path, capsys):
    folder = write_images(tmp_path / "images", ["1.png", "2.png"])
    out = tmp_path / "shards"
    script = load_script("pack_shards")
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"image": "images/1.png", "answer": "1"}\n{"image": "no.png", "answer": "2"}')
    assert script.main([str(lines), "--out", str(out), "--samples-per-shard", "1"]) == 2
    assert list(out.iterdir()) == []
    (tmp_path / "nothing.jsonl").touch()
    assert script.main([str(tmp_path / "nothing.jsonl"), "--out", str(out)]) == 2
    assert "nothing to pack" in capsys.readouterr().err and list(out.iterdir()) == []
    pack(folder, out, 1)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert sorted(before) == ["shard-000000.tar", "shard-000001.tar"]
    assert script.main([str(folder / "1.png"), "--out", str(out)]) == 2
    assert f"--out: {out} holds 2 shards (shard-000000.tar, ...)" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.matrix
@pytest.mark.timeout(300)
@pytest.mark.parametrize("ranks, workers", [(1, 0), (2, 2)], ids=["1 rank", "2 ranks, 2 workers"])
def test_a_run_on_shards_ends_on_every_rank_and_resumes_bit_for_bit(captchas, tmp_path, ranks, workers):
    """One and a half epochs of uneven shards with a broken image; the second time stopped in the first epoch."""
    images = tmp_path / "images"
    shutil.copytree(captchas / "train", images)
    (images / "broken.png").write_text("this is no image")
    train, valid = pack(images, tmp_path / "train", 9), pack(captchas / "valid", tmp_path / "valid", 9)

    def run(*options):
        done = launch("deepspeed", options, ranks)
        assert done.returncode == 0, done.stderr[-3000:]

    def run_new(name, *more):
        options = options_for(captchas, tmp_path / name, "--num-workers", str(workers), "--batch-size", "5")
        options += ["--train-data", train, "--valid-data", valid, "--lora_dropout", "0.2", "--warmup", "0"]
        run(*options, "--lr-decay-style", "constant", *more)
        return losses_of(tmp_path / name / "run")

    whole = run_new("whole", "--epochs", "1.5")
    per_reader = -(-65 // (ranks * max(1, workers) * 5))
    assert len(whole) == -(-3 * per_reader * max(1, workers) // 2)
    assert len(run_new("half", "--train-iters", "3")) == 3
    log = (tmp_path / "whole/run/train.jsonl").read_text()
    assert log.count("cannot be read as an image") == 1 and ".tar/0" in log
    run("--resume", str(tmp_path / "half" / "run"), "--epochs", "1.5")
    assert losses_of(tmp_path / "half" / "run") == whole


def test_shards_that_are_there_are_replaced_only_where_one_insists(tmp_path, capsys):
    write_images(tmp_path / "data", ["a.png", "b.png", "c.png"])
    out = tmp_path / "shards"
    pack(tmp_path / "data", out, 1)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    again = [str(tmp_path / "data"), "--out", str(out), "--samples-per-shard", "2"]
    main = load_script("pack_shards").main
    assert main(again) == 2
    assert "holds 3 shards (shard-000000.tar, ...); nothing was changed" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert main([str(tmp_path / "dat"), "--out", str(out), "--overwrite"]) == 2
    assert "did you mean 'data'?" in capsys.readouterr().err and len(list(out.iterdir())) == 3
    assert main([*again, "--overwrite"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["shard-000000.tar", "shard-000001.tar"]
