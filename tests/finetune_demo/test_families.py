"""A tiny base of every successor of CogVLM from its making to its last file, in one process each."""

import json
import os
import re
import shlex
import sys

import pytest
import torch

from sat_lora.adapters.merge import merge_adapter
from sat_lora.adapters.verify import verify_merge
from sat_lora.chat.session import Chat
from sat_lora.cogvlm.checkpoints.load import load_cogvlm, read_config
from sat_lora.cogvlm.checkpoints.quantized_writer import quantize_base
from sat_lora.cogvlm.families import FAMILIES, family_of
from sat_lora.commands import evaluate
from sat_lora.errors import ConfigError
from sat_lora.files.step_folders import follow
from sat_lora.interop.peft_export import export_to_peft
from sat_lora.interop.peft_import import import_from_peft
from sat_lora.quantization.config import Quantization
from sat_lora.training.evaluation import _refuse_other_sizes
from sat_lora.training.preflight import option_problems
from tests.support.configs import parse_options
from tests.support.demo_runs import options_for
from tests.support.films import write_film
from tests.support.paths import DEMO, TINY_BASE
from tests.support.picture_files import write_images
from tests.support.ranks import run_ranks
from tests.support.scripts import load_script, run_script


def make_base(folder, family):
    sys.path.insert(0, str(DEMO))
    try:
        load_script("make_tiny_cogvlm").make_tiny_sibling(folder, family)
    finally:
        sys.path.remove(str(DEMO))
    return folder


def losses(run):
    records = [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def watch_films(home, base):
    """Train a step on a film of a file and one of a folder; return the file."""
    film = write_film(home / "film.mp4", 6, 2, b_frames=2)
    write_images(home / "frames", [f"{number}.png" for number in range(3)])
    samples = [{"video": video, "prompt": "What?", "answer": "1234"} for video in ("film.mp4", "frames")]
    lines = home / "films.jsonl"
    lines.write_text("".join(f"{json.dumps(sample)}\n" for sample in samples))
    options = ["--train-iters", "1", "--max_length", "300", "--batch-size", "2", "--split", "1"]
    options += ["--from_pretrained", str(base), "--version", "base", "--num-workers", "0", "--save", str(home)]
    status, errors = run_script([*options, "--train-data", str(lines), "--experiment-name", "films"])
    assert status == 0, errors
    assert [*losses(home / "films")] == [1] and not (home / "films" / "broken.jsonl").exists()
    return film


def live_through_all(family, home, captchas):
    """Train, go on, evaluate, look with the doctor, merge both ways, export, import; what of it can be compared."""
    os.chdir(home)
    base = make_base(home / "base", family)
    options = options_for(captchas, home, "--from_pretrained", str(base), "--r", "4", "--save-interval", "2")
    options += ["--checkpoint-activations", "--vit_checkpoint_activations", "--target_modules", "all-linear"]
    assert run_script([*options, "--doctor"])[0] == 0
    status, errors = run_script([*options, "--train-iters", "2"])
    assert status == 0, errors
    run = home / "run"
    status, errors = run_script(["--resume", str(run), "--train-iters", "4"])
    assert status == 0, errors
    evaluate = ["--run", str(run), "--test-data", str(captchas / "test"), "--max_length", "64"]
    assert load_script("evaluate_cogvlm").main(evaluate) == 0
    adapter = run / "adapter"
    picture = next((captchas / "test").rglob("*.png"))
    chat = Chat(load_cogvlm(base), adapters={"mine": adapter}, max_new_tokens=4)
    answers = [chat.ask("CAPTCHA:", picture), chat.ask("CAPTCHA:")]
    if FAMILIES[family].takes_frames:
        film = watch_films(home, base)
        watching = Chat(load_cogvlm(base), adapters={"mine": adapter}, max_new_tokens=4, max_length=300)
        answers.append(watching.ask("What?", film))
    quantize_base(base, home / "nf4", Quantization(scheme="nf4"))
    quantized = Chat(load_cogvlm(home / "nf4"), adapters={"mine": adapter}, max_new_tokens=4)
    answers.append(quantized.ask("CAPTCHA:", picture))
    merge_adapter(base, adapter, home / "sat", dtype=torch.float32)
    merge_adapter(base, adapter, home / "hf", to="hf", dtype=torch.float32)
    merge_adapter(home / "hf", adapter, home / "twice", any_base=True)
    verified = verify_merge(base, adapter, home / "sat")
    problem = ""
    try:
        export_to_peft(adapter, home / "peft", base=base)
        import_from_peft(home / "peft", home / "imported", base=base)
        merge_adapter(base, home / "imported", home / "again", dtype=torch.float32)
    except Exception as error:
        problem = str(error)
    states = {
        kind: {name: tensor.numpy() for name, tensor in load_cogvlm(home / kind)[0].state_dict().items()}
        for kind in ("sat", "hf", "again")
        if (home / kind).exists()
    }
    return dict(
        card=(follow(adapter) / "README.md").read_text(encoding="utf-8"),
        losses=losses(run),
        answers=answers,
        images=json.loads((run / "evaluation.json").read_text())["images"],
        family=family_of(read_config(home / "hf")).name,
        is_same={
            kind: all((state[name] == states["sat"][name]).all() for name in state) for kind, state in states.items()
        },
        merge_problems=verified.problems,
        problem=problem,
    )


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "cogvlm"])
def test_every_family_runs_from_end_to_end(family, tmp_path, captchas):
    (result,) = run_ranks(live_through_all, 1, family, tmp_path, captchas)
    assert sorted(result["losses"]) == [1, 2, 3, 4] and len(set(result["losses"].values())) == 4
    assert "| Images | 12 |" in result["card"] and "| Base and adapter: exact-match |" in result["card"]
    assert result["images"] == 12 and result["family"] == family and not result["merge_problems"]
    if family == "cogagent":  # the published code reads these weights without calling the modules, as PEFT would
        assert (
            "reads its weight without calling it; merge the adapter instead, or train one without" in result["problem"]
        )
    else:
        assert result["problem"] == "" and result["is_same"].keys() == {"sat", "hf", "again"}
    assert all(result["is_same"].values())
    assert len(result["answers"]) == 3 + FAMILIES[family].takes_frames


