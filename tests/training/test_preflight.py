import json
import shutil

import pytest
import torch

from benchmarks.model_folders import write_hugging_face
from sat_lora.data.shards.pack import pack_shards
from sat_lora.errors import ConfigError, DataError, SatLoraError
from sat_lora.training.preflight import check_options
from sat_lora.training.settings.config import DEFAULTS
from tests.support.configs import parse_options
from tests.support.films import write_film
from tests.support.picture_files import write_images
from tests.support.stored_state import stored_state
from tests.support.tar_shards import write_numbered_shards
from tests.support.tiny import CONFIG
from tests.support.tiny_families import CONFIGS

NEEDED = 1 + 9 + 2 + len(DEFAULTS["prompt"]) + 1 + 1  # BOS, image, prompt, a token of answer, EOS


@pytest.fixture
def check(base_folder, image_folder):
    def check(*argv, environ=None, device="cpu", **changes):
        given = ["--from_pretrained", str(base_folder), "--version", "base", "--train-data", str(image_folder), *argv]
        options = parse_options(given, environ={}).replaced(**changes)
        check_options(options, environ or {}, device=device)
        return options

    return check


def refusal(check, *argv, kind=ConfigError, **settings) -> str:
    with pytest.raises(SatLoraError) as error:
        check(*argv, **settings)
    assert type(error.value) is kind
    return str(error.value)


def test_good_options_pass(check, image_folder):
    check("--valid-data", str(image_folder), "--max_length", str(NEEDED))


def test_a_missing_data_folder_is_named_with_its_option(check, tmp_path):
    for option in ("--train-data", "--valid-data", "--test-data"):
        message = refusal(check, option, str(tmp_path / "nowhere"), kind=DataError)
        assert message.startswith(f"{option}: {tmp_path}/nowhere does not exist; give a folder of images")


