"""What pictures and the progress line show: where the data lies, which is best, on one scale, in any width."""

import math
import re

import pytest
from matplotlib.figure import Figure

from sat_lora.adapters.inspect import draw_norms
from sat_lora.doctor.timeline import module_of, stretches, tower_of
from sat_lora.errors import AdapterError
from sat_lora.lora.targets import PRESETS, layer_of
from sat_lora.terminal.progress import as_time, shown
from sat_lora.training.runs import step_progress as progress
from sat_lora.training.runs.logs.loss_plot import draw_losses
from sat_lora.training.runs.logs.run_logs import lowest
from sat_lora.training.runs.run_folder import RunFolder
from tests.support.run_logs import logs_of, validated


@pytest.fixture
def figure(monkeypatch):
    """The figures that are saved, as they are drawn."""
    figures, save = [], Figure.savefig

    def keep(self, *args, **kwargs):
        figures.append(self)
        return save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def falling(steps):
    records = [{"step": step, "loss": 10 * 0.98**step, "lr": 1e-3 * (1 - step / steps)} for step in range(1, steps + 1)]
    return records + [{"step": step, "valid_loss": 1 + (step - 200) ** 2 / 1e4} for step in range(100, steps + 1, 100)]


def test_the_smoothed_line_lies_on_the_data_and_the_best_is_marked(figure, tmp_path):
    draw_losses(falling(400), tmp_path / "loss.png", "mine, of base_$1$")
    losses, rate = figure[0].axes
    lines = {line.get_label(): line for line in losses.lines}
    for step, value in zip(*lines["training, smoothed"].get_data()):
        assert math.log(value / (10 * 0.98**step)) == pytest.approx(0, abs=1e-6)
    assert [*map(list, lines["best: 1 at step 200"].get_data())] == [[200], [1.0]]
    assert losses.get_yscale() == "log" and losses.get_title(loc="left") == r"mine, of base_\$1\$"
    assert max(rate.lines[0].get_ydata()) == pytest.approx(1e-3, rel=0.01) and rate.get_ylabel() == "learning\nrate"


@pytest.mark.parametrize(
    "records",
    [
        [],
        [{"step": 1, "loss": 2.0, "lr": 1e-4}],
        [{"step": 1, "loss": None}, {"step": 2, "valid_loss": float("nan")}],
        [{"step": 5, "valid_loss": 0.5}],
        [{"step": step, "loss": 0.0, "lr": 0.0} for step in range(40)],
        [{"step": 1, "loss": "low", "lr": [1]}, {"step": 2, "broken": "a.png"}],
        [{"step": step, "loss": -1.0 if step % 9 else 1e9} for step in range(100)],
        [{"step": step, "loss": 10.0 ** (step - 300), "lr": 1e-320} for step in range(600)],
        [{"step": 1, "loss": 10**400, "valid_loss": -(10**400), "lr": True}],
        [{"step": 10**400, "loss": 1.0}, {"step": -(10**400), "loss": 2.0}, {"step": -1, "valid_loss": 1.0}],
    ],
)
def test_whatever_a_log_holds_is_drawn(records, tmp_path):
    draw_losses(records, tmp_path / "loss.png", "\x1b[2J a\nb " * 40)
    assert (tmp_path / "loss.png").stat().st_size > 1000


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["验证码 🚀", "$\\foo$ _^{", "caf\u0301e \u202e", "\U0010ffff"])
def test_a_name_in_any_script_is_shown_without_a_word(name, figure, tmp_path):
    draw_losses(falling(30), tmp_path / "loss.png", name)
    draw_norms({**report_of(vit=[1.0]), "path": name}, tmp_path / "norms.png")
    report = report_of(other=[1.0])
    report["layers"][0] |= {"name": f"a.{name}", "layer": None}
    draw_norms(report, tmp_path / "norms.png")


@pytest.mark.parametrize("digits", ["9" * 5000, "²", "٣", "007"])
def test_a_number_in_a_layers_name_may_be_any(digits, tmp_path):
    name = f"transformer.layers.{digits}"
    report = report_of(other=[1.0, 2.0])
    report["layers"][0] |= {"name": name, "layer": layer_of(name)}
    assert report["layers"][0]["layer"] == (7 if digits == "007" else None)
    draw_norms(report, tmp_path / "norms.png")


def test_a_log_that_was_edited_has_a_lowest_loss_all_the_same():
    records = [{"step": 1, "valid_loss": 10**400}, {"step": 2, "valid_loss": 3.0}, {"step": 3, "valid_loss": None}]
    assert lowest(records) == (2, 3.0)


def report_of(relative=False, **parts):
    weight = {"weight_norm": 10.0} if relative else {}
    layers = [
        {"name": f"{part}.{number}.x", "part": part, "layer": number, "delta_norm": norm, **weight}
        for part, norms in parts.items()
        for number, norm in enumerate(norms)
    ]
    return {"path": "runs/mine/adapter", "parts": {part: {} for part in parts}, "layers": layers}


@pytest.mark.parametrize("relative", [False, True])
def test_norms_have_one_scale_words_and_marks(relative, figure, tmp_path):
    draw_norms(report_of(relative, vit=[0.5, 0.0, 0.25], language=[0.02, 0.04]), tmp_path / "norms.png")
    vit, language = figure[0].axes
    assert vit.get_ylim() == language.get_ylim()
    factor = 10.0 if relative else 1.0  # 100 % of a weight of norm 10
    assert [*vit.lines[0].get_ydata()] == [0.5 * factor, 0.25 * factor]
    assert [*vit.lines[1].get_xdata()] == [1] and vit.get_title(loc="left") == "vit, no effect in 1 (red)"
    assert ("in % of its size" in figure[0].get_supylabel()) is relative
    assert figure[0].get_suptitle().startswith("runs/mine/adapter: |s")


