"""run.json, state.json, pointers, logs as editors, other versions and attackers leave them: one error, or nothing."""

import json
import os
import time
from argparse import Namespace

import pytest

from sat_lora.data.batches.sources import FileSource
from sat_lora.errors import CheckpointError, ConfigError, DataError
from sat_lora.training import finetune
from sat_lora.training.evaluation import evaluated, evaluation_file, try_to_write
from sat_lora.training.preflight import option_problems
from sat_lora.training.resume import check_data, facts_of_run, notes, settled_problems
from sat_lora.training.runs.logs.run_logs import read_records
from sat_lora.training.runs.run_folder import RunFolder, write_json
from sat_lora.training.settings.config import DEFAULTS
from sat_lora.training.settings.resolve import resolve
from sat_lora.training.settings.run_settings import settings_of_run
from sat_lora.training.steps.checkpoint import STATE, RunState, newest_checkpoint, read_state
from sat_lora.training.steps.random_state import parsed, random_state
from tests.support.configs import config_of, parse_options
from tests.support.paths import TINY_BASE
from tests.support.run_logs import logs_of
from tests.support.stored_state import stored_state

# run.json

WRONG_SETTINGS = {
    "train_data": ["/", {"a": 1}, [], [3], ["a", None], [["a"]], 7, True, ["nul\0"]],
    "from_pretrained": [3, ["a"], True],
    "lr": ["abc", "1e-4", 0, -1, True, [1], 10**400],
    "batch_size": [0, -1, 1.5, "4", None, True, 10**400, 10**9],
    "gradient_accumulation_steps": [10**30, 2**20 + 1, 0],
    "num_workers": [10**30, 1025, -1],
    "log_interval": [0, None],
    "zero_stage": [4, "2", 2.0, True, [2]],
    "version": ["v9", 3, ["chat"]],
    "lr_decay_style": ["exponential", 0],
    "split": ["1,2", [], [0, 1], [1, 2, 3, 4], ["1"], [True], 1],
    "betas": [[0.9], [0.9, "x"], 0.9, None, [0.9, 1.5], [True, False]],
    "eps": ["x", -1, None],
    "bf16": [1, "true", None],
    "seed": [-1, "1234", 1.5, None],
    "warmup": ["x", -0.5],
    "experiment_name": [3, None],
    "watchdog_limit": ["soon"],
}


def run_with(tmp_path, content):
    (tmp_path / "run.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return tmp_path


@pytest.mark.parametrize("name", WRONG_SETTINGS)
def test_a_setting_that_no_option_gives_is_named_with_what_was_wanted(name, tmp_path):
    for value in WRONG_SETTINGS[name]:
        with pytest.raises(ConfigError) as error:
            settings_of_run(run_with(tmp_path, {"settings": {name: value}}))
        message = str(error.value)
        assert f"{tmp_path}/run.json has settings that no run has: {name}: got " in message, value
        assert "wanted " in message and "\n" not in message and len(message) < 500


def test_all_wrong_settings_come_in_one_message(tmp_path, capsys):
    run_with(tmp_path, {"settings": {"lr": "abc", "batch_size": 0, "train_data": "/", "given": "lr"}})
    with pytest.raises(SystemExit) as stop:
        parse_options(["--resume", str(tmp_path)], environ={})
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1
    assert all(f"{name}: " in message for name in ("--resume", "lr", "batch_size", "train_data", "given"))


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "null", '{"settings": []}', "[" * 10**5, "{}", "\ufeff["])
def test_what_is_no_run_json_is_one_error(content, tmp_path):
    with pytest.raises(ConfigError, match="is no run folder with a readable run.json: .*; mend that file"):
        settings_of_run(run_with(tmp_path, content))


NO_FILES = {
    "a pipe": os.mkfifo,
    "a folder": os.mkdir,
    "a device": lambda path: os.symlink("/dev/zero", path),
    "a link to itself": lambda path: os.symlink(path, path),
    "a hole of a tebibyte": lambda path: path.touch() or os.truncate(path, 1 << 40),
}


