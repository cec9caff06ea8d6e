"""bench_host runs every part, writes what it says it writes, and holds its goals against the figures."""

import json

import pytest

pytest.importorskip("peft")

from benchmarks import bench_host


@pytest.mark.parametrize("parts", [["token"], pytest.param(bench_host.PARTS, marks=pytest.mark.matrix)])
def test_parts(parts, tmp_path, capsys, single_process_group):
    out = tmp_path / "host.json"
    bench_host.main(["--quick", "--markdown", "--out", str(out), "--parts", *parts])
    written = json.loads(out.read_text())
    assert written["linears"].keys() == {"plain", "q/k/v"}
    for linear in written["linears"].values():
        assert linear.keys() == {"frozen", "sat_lora", "peft", "lora2", "nn.Linear"}
        assert all(own["both"] > own["no_grad"] > 0 for own in linear.values())
    assert {*written} & {"steps", "watchers", "token"} == {*parts} - {"linears"}
    for part, names in (("steps", bench_host.STEPS), ("watchers", bench_host.WATCHED)):
        if part not in parts:
            continue
        assert written[part].keys() == {"without checkpointing", "with"}
        for works in written[part].values():
            assert tuple(works) == names
            assert all(0 < own["least"] <= own["median"] for own in works.values())
    assert written["token"].keys() == {"adapters off", "adapters on"}
    assert len(written["goals"]) == 3 + 2 * 2 * ("watchers" in parts)  # no earlier report has so few layers
    printed = capsys.readouterr().out
    assert "| plain | sat_lora |" in printed
    assert ("| ZeRO 2, watch, watchdog |" in printed) == ("watchers" in parts)


def report_of(sat_lora: float, adapters: float, yardstick: float = 10.0) -> dict:
    """Every frozen linear takes 20 us, PEFT's 120, a frozen step 100 ms."""
    whole = {"frozen": 20.0, "sat_lora": sat_lora, "peft": 120.0, "lora2": 200.0, "nn.Linear": yardstick}
    linear = {name: {"both": own, "no_grad": own} for name, own in whole.items()}
    steps = {name: {"least": own} for name, own in (("frozen", 100.0), ("adapters", adapters))}
    watched = zip(bench_host.WATCHED, (100.0, 121.0, 121.0), (0.0, 20.0, 1.0))
    watchers = {name: {"median": own, "added": added} for name, own, added in watched}
    linears = {"plain": linear, "q/k/v": linear}
    return {"linears": linears, "steps": {"with": steps}, "watchers": {"with": watchers}}


def test_goals():
    before = report_of(sat_lora=400.0, adapters=300.0)
    goals = bench_host.goals(report_of(sat_lora=80.0, adapters=180.0), before)
    assert [(round(row["value"], 3), row["reached"]) for row in goals] == [
        (0.6, True),  # 60 of PEFT's 100 us, at most 0.7
        (0.6, False),  # at most 0.5
        (0.6, True),  # at most 1
        (0.4, True),  # 80 of 200 ms, at most half
        (0.2, False),  # the watch, at most 0.1
        (0.008, True),  # the watchdog, at most 0.02
    ]


def test_a_slower_machine_is_no_slower_step():
    """The earlier step is scaled by what torch's own linear takes."""
    before = report_of(sat_lora=400.0, adapters=300.0)
    goals = bench_host.goals(report_of(sat_lora=80.0, adapters=180.0, yardstick=20.0), before)
    assert goals[3]["value"] == pytest.approx(0.2)