def test_a_folder_without_images_is_named_with_what_it_has(check, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "JPEG2000, AVIF, QOI, ICO, PCX, SGI, TGA) in or below it; found nothing" in refusal(
        check, "--train-data", str(empty), kind=DataError
    )
    (empty / "notes.txt").touch()
    (empty / "a.heic").touch()
    message = refusal(check, "--train-data", str(empty), kind=DataError)
    assert "found 1 .heic files (not read; convert to PNG or JPEG), 1 .txt files" in message


def test_images_of_which_none_can_be_read_are_refused(check, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("1.png", "2.png"):
        (broken / name).write_text("text")
    message = refusal(check, "--train-data", str(broken), kind=DataError)
    assert f"--train-data: none of the first 2 images of {broken} can be read" in message and "1.png" in message


def test_one_readable_image_is_enough_to_begin(check, image_folder):
    (image_folder / "0.png").write_text("text")
    check()


def test_a_wrong_line_of_a_jsonl_file_is_found_before_the_run(check, tmp_path):
    (tmp_path / "data.jsonl").write_text("{")
    assert "line 1 is not JSON" in refusal(check, "--train-data", str(tmp_path / "data.jsonl"), kind=DataError)


def test_an_image_given_for_a_folder_is_refused(check, image_folder):
    message = refusal(check, "--train-data", str(image_folder / "000.png"), kind=DataError)
    assert "000.png is one picture; give the folder of the images, or a .jsonl file" in message


def test_no_training_data_at_all_is_refused(check):
    assert "--train-data: nothing given" in refusal(check, train_data=None, kind=DataError)


def test_an_unknown_version_is_refused(check):
    assert "--version: got 'cogagent', wanted one of base, chat" in refusal(check, version="cogagent")


def test_a_max_length_too_short_says_what_is_needed(check):
    message = refusal(check, "--max_length", str(NEEDED - 1))
    assert f"--max_length: {NEEDED - 1} is too short" in message and f"take {NEEDED}; give" in message


@pytest.fixture
def film_check(check, base_folder, tmp_path):
    """Checks options on a base that takes films, of 4 places a frame, and the lines of a data file."""
    shutil.copytree(base_folder, tmp_path / "base")
    (tmp_path / "base" / "model_config.json").write_text(json.dumps(CONFIGS["cogvlm2-video"]))

    def film_check(max_length, *samples, version="base"):
        (tmp_path / "f.jsonl").write_text("".join(f"{json.dumps(sample)}\n" for sample in samples))
        options = ("--from_pretrained", tmp_path / "base", "--train-data", tmp_path / "f.jsonl", "--version", version)
        return check(*map(str, options), "--max_length", str(max_length))

    return film_check


ASKED = {"prompt": "What?", "answer": "a cat"}
FILM = {"video": "a.mp4", **ASKED}
WHOLE = 1 + 24 * 6 + len("What?") + len("a cat") + 1  # of a film of 24 frames


def test_a_max_length_that_holds_no_film_says_what_is_needed(film_check, tmp_path):
    """24 frames of a file for `base`; as many as it has seconds, each with its number, for others."""
    write_film(tmp_path / "a.mp4", 4, 1)
    message = refusal(film_check, WHOLE - 5, FILM, kind=DataError)
    wanted = (
        f"--max_length: {WHOLE - 5} is too short: a film of 24 frames with its prompt and answer takes {WHOLE}; give"
    )
    assert wanted in message and str(tmp_path / "f.jsonl") in message
    film_check(WHOLE - 4, FILM)  # all but the end of the answer: cut, as everywhere
    film_check(WHOLE - 5, FILM, {**FILM, "prompt": "W?"})  # one that fits is enough to begin
    message = refusal(film_check, 50, FILM, version="vqa", kind=DataError)
    assert "50 is too short: a film of 4 frames" in message
    film_check(60, FILM, version="vqa")


def test_the_frames_of_folders_and_shards_are_counted_too(film_check, check, tmp_path):
    write_images(tmp_path / "frames", [f"{number}.png" for number in range(9)])
    message = refusal(film_check, 40, {"video": "frames", **ASKED}, kind=DataError)
    assert "40 is too short: a film of 9 frames" in message
    write_film(tmp_path / "a.mp4", 2)
    film_check(WHOLE, FILM)
    shard, _ = pack_shards([tmp_path / "f.jsonl"], tmp_path / "shards")
    options = ("--from_pretrained", str(tmp_path / "base"), "--train-data", shard, "--max_length")
    assert f"{shard}: --max_length: 99 is too short" in refusal(check, *options, "99", kind=DataError)
    check(*options, str(WHOLE))


def test_a_max_length_without_room_for_one_frame_says_what_a_film_needs(film_check, tmp_path):
    write_film(tmp_path / "a.mp4", 2)
    needed = 1 + 24 * 6 + len(DEFAULTS["prompt"]) + 2
    message = refusal(film_check, 9, FILM)
    assert f"with 24 frames of a film {needed}; give {needed} plus the answers' length" in message


def test_a_tokenizer_that_does_not_exist_is_refused(check):
    message = refusal(check, "--local_tokenizer", "lmsys/vicuna")
    assert "--local_tokenizer: lmsys/vicuna is neither a folder nor a name in the local cache" in message


def test_a_tokenizer_without_its_special_tokens_is_refused(check, base_folder, tmp_path):
    shutil.copy(base_folder / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    message = refusal(check, "--local_tokenizer", str(tmp_path))
    assert f"--local_tokenizer: {tmp_path} has no bos_token_id and no eos_token_id" in message


def test_a_folder_that_is_no_base_is_one_problem(check, tmp_path):
    message = refusal(check, "--from_pretrained", str(tmp_path))
    assert message.startswith(f"--from_pretrained: {tmp_path} is not a SAT model folder: looked for latest")


def test_a_base_without_weights_is_refused(check, base_folder, tmp_path):
    folder = shutil.copytree(base_folder, tmp_path / "copy")
    (folder / "1" / "mp_rank_00_model_states.pt").unlink()
    assert "mp_rank_00_model_states.pt" in refusal(check, "--from_pretrained", str(folder))


def test_a_truncated_weight_file_is_refused(check, base_folder, tmp_path):
    folder = shutil.copytree(base_folder, tmp_path / "copy")
    file = folder / "1" / "mp_rank_00_model_states.pt"
    file.write_bytes(file.read_bytes()[:-100])
    message = refusal(check, "--from_pretrained", str(folder))
    assert message.startswith(f"--from_pretrained: {file}: cannot be read as a SAT checkpoint")
    assert message.endswith("if it was cut short, copy it again")


def test_a_hugging_face_folder_is_checked_like_a_sat_folder(check, base_folder, tmp_path):
    folder = tmp_path / "hf"
    write_hugging_face(folder, CONFIG, {"mixins.eva.boi": torch.zeros(1), "mixins.eva.eoi": torch.zeros(1)}, shards=2)
    options = ("--from_pretrained", str(folder), "--local_tokenizer", str(base_folder), "--max_length", "40")
    check(*options)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "index.json names model-00002-of-00002.safetensors, not there" in refusal(check, *options)


@pytest.mark.parametrize("name", ["hidden_size", "vocab_size", "inner_hidden_size"])
def test_a_model_parallel_size_that_cuts_a_size_is_refused(check, base_folder, tmp_path, name):
    folder = shutil.copytree(base_folder, tmp_path / "copy")
    config = json.loads((folder / "model_config.json").read_text())
    (folder / "model_config.json").write_text(json.dumps({**config, name: 1001}))
    message = refusal(
        check, "--from_pretrained", str(folder), "--model-parallel-size", "2", environ={"WORLD_SIZE": "2"}
    )
    assert f"2 does not divide the base's {name} 1001; choose one that divides" in message


def test_ranks_that_do_not_divide_are_refused(check):
    message = refusal(check, "--model-parallel-size", "2", environ={"WORLD_SIZE": "3"})
    assert message.startswith("--model-parallel-size: 3 ranks do not divide into groups of 2")
    check("--model-parallel-size", "2", environ={"WORLD_SIZE": "4"})


def test_a_model_parallel_size_that_cuts_heads_is_refused(check):
    message = refusal(check, "--model-parallel-size", "8", environ={"WORLD_SIZE": "8"})
    assert "8 does not divide the base's num_attention_heads 4, eva_args.num_attention_heads 4" in message


def test_two_precisions_are_refused(check):
    assert "--bf16 and --fp16: both given" in refusal(check, "--bf16", "--fp16", device="cuda")


def test_float16_without_cuda_is_refused(check, tmp_path):
    assert refusal(check, "--fp16").startswith("--fp16: float16 trains on CUDA only")
    (tmp_path / "ds.json").write_text(json.dumps({"fp16": {"enabled": True}}))
    assert '"fp16": float16 trains on CUDA only' in refusal(check, "--deepspeed_config", str(tmp_path / "ds.json"))
    check("--fp16", device="cuda")


def test_two_zero_stages_are_refused(check, tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    file = ("--deepspeed_config", str(tmp_path / "ds.json"))
    assert "--zero-stage: got 3, but --deepspeed_config" in refusal(check, *file, "--zero-stage", "3")
    check(*file, "--zero-stage", "2")
    check(*file)


def test_a_wrong_deepspeed_file_is_found(check, tmp_path):
    assert "is not a file" in refusal(check, "--deepspeed_config", str(tmp_path / "nowhere.json"))
    (tmp_path / "ds.json").write_text('{"gradient_cliping": 1}')
    message = refusal(check, "--deepspeed_config", str(tmp_path / "ds.json"))
    assert 'did you mean "gradient_clipping"?' in message


def test_an_offload_at_the_top_level_passes(check, tmp_path, caplog):
    (tmp_path / "ds.json").write_text('{"offload_optimizer": {"device": "cpu"}}')
    check("--deepspeed_config", str(tmp_path / "ds.json"))
    assert caplog.records == []  # the run's own merge says it, once


def test_a_run_without_checkpoints_cannot_be_resumed(check, tmp_path):
    assert f"--resume: {tmp_path}/checkpoints holds no checkpoint" in refusal(check, resume=str(tmp_path))


def test_a_wrong_lora_value_is_named_with_its_option(check):
    assert refusal(check, "--r", "0") == "--r has to be a whole number of at least 1, got 0"
    message = refusal(check, "--lora_dropout", "1", "--qkv_slots", "x", "--max_length", "2")
    assert message.startswith("3 problems with the options:\n- --max_length")
    assert "\n- --lora_dropout has to be in [0, 1), got 1.0\n- --qkv_slots has to name some of q, k, v" in message


@pytest.fixture
def stopped_run(base_folder, image_folder, tmp_path):
    """A run folder with the parts that the check reads: r 8, and 2 x 4 samples a step."""
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    (tmp_path / "checkpoints" / "4" / "state.json").write_text(json.dumps(stored_state(samples_per_step=8)))
    (tmp_path / "checkpoints" / "latest").write_text("4\n")
    settings = {"from_pretrained": str(base_folder), "train_data": [str(image_folder)], "given": ["r"]}
    settings |= {"r": 8, "batch_size": 2, "gradient_accumulation_steps": 4}
    (tmp_path / "run.json").write_text(json.dumps({"settings": settings}))
    return str(tmp_path)


def test_a_resumed_run_keeps_its_lora_settings(check, stopped_run):
    check("--resume", stopped_run)
    message = refusal(check, "--resume", stopped_run, "--r", "4", "--lr_ratio", "16")
    assert "--r: got 4, but the run to resume has 8; leave it out" in message
    assert "--lr_ratio: got 16.0, but the run to resume has 1.0" in message


@pytest.mark.parametrize(
    "ranks, advice",
    [
        (2, "give --batch-size 2 --gradient-accumulation-steps 2"),
        (8, "give --batch-size 1 --gradient-accumulation-steps 1"),
        (3, "start a number of data-parallel ranks that divides 8"),
    ],
)
def test_another_number_of_ranks_has_to_keep_the_samples_of_a_step(check, stopped_run, ranks, advice):
    environ = {"WORLD_SIZE": str(ranks)}
    message = refusal(check, "--resume", stopped_run, environ=environ)
    assert f"the run took 8 samples a step, now it would be {8 * ranks}: --batch-size 2 x" in message
    assert message.endswith(advice)
    if advice.startswith("give "):
        check("--resume", stopped_run, *advice.split()[1:], environ=environ)


def test_a_run_on_tar_shards_goes_on_with_the_readers_it_had(check, stopped_run, tmp_path):
    (shard,) = write_numbered_shards(tmp_path / "shards", [9])
    run, checkpoint = tmp_path / "run.json", tmp_path / "checkpoints" / "4" / "state.json"
    stored = json.loads(run.read_text())
    stored["settings"] |= {"train_data": [str(shard)], "num_workers": 2}
    run.write_text(json.dumps(stored))
    state = stored_state(samples_per_step=16, layout=[2, 1], random=[{}, {}])
    checkpoint.write_text(json.dumps(state))
    resume = ("--resume", stopped_run, "--train-data", str(shard))
    check(*resume, "--num-workers", "2", environ={"WORLD_SIZE": "2"})
    message = refusal(check, *resume, "--num-workers", "0", "--batch-size", "4", environ={})
    assert message.endswith("now --batch-size 4, was 2; --num-workers 0, was 2; 1 data-parallel ranks, were 2")


def test_all_problems_come_at_once(check, tmp_path):
    message = refusal(check, "--max_length", "2", "--train-data", str(tmp_path / "no"), "--fp16", version="cogagent")
    assert message.startswith("3 problems with the options:\n- --version")
    assert "- --fp16" in message and "- --train-data" in message


@pytest.mark.parametrize("option", ["--quantize_modules", "--keep_modules"])
def test_what_is_quantised_is_not_said_of_a_whole_base(check, option):
    assert refusal(check, option, "vit-mlp").startswith(f"{option}: it says which linears are quantised, and none is")
    check(option, "vit-mlp", "--quantize", "nf4")


QUANTIZED_MISTAKES = {
    "loftq on a whole base": (["--init_lora_weights", "loftq"], "--init_lora_weights loftq: it begins with what quant"),
    "rounds of nothing": (["--loftq_iter", "5"], "--loftq_iter: it is of --init_lora_weights loftq, got kaiming"),
    "rounds of pissa": (
        ["--loftq_iter", "2", "--init_lora_weights", "pissa", "--quantize", "nf4"],
        "--loftq_iter: it is of --init_lora_weights loftq, got pissa",
    ),
    "no rounds": (
        ["--loftq_iter", "0", "--init_lora_weights", "loftq", "--quantize", "nf4"],
        "--loftq_iter",
    ),
    "an alpha of nothing": (
        ["--lora_alpha", "0", "--init_lora_weights", "loftq", "--quantize", "int8"],
        "lora_alpha has to be above 0 for init_lora_weights='loftq', got 0",
    ),
    "an offload of nothing": (
        ["--checkpoint_offload"],
        "--checkpoint_offload: it keeps the inputs of layers that are recomputed, and none is; give",
    ),
    "a partition at stage 2": (
        ["--quantize_partition", "--quantize", "nf4", "--zero-stage", "2"],
        "--quantize_partition: ZeRO stage 3 partitions weights, and this is stage 2; give --zero-stage 3",
    ),
    "a partition of a whole base": (
        ["--quantize_partition", "--zero-stage", "3"],
        "--quantize_partition: it cuts quantised weights, and none is; give --quantize nf4 or int8",
    ),
}


@pytest.mark.parametrize(("options", "problem"), QUANTIZED_MISTAKES.values(), ids=QUANTIZED_MISTAKES)
def test_what_wants_a_quantised_base_recomputation_or_stage_3_says_so(check, options, problem):
    assert problem in refusal(check, *options)


def test_what_wants_them_passes_with_them(check):
    check("--init_lora_weights", "loftq", "--loftq_iter", "5", "--quantize", "nf4")
    check("--checkpoint_offload", "--vit_checkpoint_activations")
    check("--quantize_partition", "--quantize", "int8", "--zero-stage", "3")