@pytest.mark.parametrize("what", NO_FILES)
def test_a_run_json_that_is_no_file_is_never_waited_for(what, tmp_path):
    NO_FILES[what](tmp_path / "run.json")
    start = time.process_time()
    with pytest.raises(ConfigError, match="no run folder with a readable run.json"):
        settings_of_run(tmp_path)
    assert time.process_time() - start < 2


def test_what_a_run_writes_is_read_and_what_editors_do_to_it_has_no_effect(tmp_path):
    argv = ["--train-data", "b c", "--lr", "1e-5", "--split", "0.9,0.1", "--rank_pattern", "dense=4", "--epochs", "1.5"]
    options = parse_options(argv, environ={})
    RunFolder(tmp_path, is_writer=True).write_settings(options, world={})
    plain = settings_of_run(tmp_path)
    assert plain["lr"] == 1e-5 and plain["split"] == [0.9, 0.1] and plain["rank_pattern"] == {"dense": 4}
    content = json.loads((tmp_path / "run.json").read_text())
    content["settings"] |= {"an_option_of_later_on": [1, {}], "lr": 1e-5}
    edited = "\ufeff" + json.dumps(content, indent=4).replace("\n", "\r\n")
    assert settings_of_run(run_with(tmp_path, edited)) == plain


def test_other_folders_are_told_what_they_are(tmp_path):
    run = tmp_path / "runs" / "mine"
    (run / "adapter" / "4").mkdir(parents=True)
    (run / "run.json").write_text('{"settings": {}}')
    (tmp_path / "killed" / "watchdog").mkdir(parents=True)
    for path, hint in {
        tmp_path / "killed": "a run there was ended before its first step; start it anew",
        tmp_path / "nowhere": "there is no such folder; give a run folder like runs/NAME",
        run / "adapter": f"it lies in a run folder; give {run}",
        run / "adapter" / "4": f"it lies in a run folder; give {run}",
        tmp_path / "runs": "in it there are mine",
    }.items():
        with pytest.raises(ConfigError) as error:
            settings_of_run(path)
        assert f"{path} is no run folder with a readable run.json" in str(error.value) and hint in str(error.value)


# state.json

STATE_OF_4 = stored_state()
WRONG_STATES = {
    "step": [3, 10**9, "4", 4.0, None, True, -4],
    "skipped": [-1, 5, "0", None],
    "steps_taken": [5, -1, "3", 1.5],
    "samples_per_step": [0, "8", None, 2**60],
    "best_loss": ["low", [1], True],
    "best_step": [5, -1, "2"],
    "best_value": ["low", [1], True, float("nan"), float("inf")],
    "not_better": [-1, "2", 1.5, None],
    "good_step": [5, 1.5],
    "owes_validation": [0, "no", None],
    "layout": [[1], "11", [0, 1], [1, "1"], [1, 2**40], None],
    "loss_scale": [[], {"cur_scale": "x"}, {"cur_scale": None}, 3],
    "random": [[], {}, [[]], [{}, {}], None, "x"],
    "run": [[], None, "x"],
}


def state_with(tmp_path, content):
    folder = tmp_path / "4"
    folder.mkdir(exist_ok=True)
    (folder / STATE).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def test_a_state_is_read_as_it_was_written(tmp_path):
    state = read_state(state_with(tmp_path, STATE_OF_4))
    assert {name: value for name, value in state.items() if name != "random"} == {
        name: value for name, value in STATE_OF_4.items() if name != "random"
    }
    parsed(state["random"][0])


@pytest.mark.parametrize("name", WRONG_STATES)
def test_a_value_that_no_checkpoint_has_is_named(name, tmp_path):
    for value in WRONG_STATES[name]:
        with pytest.raises(CheckpointError) as error:
            read_state(state_with(tmp_path, {**STATE_OF_4, name: value}))
        message = str(error.value)
        assert f"4/{STATE}: cannot be used: " in message and f"{name}: wanted " in message and len(message) < 600, value
    missing = {key: value for key, value in STATE_OF_4.items() if key != name}
    if name in ("best_step", "best_value", "not_better", "good_step", "run"):  # older versions lack them
        read_state(state_with(tmp_path, missing))
    else:
        with pytest.raises(CheckpointError, match=f"{name} is missing"):
            read_state(state_with(tmp_path, missing))


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "[" * 10**5, '"text"'])
def test_what_is_no_state_is_one_error(content, tmp_path):
    with pytest.raises(CheckpointError, match=f"--resume: {tmp_path}/4/{STATE}: cannot be "):
        read_state(state_with(tmp_path, content))