PUBLISHED = (
    "--experiment-name finetune-cogagent-chat --model-parallel-size 1 --mode finetune --train-iters 2000 "
    "--resume-dataloader --from_pretrained cogagent-chat --max_length 400 --lora_rank 50 --use_lora --local_tokenizer "
    "lmsys/vicuna-7b-v1.5 --version chat --train-data ./archive_split/train --valid-data ./archive_split/valid "
    "--distributed-backend nccl --lr-decay-style cosine --warmup .02 --checkpoint-activations "
    "--vit_checkpoint_activations --save-interval 200 --eval-interval 200 --save ./checkpoints --eval-iters 10 "
    "--eval-batch-size 1 --split 1. --deepspeed_config test_config_bf16.json --skip-init --seed 2023"
)


def test_the_options_of_cogagents_published_script_are_taken_unchanged():
    config = parse_options(shlex.split(PUBLISHED), environ={})
    assert (config.model.version, config.model.max_length, config.lora.r) == ("chat", 400, 50)
    assert config.compatibility.sizes == {}


MODEL_OPTIONS = "--image_length {image_length} --cross_image_pix {cross_image_pix} --eva_args {eva_args}"
"""The model options of that script, which are sizes of the base."""


def live_by_published_options(home, captchas):
    """CogAgent's published command on a tiny CogAgent: (status, errors) of two steps."""
    os.chdir(home)
    base = make_base(home / "cogagent-chat", "cogagent")
    sizes = read_config(base)
    given = {**sizes, "eva_args": json.dumps({"image_size": sizes["eva_args"]["image_size"]})}
    options = shlex.split(PUBLISHED) + [word.format(**given) for word in MODEL_OPTIONS.split()]
    others = {
        "--local_tokenizer": str(base), "--train-data": str(captchas / "train"),
        "--valid-data": str(captchas / "valid"),
        "--train-iters": "2", "--deepspeed_config": str(home / "test_config_bf16.json"), "--eval-iters": "1",
    }  # fmt: skip
    for option, value in others.items():
        options[options.index(option) + 1] = value
    (home / "test_config_bf16.json").write_text(json.dumps(DEEPSPEED))
    return run_script([*options, "--num-workers", "0"])


