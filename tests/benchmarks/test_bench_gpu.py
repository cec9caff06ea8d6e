"""bench_gpu runs its stages one after the other, whatever becomes of them, and every benchmark that it starts runs."""

import json
import sys
import time

import pytest

pytest.importorskip("peft")

from benchmarks import bench_decode, bench_gpu, bench_loop
from benchmarks.bench_run import step_times
from tests.support.patience import PATIENCE, patient

REPORT = "import sys, json; json.dump({'rows': [1, 2]}, open(sys.argv[2], 'w'))"


def stage(code: str, limit: float = 60.0, report=lambda report: ({"row": row} for row in report["rows"])):
    command = [sys.executable, "-c", code]
    return bench_gpu.Stage(limit, ["false"], command, report)


def lines_of(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]


def test_no_stage_stops_another(tmp_path, capsys, monkeypatch):
    stages = {
        "good": stage(REPORT),
        "wrong": stage("print('what was wrong'); raise SystemExit(3)"),
        "hanging": stage(REPORT + "; import time; time.sleep(60)", limit=3.0),
        "silent": stage("print('1 passed')", report=None),
    }
    monkeypatch.setattr(bench_gpu, "STAGES", stages)
    start = time.monotonic()
    assert bench_gpu.main(["--dry-run", "--stages", *stages, "--out", str(tmp_path)]) == 1
    assert time.monotonic() - start < 40
    lines = lines_of(capsys)
    endings = {line["stage"]: line["status"] for line in lines if "status" in line}
    assert endings == {"good": "ok", "wrong": "failed", "hanging": "ran out of time", "silent": "ok"}
    assert [line["row"] for line in lines if "row" in line] == [1, 2, 1, 2]  # what it wrote before its limit counts
    assert lines[-1]["failed"] == ["wrong", "hanging"]
    assert next(line for line in lines if line.get("stage") == "silent")["said"] == "1 passed"
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [result["stage"] for result in results] == ["good", "hanging"]
    assert "what was wrong" in (tmp_path / "log.txt").read_text()


def test_the_time_for_all_is_kept(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_gpu, "STAGES", {name: stage("import time; time.sleep(60)") for name in "ab"})
    assert bench_gpu.main(["--dry-run", "--stages", "a", "b", "--minutes", "0.02", "--out", str(tmp_path)]) == 1
    endings = [line["status"] for line in lines_of(capsys) if "status" in line]
    assert endings == ["ran out of time", "no time was left"]


def test_without_a_gpu_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs a GPU"):
        bench_gpu.main(["--out", str(tmp_path)])


@pytest.mark.matrix
@pytest.mark.timeout(900)
def test_every_stage_small_on_the_cpu(tmp_path, capsys):
    status = bench_gpu.main(
        ["--dry-run", "--patience", str(PATIENCE), "--minutes", str(patient(14)), "--out", str(tmp_path)]
    )
    lines = lines_of(capsys)
    assert status == 0, lines
    assert {line["stage"] for line in lines if line.get("status") == "ok"} == set(bench_gpu.STAGES)


def test_decoding(tmp_path, capsys, single_process_group):
    out = tmp_path / "decode.json"
    sizes = ["--size", "tiny", "--device", "cpu", "--tokens", "3", "--repeats", "1", "--batches", "1", "2"]
    bench_decode.main([*sizes, "--rank", "4", "--markdown", "--out", str(out)])
    written = json.loads(out.read_text())
    rows = [(row["adapters"], row["batch"]) for row in written["rows"]]
    assert rows == [(state, batch) for state in ("on", "off", "merged") for batch in (1, 2)]
    assert all(row["prompt"] == 4 + 2 + 8 and row["first_seconds"] > 0 for row in written["rows"])
    assert written["weights_bytes"] == 4 * (4 * 64**2 + 3 * 64 * 96 + 1024 * 64)
    assert capsys.readouterr().out.startswith("| adapters | batch |")
    bench_decode.main([*sizes, "--rank", "4", "--quantize", "nf4", "--out", str(out)])
    written = json.loads(out.read_text())
    rows = [(row["adapters"], row["batch"]) for row in written["rows"]]
    assert written["quantize"] == "nf4" and rows == [(state, batch) for state in ("on", "off") for batch in (1, 2)]
    linears = 4 * 64**2 + 3 * 64 * 96
    in_blocks_of_32 = 64 * 96  # of dense_4h_to_h
    scales = (linears - in_blocks_of_32) // 64 + in_blocks_of_32 // 32
    assert written["weights_bytes"] == linears // 2 + 2 * scales + 4 * 1024 * 64


def test_the_step_of_a_run(tmp_path, capsys, single_process_group):
    out = tmp_path / "loop.json"
    sizes = ["--size", "tiny", "--device", "cpu", "--repeats", "1", "--batch", "2", "--rank", "4"]
    bench_loop.main([*sizes, "--markdown", "--out", str(out)])
    written = json.loads(out.read_text())
    bare, loop = (written["steps"][name] for name in ("bare", "loop"))
    assert bare["samples_per_second"] >= 2 / bare["seconds"][0]  # of the fastest round
    assert written["loop_of_bare"] > 0 and loop["seconds"] == sorted(loop["seconds"])
    assert "| loop |" in capsys.readouterr().out


def test_samples_per_second_are_those_of_the_fastest_round():
    assert bench_loop.summary([0.5, 0.25, 1.0], batch=2) == {"seconds": [0.375, 0.5, 0.75], "samples_per_second": 8.0}


def test_a_save_is_what_the_steps_that_save_take_more():
    arrivals = [0.0, 9.0, 10.0, 11.0, 15.0, 16.0, 17.0, 18.0, 22.0, 23.0]  # saves after steps 4 and 8, one warm-up
    assert step_times(arrivals, 4) == {"step_seconds": 1.0, "save_seconds": 3.0}