def test_a_best_loss_of_older_versions_that_is_no_number_counts_as_none(tmp_path):
    for text in ("NaN", "Infinity", "-Infinity", "1e999"):
        content = json.dumps({**STATE_OF_4, "best_loss": 0.125}).replace("0.125", text)
        assert read_state(state_with(tmp_path, content))["best_loss"] is None


SPOILED = {
    "python": [None, [], [3, [1, 2], None], [3, ["x"] * 625, None], [9, [0] * 625, None]],
    "numpy": [None, ["MT19937", [1], 0, 0, 0.0], ["x", [0] * 624, 0, 0, 0.0], ["MT19937", [-1] * 624, 0, 0, 0.0]],
    "torch": [None, "", "zz", "00", 7, "00" * 5056],
    "cuda": [3, "zz"],
}


@pytest.mark.parametrize("name", SPOILED)
def test_random_states_are_tried_before_any_generator_is_touched(name):
    import random

    before = random.getstate()
    for value in SPOILED[name]:
        with pytest.raises(ValueError, match="no states of random generators"):
            parsed({**random_state(), name: value})
    for value in (None, [], 3, {}):
        with pytest.raises(ValueError, match="no states"):
            parsed(value)
    assert random.getstate() == before


def test_a_pointer_that_names_nothing_says_what_there_is(tmp_path):
    state_with(tmp_path, STATE_OF_4)
    message = r"holds no checkpoint \(no `latest` that names one\); it has 4: write"
    for content in (b"5\n", b"../4", b"\0" * 9, b"4" * 300, b""):
        (tmp_path / "latest").write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            newest_checkpoint(tmp_path)


# What a run goes on with


def resumed(tmp_path, *argv, facts=None, **changes):
    """(options, state) of `--resume` of a run of the given options, whose run.json is changed afterwards."""
    start = parse_options(["--train-data", "x", "--freeze_a", "--rank_pattern", "a=1", "b=2"], environ={})
    RunFolder(tmp_path, is_writer=True).write_settings(start, world={})
    run = json.loads(json.dumps(facts_of_run(start, {"samples": 9, "digest": "d"}, None) if facts is None else facts))
    content = json.loads((tmp_path / "run.json").read_text())
    content["settings"] |= changes
    write_json(tmp_path / "run.json", content)
    return parse_options(["--resume", str(tmp_path), *argv], environ={}), {**STATE_OF_4, "run": run}


def test_an_unchanged_run_goes_on_without_a_word(tmp_path):
    options, state = resumed(tmp_path)
    assert [*settled_problems(options, state)] == [*notes(options, state, None)] == []
    check_data(options.start, state, {"samples": 9, "digest": "d"})


@pytest.mark.parametrize(
    "option, value",
    [("--seed", "7"), ("--r", "4"), ("--init_lora_weights", "gaussian"), ("--lora_alpha", "3"), ("--qkv_slots", "q"),
     ("--lr_ratio", "2"), ("--rank_pattern", "b=2"), ("--bias", "all"), ("--adapter_dtype", "float32")],
)  # fmt: skip
def test_what_is_drawn_or_built_from_an_option_holds_for_good(option, value, tmp_path):
    options, state = resumed(tmp_path, option, value)
    (problem,) = settled_problems(options, state)
    assert problem.startswith(f"{option}: got ") and "the run to resume has" in problem and "leave it out" in problem


@pytest.mark.parametrize(
    "name, value", [("seed", 7), ("freeze_a", False), ("lora_dropout", 0.5), ("rank_pattern", {"b": 2, "a": 1})]
)
def test_the_checkpoint_knows_better_than_an_edited_run_json(name, value, tmp_path):
    options, state = resumed(tmp_path, **{name: value})
    (problem,) = settled_problems(options, state)
    assert problem.startswith(f"--{name}: got ") and "in run.json, but its checkpoint was made with" in problem


