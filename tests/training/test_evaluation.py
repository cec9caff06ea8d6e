"""The shares that evaluation reports, against answers read by plain recomputation without a cache."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from sat_lora import add_lora, load_adapter, save_adapter
from sat_lora.cogvlm.checkpoints.load import load_cogvlm
from sat_lora.cogvlm.inputs.image import load_image
from sat_lora.cogvlm.inputs.text import build_sample, load_tokenizer, prompt_for
from sat_lora.errors import DataError
from sat_lora.parallel.distributed import init_distributed, init_model_parallel, run_on_all_ranks
from sat_lora.training.answers.prediction import lines_of
from sat_lora.training.evaluation import answer_test_data, evaluate_adapter, evaluation_table
from tests.support.configs import config_of
from tests.support.paths import TINY_BASE
from tests.support.patience import patient
from tests.support.picture_files import write_images
from tests.support.ranks import run_ranks
from tests.support.scripts import load_script
from tests.support.tiny import fill_adapters, logits_of

LORA = dict(r=4, modules_to_save=["boi"])
QUERIES = ("CAPTCHA:", "A", "CAPTCHA: what is it?")  # prompts of one batch have several lengths


def read_plainly(model, tokenizer, path, query):
    """Greedy decoding of one image, everything computed again for every token."""
    image, said = load_image(path, (42, 42)), []
    for _ in range(4):
        sample = build_sample(tokenizer, prompt_for("base", query), None, 36, 64, image)
        ids = torch.cat([sample.input_ids, torch.tensor(said, dtype=torch.long)])
        more = sample.position_ids[-1] + 1 + torch.arange(len(said))
        zeros = torch.zeros(len(said), dtype=torch.long)
        batch = dict(
            input_ids=ids[None],
            position_ids=torch.cat([sample.position_ids, more])[None],
            image_embed_mask=torch.cat([sample.image_embed_mask, zeros])[None],
            vision_expert_mask=torch.cat([sample.vision_expert_mask, zeros])[None],
            images=image[None],
        )
        with torch.no_grad():
            token = int(logits_of(model, batch)[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        said.append(token)
    return tokenizer.decode(said, skip_special_tokens=True).strip()


def prepare(folder, captchas):
    """An adapter that changes what is read, and items whose answers are what base or adapter really say."""
    init_model_parallel(init_distributed())
    torch.set_num_threads(1)
    tokenizer, paths = load_tokenizer(TINY_BASE), sorted(Path(captchas, "test").rglob("*.png"))[:12]
    model, _ = load_cogvlm(TINY_BASE)
    model.eval()
    questions = [(path, QUERIES[number % len(QUERIES)]) for number, path in enumerate(paths)]
    base_says = [read_plainly(model, tokenizer, *question) for question in questions]
    add_lora(model, **LORA)
    fill_adapters(model, std=0.05)
    with torch.no_grad():
        model.mixins["eva"].boi += 0.3
    save_adapter(model, folder / "adapter")
    model, _ = load_cogvlm(TINY_BASE)
    load_adapter(model.eval(), folder / "adapter")
    adapter_says = [read_plainly(model, tokenizer, *question) for question in questions]
    answers = [text or "never said" for text in base_says[:6] + adapter_says[6:9]] + ["never said"] * 3
    lines = [dict(image=str(path), prompt=query, answer=answer) for (path, query), answer in zip(questions, answers)]
    lines += [{"image": str(folder / "missing.png"), "answer": answer} for answer in "12"]
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return [sum(map(str.__eq__, said, answers)) / 12 for said in (base_says, adapter_says)]


def evaluate(folder, batch_size, model_parallel=1, with_trained_model=False):
    world = init_model_parallel(init_distributed(), model_parallel)
    torch.set_num_threads(1)
    options = config_of(
        from_pretrained=str(TINY_BASE), test_data=[str(folder / "items.jsonl")], version="base", prompt="CAPTCHA:",
        max_length=64, eval_batch_size=batch_size, model_parallel_size=model_parallel,
    )  # fmt: skip
    if not with_trained_model:
        measured = answer_test_data(options, folder / "adapter", world)
        return {**measured.result, "lines": "".join(lines_of(measured.predictions, measured.scores))}
    trained = load_cogvlm(TINY_BASE, model_parallel_size=model_parallel)
    add_lora(trained[0].train(), **LORA)
    fill_adapters(trained[0], seed=1)  # not what was saved
    with torch.no_grad():
        trained[0].mixins["eva"].boi -= 0.3
    measured = answer_test_data(options, folder / "adapter", world, trained)
    return {**measured.result, "lines": "".join(lines_of(measured.predictions, measured.scores))}


def evaluate_where_one_has_no_data(folder):
    """The mistake that each rank raises; the second has its data in another place than the first."""
    world = init_model_parallel(init_distributed())
    os.chdir(folder / str(world.rank))
    config = config_of(from_pretrained=str(TINY_BASE), test_data=["images"], version="base", max_length=64)
    with pytest.raises(DataError) as error:
        run_on_all_ranks(evaluate_adapter, config, None, world)
    return str(error.value)


def test_what_one_rank_cannot_read_every_rank_says(tmp_path):
    write_images(tmp_path / "0" / "images", ["a.png", "b.png"])
    (tmp_path / "1").mkdir()
    first, second = run_ranks(evaluate_where_one_has_no_data, 2, tmp_path, timeout=60)
    assert first == second and first.startswith("--test-data: images")


def test_shares_equal_those_counted_by_hand_however_the_work_is_split(tmp_path, captchas):
    ((base, adapter),) = run_ranks(prepare, 1, tmp_path, captchas)
    assert base != adapter
    results = run_ranks(evaluate, 1, tmp_path, 5) + run_ranks(evaluate, 2, tmp_path, 2)
    results += run_ranks(evaluate, 2, tmp_path, 4, model_parallel=2)
    results += run_ranks(evaluate, 1, tmp_path, 5, with_trained_model=True)
    results += run_ranks(evaluate, 2, tmp_path, 4, model_parallel=2, with_trained_model=True)
    for result in results:
        assert result["images"] == 12
        assert result["base"]["exact_match"] == pytest.approx(base)
        assert result["adapter"]["exact_match"] == pytest.approx(adapter)
        assert [Path(path).name for path in result["broken"]] == ["missing.png"]
        assert result["broken_samples"] == 2
        assert result["lines"] == results[0]["lines"]  # byte for byte
        measured = result["metrics"]["exact-match"]["adapter"]
        assert measured["value"] == result["adapter"]["exact_match"]
        assert 0 <= measured["low"] <= measured["value"] <= measured["high"] <= 1
    lines = [json.loads(line) for line in results[0]["lines"].splitlines()]
    assert [line["sample"].rpartition(" ")[2] for line in lines] == [str(number) for number in range(1, 13)]
    exact = [line["scores"]["base"]["exact-match"] for line in lines]
    assert sum(exact) / 12 == pytest.approx(base)
    assert all((line["predictions"]["base"] == line["answer"]) == score for line, score in zip(lines, exact))


def evaluate_by_script(options):
    """The exit status of evaluate_cogvlm.py."""
    return load_script("evaluate_cogvlm").main(options)


def test_the_script_writes_what_it_measured(tmp_path, captchas):
    out = tmp_path / "result.json"
    options = ["--from_pretrained", str(TINY_BASE), "--test-data", str(captchas / "test"), "--version", "base"]
    options += ["--max_length", "64", "--out", str(out), "--gallery", "--metrics", "token-f1", "perplexity"]
    assert run_ranks(evaluate_by_script, 1, options) == [0]
    assert json.loads(out.read_text())["images"] == 12
    lines = (tmp_path / "result.predictions.jsonl").read_text().splitlines()
    assert len(lines) == 12 and {*json.loads(lines[0])["predictions"]} == {"base"}
    assert [*json.loads(lines[0])["scores"]["base"]] == ["token-f1", "perplexity"]
    assert (tmp_path / "result.html").read_text().count("<section>") == 12


def test_a_metric_that_fails_after_all_was_answered_loses_nothing(tmp_path, captchas):
    label = max(path.stem for path in (captchas / "test").rglob("*.*"))
    own = tmp_path / "own.py"
    own.write_text(
        "def late(prediction, answers):\n"
        f"    if answers == [{label!r}]: raise KeyError('no such word')\n"
        "    return 1.0\n"
    )
    out = tmp_path / "result.json"
    options = ["--from_pretrained", str(TINY_BASE), "--test-data", str(captchas / "test"), "--version", "base"]
    options += ["--max_length", "64", "--out", str(out), "--metrics", "token-f1", f"{own}:late"]
    assert run_ranks(evaluate_by_script, 1, options) == [2]
    lines = [json.loads(line) for line in (tmp_path / "result.predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 12 and all([*line["scores"]["base"]] == ["token-f1"] for line in lines)
    assert json.loads(out.read_text())["images"] == 12 and [*json.loads(out.read_text())["metrics"]] == ["token-f1"]


@pytest.mark.matrix
def test_several_adapters_answer_side_by_side(tmp_path, captchas):
    """One as it was saved, and one whose deltas are scaled to nothing; on two ranks, without the base."""
    run_ranks(prepare, 1, tmp_path, captchas)
    (tmp_path / "weak").mkdir()
    shutil.copytree(tmp_path / "adapter", tmp_path / "weak" / "adapter")
    config = tmp_path / "weak" / "adapter" / "adapter_config.json"
    content = json.loads(config.read_text())
    for layer in content["sat_lora"]["layers"].values():
        layer["scale"] *= 1e-4
    config.write_text(json.dumps(content))
    options = ["--from_pretrained", str(TINY_BASE), "--test-data", str(tmp_path / "items.jsonl"), "--version", "base"]
    options += ["--max_length", "64", "--no-base", "--out", str(tmp_path / "both.json"), "--gallery"]
    folders = [str(tmp_path / "adapter"), str(tmp_path / "weak" / "adapter")]
    assert run_ranks(evaluate_by_script, 2, [*options, "--adapter", *folders]) == [0, 0]
    both = json.loads((tmp_path / "both.json").read_text())
    first, second = both["adapters"]
    assert second == "weak" and "base" not in both and both["of"]["base_alone"] is False
    for name, folder in zip((first, second), folders):
        out = tmp_path / f"{Path(folder).parent.name}.json"
        single = [option for option in options if option != "--no-base"]
        single[single.index("--out") + 1] = str(out)
        assert run_ranks(evaluate_by_script, 1, [*single, "--adapter", folder]) == [0]
        alone = json.loads(out.read_text())
        assert alone["adapter"] == both["adapters"][name]
        said = [
            [json.loads(line)["predictions"][side] for line in file.read_text().splitlines()]
            for file, side in (
                (out.with_suffix(".predictions.jsonl"), "adapter"),
                (tmp_path / "both.predictions.jsonl", name),
            )
        ]
        assert said[0] == said[1]
    lines = [json.loads(line) for line in (tmp_path / "both.predictions.jsonl").read_text().splitlines()]
    assert any(line["predictions"][first] != line["predictions"][second] for line in lines)


@pytest.mark.matrix
@pytest.mark.parametrize("option, message", [("--test-data", "--test-data: .*nothing: no images there"),
                                             ("--adapter", "nothing is not an adapter folder"),
                                             ("--run", "--run: .*nothing is no run folder")])  # fmt: skip
def test_the_script_tells_a_mistake_in_one_message(option, message, tmp_path, captchas):
    import os
    import re
    import subprocess
    import sys

    (tmp_path / "nothing").mkdir()
    script = TINY_BASE.parent / "evaluate_cogvlm.py"
    good = ["--from_pretrained", str(TINY_BASE), "--adapter", str(tmp_path), "--test-data", str(captchas / "test")]
    own_group = ("MASTER_PORT", "RANK", "WORLD_SIZE")  # this process may be one of its own
    environment = {k: v for k, v in os.environ.items() if k not in own_group} | {
        "PYTHONPATH": str(TINY_BASE.parents[1])
    }
    done = subprocess.run(
        [sys.executable, str(script), *good, option, str(tmp_path / "nothing")],
        capture_output=True, text=True, timeout=patient(100), env=environment,
    )  # fmt: skip
    assert done.returncode == 2
    assert re.search(message, done.stderr), done.stderr
    assert "Traceback" not in done.stderr


def test_the_table_shows_both_sides():
    side = {"exact_match": 0.058, "exact_match_ignoring_case": 0.06}
    text = evaluation_table({"images": 500, "base": side, "adapter": {**side, "exact_match": 0.954}})
    assert "500 images" in text and "5.8 %" in text and "95.4 %" in text