@pytest.mark.parametrize("norms", [[0.0, 0.0], [None], [1e-9, 1e3], [0.1] * 300])
def test_norms_of_any_size_are_drawn(norms, tmp_path):
    draw_norms(report_of(vit=norms), tmp_path / "norms.png")
    assert (tmp_path / "norms.png").stat().st_size > 1000


def test_a_picture_that_cannot_be_written_is_an_error_and_leaves_nothing(tmp_path):
    (tmp_path / "norms.png").mkdir()
    with pytest.raises(AdapterError, match="--plot: .*norms.png cannot be written"):
        draw_norms(report_of(vit=[1.0]), tmp_path / "norms.png")
    assert [path.name for path in tmp_path.iterdir()] == ["norms.png"]


def test_towers_are_named_along_a_timeline():
    names = [
        "mixins.lora.adapters.transformer/layers/1/mlp/dense_4h_to_h.A",
        "mixins.lora.adapters.mixins/rotary/vision_dense_list/0.B",
        "mixins.lora.adapters.mixins/eva/linear_proj/gate_proj.A",
        "mixins.eva.vit_model.mixins.lora.adapters.mixins/eva/vit_model/transformer/layers/2/mlp/dense_h_to_4h.A",
    ]
    assert module_of(names[0]) == "transformer.layers.1.mlp.dense_4h_to_h" and module_of("a.b.weight") == "a.b"
    found = stretches({name: place for place, name in enumerate(names)})
    assert found == [(0, 1, "language model"), (2, 2, "projector"), (3, 3, "vision tower")]
    assert tower_of("lm-head") == "language model" and tower_of("other") == "other"
    assert tower_of("cross-attention") == "language model" and tower_of("vision-convolution") == "vision tower"
    assert {tower_of(part) for part in PRESETS if part.startswith("cross-vision-")} == {"second vision tower"}


# Lines


@pytest.mark.parametrize("width", [10, 40, 79, 80, 99, 100, 120, 300])
@pytest.mark.parametrize("total", [9, 4_000, 10_000_000])
def test_the_line_of_a_step_is_never_wider_than_the_terminal(width, total, capfd, monkeypatch):
    monkeypatch.setattr(progress, "is_terminal", lambda stream: True)
    monkeypatch.setattr(progress, "terminal_columns", lambda: width)
    figures = {"loss": 0.9034, "lr": 2.42e-3, "samples_per_second": 1088.9, "mib": 71234.0}
    bar = progress.Progress(total, 0)
    bar.advance(total // 2, figures)
    bar.close()
    line = re.split(r"[\r\n]+", capfd.readouterr().err.strip())[-1]
    assert len(line) <= width and (f"/{total}" in line or width == 10)
    assert ("loss 0.9034, lr 2.42e-03" in line) is (width >= 79)
    assert "█" not in line or width >= 100


def test_a_terminal_that_becomes_narrower_gets_narrower_lines(capfd, monkeypatch):
    widths = iter([120] * 2 + [70] * 9)
    monkeypatch.setattr(progress, "is_terminal", lambda stream: True)
    monkeypatch.setattr(progress, "terminal_columns", lambda: next(widths))
    bar = progress.Progress(40, 0)
    bar.advance(10, {"loss": 0.9, "lr": 1e-3, "samples_per_second": 10.0})
    bar.close()
    assert len(re.split(r"[\r\n]+", capfd.readouterr().err.strip())[-1]) <= 70


@pytest.mark.parametrize(
    "losses, ending",
    [
        ([0.9], "validation loss 0.9000, the first"),
        ([0.9, 0.8], "validation loss 0.8000, the best so far"),
        ([0.9, 0.8, 1.1], "validation loss 1.1000, best so far 0.8000 at step 2"),
        ([float("nan"), 0.7], "validation loss 0.7000, the first"),
        ([0.7, float("nan")], "validation loss nan, best so far 0.7000 at step 1"),
    ],
)
def test_a_validation_says_the_best_so_far(losses, ending, tmp_path, capfd):
    run = RunFolder(tmp_path, is_writer=True)
    with logs_of(run) as logs:
        logs.on_start(9, 0)
        for step, loss in enumerate(losses, 1):
            logs.on_validation(validated(step, loss))
    lines = [line for line in capfd.readouterr().err.splitlines() if "validation" in line]
    assert lines[-1] == f"step {len(losses)}: {ending}"
    finite = [(loss, step) for step, loss in enumerate(losses, 1) if loss == loss]
    assert lowest(run.log.records) == min(finite)[::-1]


def test_a_log_file_gets_lines_of_a_long_command_and_none_of_a_short_one(capfd, monkeypatch):
    assert [*shown(range(5), "merging", "tensors")] == [*range(5)] and capfd.readouterr().err == ""
    clock = iter([0.0, *(11.0 * step for step in range(1, 9))])
    monkeypatch.setattr("sat_lora.terminal.progress.time.monotonic", lambda: next(clock))
    assert [*shown("abc", "answering", "batches")] == [*"abc"]
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "answering: 0 of 3 batches, ? left" and lines[1] == "answering: 1 of 3 batches, 00:44 left"
    assert lines[-1] == "answering: 3 of 3 batches, 00:44" and as_time(3725) == "1:02:05"