def test_other_settings_and_libraries_are_said(tmp_path):
    options, state = resumed(tmp_path, "--lr", "0.5", "--keep", "7")
    state["run"]["versions"]["torch"] = "1.0"
    changed, libraries = notes(options, state, None)
    assert changed == "resumed with other settings: --keep 7 (was 3), --lr 0.5 (was 0.0001)"
    assert "other libraries, so not bit for bit: torch" in libraries and "(was 1.0)" in libraries


def test_a_checkpoint_of_an_older_version_goes_on_with_a_word(tmp_path):
    options, state = resumed(tmp_path, facts={})
    assert [*settled_problems(options, state)] == []
    check_data(options.start, state, {"samples": 3, "digest": "e"})
    assert ["of an older version" in note for note in notes(options, state, None)] == [True]
    options, state = resumed(tmp_path, "--seed", "3", facts={})
    assert len([*settled_problems(options, state)]) == 1  # run.json says it


@pytest.mark.parametrize("run", [{"settings": [], "versions": 3, "data": "x"}, {"settings": {"seed": [1]}, "data": []}])
def test_a_spoiled_record_of_the_run_is_no_traceback(run, tmp_path):
    options, state = resumed(tmp_path, facts=run)
    [*settled_problems(options, state), *notes(options, state, None)]
    check_data(options.start, state, {"samples": 3, "digest": "e"})


@pytest.mark.parametrize(
    "before, adapters, named, expected",
    [
        ({"samples": 1}, (2, 4), 2, (1.5, 2)),
        ({"samples": 1}, (4,), 2, (None, None)),  # somebody has removed it
        ({"samples": 2}, (2, 4), 2, (None, None)),  # losses of other data are no measure
        ({"samples": 1}, (2, 4), None, (1.5, 2)),  # of a version that kept it in the pointer alone
        ({"samples": 1}, (4, 6), None, (None, None)),  # and had moved that before it was killed
    ],
)
def test_the_best_loss_holds_where_its_adapter_and_its_data_do(
    before, adapters, named, expected, tmp_path, monkeypatch, capsys
):
    stored = {**STATE_OF_4, "best_step": named, "run": {"valid_data": before}}
    (tmp_path / "checkpoints").mkdir()
    state_with(tmp_path / "checkpoints", stored)
    (tmp_path / "checkpoints" / "latest").write_text("4")
    for step in adapters:
        (tmp_path / "adapter" / str(step)).mkdir(parents=True)
    (tmp_path / "adapter" / "best").write_text("6" if 6 in adapters else "2")
    loaded = RunState(step=4, best_loss=1.5, best_step=named, not_better=2)
    monkeypatch.setattr(finetune, "load_checkpoint", lambda *args, **more: loaded)
    run = RunFolder(tmp_path, is_writer=True)
    run.facts = {"valid_data": {"samples": 1}}
    state = finetune._state(None, config_of(resume=str(tmp_path)).start, 4, run, None)
    assert (state.best_loss, state.best_step) == expected
    assert state.not_better == (2 if expected[0] else 0)
    assert "already at step 4 of 4; to go on, give a --train-iters above 4" in capsys.readouterr().out


def test_changed_data_is_refused_unless_any_will_do(tmp_path):
    options, state = resumed(tmp_path)
    for data, words in (
        ({"samples": 10, "digest": "e"}, "9 samples then, 10 now"),
        ({"samples": 9, "digest": "e"}, "9 samples, other ones or in another order"),
    ):
        with pytest.raises(DataError, match=f"has changed since step 4: {words}.*--any-data"):
            check_data(options.start, state, data)
    options, state = resumed(tmp_path, "--any-data")
    check_data(options.start, state, {"samples": 10, "digest": "e"})


def test_the_description_of_data_follows_names_answers_and_order_and_not_the_place(tmp_path):
    from sat_lora.data.samples import Item

    def description(*items):
        source = FileSource([], lambda items: Namespace(items=items), Namespace(), None)
        source.dataset, source.samples = Namespace(items=list(items)), len(items)
        return source.description()

    a, b = Item(tmp_path / "a.png", "a"), Item(tmp_path / "b.png", "b", "why?")
    plain = description(a, b)
    assert plain == description(Item(tmp_path / "moved" / "a.png", "a"), b)
    others = [(b, a), (a,), (a, b, b), (Item(tmp_path / "a.png", "A"), b), (a, Item(tmp_path / "b.png", "b"))]
    others += [(Item(None, "a"), b), (Item(tmp_path / "c.png", "a"), b), (Item(None, "half \ud83d"),)]
    digests = {description(*items)["digest"] for items in others}
    assert len(digests) == len(others) and plain["digest"] not in digests