DEEPSPEED = {
    "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1, "gradient_clipping": 0.1,
    "zero_optimization": {
        "stage": 2, "contiguous_gradients": False, "overlap_comm": True, "reduce_scatter": True,
        "reduce_bucket_size": 4e7, "allgather_bucket_size": 1e8, "load_from_fp32_weights": False,
    },
    "offload_optimizer": {"device": "cpu", "pin_memory": True}, "zero_allow_untested_optimizer": True,
    "bf16": {"enabled": True}, "optimizer": {
        "type": "Adam", "params": {"lr": 1e-5, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 5e-2}},
    "activation_checkpointing": {"partition_activations": False, "contiguous_memory_optimization": False},
    "wall_clock_breakdown": False,
}  # fmt: skip
"""As its `test_config_bf16.json`."""


@pytest.mark.matrix
def test_the_published_script_trains_a_cogagent(tmp_path, captchas):
    ((status, errors),) = run_ranks(live_by_published_options, 1, tmp_path, captchas)
    assert status == 0, errors
    (run,) = (tmp_path / "checkpoints").iterdir()
    assert [*losses(run)] == [2]  # the last of a log interval


@pytest.fixture(scope="module")
def cogagent(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("bases") / "cogagent", "cogagent")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--cross_image_pix CROSS --image_length LENGTH --eva_args {}", None),
        ('--eva_args {"num_layers":LAYERS,"image_size":[SIDE,SIDE]}', None),
        ("--cross-image-pix=490", "--cross_image_pix: got 490, and the base has CROSS; leave it out"),
        ("--image_length 1225", "--image_length: got 1225, and the base has LENGTH; leave it out"),
        (
            '--eva_args {"image_size":[490,490],"patch_size":1}',
            r"--eva_args: image_size is \[490, 490\], and the base has \[SIDE, SIDE\]; .*\n?.*patch_size is 1, and",
        ),
        ('--eva_args {"depth":3}', "--eva_args: depth is 3, and the base has none; leave it out"),
        ("--eva_args [1]", r"--eva_args: got '\[1\]', wanted an object of JSON, such as {}"),
        ("--eva_args {1}", "--eva_args: .*; wanted an object of JSON, such as {}"),
    ],
)
def test_sizes_that_are_options_have_to_be_the_bases(cogagent, options, message):
    sizes = read_config(cogagent)
    vit = sizes["eva_args"]
    own = {"CROSS": sizes["cross_image_pix"], "LENGTH": sizes["image_length"]}
    own |= {"LAYERS": vit["num_layers"], "SIDE": vit["image_size"][0]}
    for name, value in own.items():
        options = options.replace(name, str(value))
        message = message and message.replace(name, str(value))
    given = ["--from_pretrained", str(cogagent), *options.split()]
    training = parse_options(given, environ={})
    evaluation = evaluate.read_settings(evaluate.build_parser().parse_args([*given, "--test-data", "a"])).config
    assert training.compatibility == evaluation.compatibility
    problems = [text for text in option_problems(training, {}, "cpu")[0] if re.match("--(cross_|image_l|eva)", text)]
    if message is None:
        assert problems == [] and _refuse_other_sizes(evaluation) is None
    else:
        assert re.match(message, "; ".join(problems))
        with pytest.raises(ConfigError, match=message):
            _refuse_other_sizes(evaluation)


def test_a_base_without_a_second_encoder_has_no_size_of_its_picture():
    config = parse_options(["--from_pretrained", str(TINY_BASE), "--cross_image_pix", "1120"], environ={})
    (problem,) = option_problems(config, {}, "cpu")[0]
    assert problem == "--cross_image_pix: got 1120, and the base has none; leave it out"