def test_other_pictures_under_the_same_names_are_said(tmp_path):
    from sat_lora.data.batches.sources import sizes_mark
    from sat_lora.data.samples import Item

    images = [Item(tmp_path / f"{number}.png", "a") for number in range(3)]
    for number, item in enumerate(images):
        item.image.write_bytes(b"x" * (number + 1))
    before = sizes_mark(images)
    (tmp_path / "1.png").write_bytes(b"other")
    after = sizes_mark(images)
    (tmp_path / "2.png").unlink()
    assert len({before, after, sizes_mark(images), sizes_mark(images[:1]), sizes_mark([])}) == 5
    options, state = resumed(tmp_path)
    state["run"]["files"] = before
    assert [*notes(options, state, None, before)] == []
    (note,) = notes(options, state, None, after)
    assert note.startswith("warning: files of the training data have other sizes than they had up to step 4")
    del state["run"]["files"]  # of an earlier version
    assert [*notes(options, state, None, after)] == []


@pytest.mark.parametrize("value", [None, "4", [], {"a": 1}, True, -1, 0])
def test_a_factor_of_a_wrong_type_is_a_problem_of_its_option(value):
    stored = {"from_pretrained": str(TINY_BASE), "train_data": ["x"], "version": "base", "max_length": 64}
    config, _ = resolve({}, resumed_run={**stored, "lr_ratio": value, "given": []})
    assert ["--lr_ratio" in problem for problem in option_problems(config, {}, "cpu")[0]] == [True]


def test_options_of_one_start_do_not_come_back(capsys):
    for argv, words in ((["--overwrite", "--resume", "x"], "give one of them"), (["--any-data"], "it is for --resume")):
        with pytest.raises(SystemExit):
            parse_options(argv, environ={})
        assert words in capsys.readouterr().err


def test_every_default_is_a_value_that_a_run_json_may_have(tmp_path):
    settings_of_run(run_with(tmp_path, {"settings": dict(DEFAULTS)}))


# Where evaluations go


@pytest.fixture
def runs(tmp_path):
    """Two runs of one base, each with an adapter and an evaluation."""
    for name in ("a", "b"):
        run = tmp_path / name
        (run / "adapter" / "4").mkdir(parents=True)
        (run / "adapter" / "latest").write_text("4\n")
        write_json(run / "run.json", {"settings": {"from_pretrained": str(tmp_path / "base")}})
        write_json(run / "evaluation.json", {"images": 1})
    return tmp_path


def of(runs, adapter, base="base", run=None, out=None):
    config = config_of(from_pretrained=str(runs / base), test_data=["x"])
    return Namespace(config=config, adapter=str(runs / adapter), run=run and str(runs / run), out=out)


def place_of(evaluation):
    """Where the evaluation is written, and the run that it is of."""
    return evaluation_file(evaluation.config, adapter=evaluation.adapter, run=evaluation.run, out=evaluation.out)


def test_a_runs_own_evaluation_is_that_of_its_adapter_on_its_base(runs):
    for adapter in ("a/adapter", "a/adapter/4", "a/adapter/latest", "b/../a/adapter/"):
        for run in (None, "a"):
            assert place_of(of(runs, adapter, run=run)) == (runs / "a" / "evaluation.json", runs / "a")


def test_any_other_evaluation_goes_where_nothing_is_lost(runs):
    other_base = of(runs, "a/adapter", base="other")
    assert place_of(other_base) == (runs / "a" / "evaluation-2.json", None)
    foreign = of(runs, "b/adapter", run="a")
    write_json(runs / "a" / "evaluation-2.json", {"images": 2, "of": evaluated(foreign.config, foreign.adapter)})
    assert place_of(other_base) == (runs / "a" / "evaluation-3.json", None)
    assert place_of(foreign) == (runs / "a" / "evaluation-2.json", None)  # the same once more
    loose = of(runs, "c/adapter")
    (runs / "c" / "adapter").mkdir(parents=True)
    assert place_of(loose) == (runs / "c" / "evaluation.json", None)
    (runs / "c" / "evaluation.json").write_text("mine, and no json")
    assert place_of(loose) == (runs / "c" / "evaluation-2.json", None)


def test_another_evaluation_of_a_run_leaves_the_first_one(runs):
    first = of(runs, "a/adapter", run="a")
    write_json(runs / "a" / "evaluation.json", {"images": 1, "of": evaluated(first.config, first.adapter)})
    assert place_of(first) == (runs / "a" / "evaluation.json", runs / "a")  # the same once more
    (runs / "a" / "adapter" / "9").mkdir()
    others = [
        Namespace(**{**vars(first), "config": first.config.replaced(test_data=["y"])}),
        Namespace(**{**vars(first), "config": first.config.replaced(prompt="What else?")}),
        Namespace(**{**vars(first), "adapter": str(runs / "a" / "adapter" / "9")}),
    ]
    for number, other in enumerate(others, 2):
        place, run = place_of(other)
        assert (place, run) == (runs / "a" / f"evaluation-{number}.json", runs / "a")
        write_json(place, {"images": 1, "of": evaluated(other.config, other.adapter)})
        assert place_of(other) == (place, run)


def test_bases_of_one_name_that_are_evaluated_alone_do_not_share_a_file(runs, monkeypatch):
    monkeypatch.chdir(runs)
    one, other = (
        Namespace(config=config_of(from_pretrained=f"{x}/merged", test_data=["x"]), adapter=None, run=None, out=None)
        for x in "ab"
    )
    write_json("evaluation-merged.json", {"images": 1, "of": evaluated(one.config, None)})
    assert str(place_of(one)[0]) == "evaluation-merged.json"
    assert str(place_of(other)[0]) == "evaluation-merged-2.json"


def test_a_given_file_is_taken_and_tried_first(runs):
    assert place_of(of(runs, "b/adapter", run="a", out="x.json"))[1] is None
    own = str(runs / "a" / "evaluation.json")
    assert place_of(of(runs, "b/adapter", out=own))[1] == runs / "a"
    for out in (runs / "nowhere" / "x.json", runs / "a", runs / "a" / "run.json" / "x"):
        with pytest.raises(ConfigError, match=f"--out: {out}: cannot be written"):
            try_to_write(out)
    lines = '{"image": "a.png", "answer": "7"}\n' * 2
    for number, content in enumerate((lines, '{"settings": {}}', "[]", "7", "free text")):
        (runs / f"{number}.json").write_text(content)
        with pytest.raises(ConfigError, match="something else than an evaluation lies there; give another file"):
            try_to_write(runs / f"{number}.json")
        assert (runs / f"{number}.json").read_text() == content
    try_to_write(runs / "b" / "evaluation.json")
    (runs / "empty").touch()
    try_to_write(runs / "empty")  # as mktemp makes it
    write_json(runs / "again.json", {"images": 3})
    try_to_write(runs / "again.json")
    try_to_write(runs / "x.json")
    assert not (runs / "x.json").exists()


# The log


def test_a_log_of_anything_is_read_as_far_as_it_is_one(tmp_path):
    path = tmp_path / "train.jsonl"
    lines = [b'{"step": 1, "loss": 2}', b"[1]", b"{", b"3", b'{"step": "2"}', b'{"loss": 1}', b"\xff", b"[" * 10**5]
    path.write_bytes(b"\n".join(lines))
    assert read_records(path) == [{"step": 1, "loss": 2}, {"loss": 1, "step": 0}]
    run = RunFolder(tmp_path, is_writer=True)
    with logs_of(run) as logs:
        logs.on_start(4, 2)
        assert len(run.log.records) == 2


def test_numbers_that_are_not_finite_are_null_in_every_file(tmp_path):
    write_json(tmp_path / "x.json", {"a": float("nan"), "b": [1.5, (float("inf"),)], "c": {"d": -float("inf")}})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": None, "b": [1.5, [None]], "c": {"d": None}}
