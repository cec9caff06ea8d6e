"""Base and tokenizer folders as downloads, editors and attackers leave them: one error that says what lies there."""

import json
import os
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from sat_lora import CheckpointError, ConfigError
from sat_lora.cogvlm.checkpoints.base_weights import BaseWeights
from sat_lora.cogvlm.checkpoints.hugging_face_folder import ROTARY
from sat_lora.cogvlm.checkpoints.hugging_face_writer import make_hugging_face_weights
from sat_lora.cogvlm.checkpoints.load import check_files, load_cogvlm, open_folder, read_config, save_weights
from sat_lora.cogvlm.inputs.text import load_tokenizer
from sat_lora.cogvlm.sizes import image_length_problem
from sat_lora.files.foreign import is_lfs_pointer
from sat_lora.training.preflight import option_problems
from tests.support.character_tokenizer import write_character_tokenizer
from tests.support.configs import parse_options
from tests.support.sat_files import FILE, cut_by_sat, write_step
from tests.support.tiny import CONFIG, tiny_model

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 35000000000\n"
SECONDS = 5.0  # of the processor
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def state(single_process_group):
    return tiny_model().state_dict()


@pytest.fixture(scope="module")
def kept(tmp_path_factory, state):
    root = tmp_path_factory.mktemp("bases")
    save_weights(root / "sat", CONFIG, state)
    (root / "hf").mkdir()
    layout = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
    weights = make_hugging_face_weights(root / "hf", CONFIG, layout, state[ROTARY], shard_bytes=400_000)
    for name, tensor in weights.items():
        tensor.copy_(state[name])
    return root


@pytest.fixture
def sat(kept, tmp_path):
    return shutil.copytree(kept / "sat", tmp_path / "sat")


@pytest.fixture
def hf(kept, tmp_path):
    return shutil.copytree(kept / "hf", tmp_path / "hf")


def refused(folder, message, *actions):
    for action in actions or (check_files, load_cogvlm, BaseWeights):
        started = time.process_time()
        with pytest.raises(CheckpointError, match=message) as error:
            action(folder)
        assert time.process_time() - started < SECONDS and "\x1b" not in str(error.value)
        assert len(str(error.value)) < 5000


CONTENTS = {
    "a pointer of git LFS": (POINTER.encode(), "git lfs pull"),
    "a pointer with a byte-order mark and CRLF": (b"\xef\xbb\xbf" + POINTER.replace("\n", "\r\n").encode(), "git LFS"),
    "a pointer of before it was called LFS": (b"version https://hawser.github.com/spec/v1\n", "git LFS"),
    "a page": (b"<!DOCTYPE html>\n<html><title>Sign in</title></html>", "a web page and not the file"),
    "an answer": (b"Entry not found", "a server's answer, 'Entry not found'"),
    "an answer about a login": (b"Invalid username or password.\x1b[2J", r"'Invalid username or password\.\\+x1b"),
    "nothing": (b"", "it is empty"),
    "zeros": (bytes(5000), "begins with zeros"),
    "a tar.gz": (b"\x1f\x8b" + bytes(2000), "a gzip archive; unpack it"),
}


@pytest.mark.parametrize("case", CONTENTS)
def test_what_lies_in_the_place_of_weights_is_named(sat, hf, case):
    content, message = CONTENTS[case]
    (sat / "release" / FILE.format(0)).write_bytes(content)
    refused(sat, f"{FILE.format(0)}: cannot be read as a SAT checkpoint: .*{message}")
    shard = sorted(hf.glob("*.safetensors"))[1]
    shard.write_bytes(content)
    refused(hf, f"{shard.name}: cannot be read as safetensors: .*{message}")


@pytest.mark.parametrize("case", CONTENTS)
def test_what_lies_in_the_place_of_a_config_is_named(sat, hf, case):
    content, message = CONTENTS[case]
    for folder, name in ((sat, "model_config.json"), (hf, "config.json"), (hf, INDEX)):
        original = (folder / name).read_bytes()
        (folder / name).write_bytes(content)
        refused(folder, f"{name}: cannot be read as JSON: .*{message}", load_cogvlm)
        (folder / name).write_bytes(original)


@pytest.mark.parametrize("case", CONTENTS)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"])
def test_what_lies_in_the_place_of_a_tokenizer_is_named(tmp_path, case, name):
    content, message = CONTENTS[case]
    write_character_tokenizer(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"does not hold a tokenizer that loads: {name}: .*{message}") as error:
        load_tokenizer(tmp_path)
    assert str(error.value).count("\n") == 0


def test_only_pointers_are_pointers():
    assert (
        is_lfs_pointer(POINTER.encode())
        and not is_lfs_pointer(b"")
        and not is_lfs_pointer(b"a version https://git-lfs")
    )


@pytest.mark.parametrize("suffix", [".aria2", ".part", ".incomplete"])
def test_a_download_that_goes_on_is_named(sat, hf, suffix):
    for file in (sat / "release" / FILE.format(0), sorted(hf.glob("*.safetensors"))[0]):
        file.with_name(file.name + suffix).touch()
    refused(sat, f"{suffix} lies beside it, so its download did not end")
    refused(hf, f"{suffix} lies beside it, so its download did not end")


def test_a_lost_file_of_a_rank_is_counted(sat):
    first, second = ({"module": part} for part in cut_by_sat(tiny_model(), 2))
    (sat / "model_config.json").write_text(json.dumps({**CONFIG, "model_parallel_size": 2}))
    write_step(sat, first)
    refused(sat, "has 1 of 2 files: model_config.json .*mp_rank_01_model_states.pt is missing; copy all of them")
    (sat / "model_config.json").write_text(json.dumps({**CONFIG, "model_parallel_size": 1}))  # as some copies say
    refused(sat, "has 1 of 2 files: the first is cut for so many, and mp_rank_01_model_states.pt is missing")
    write_step(sat, first, second)
    check_files(sat)
    (sat / "model_config.json").write_text(json.dumps({**CONFIG, "vocab_size": 2 * CONFIG["vocab_size"]}))
    write_step(sat, {"module": tiny_model().state_dict()})
    refused(sat, "lm_head.weight: shape", load_cogvlm)


def test_a_whole_file_under_a_config_of_two_ranks_still_loads(sat):
    (sat / "model_config.json").write_text(json.dumps({**CONFIG, "model_parallel_size": 2}))
    load_cogvlm(sat)


def test_a_checkpoint_of_lora2_says_what_to_do(sat, state):
    name = "transformer.layers.0.attention.dense"
    content = {key.replace(f"{name}.weight", f"{name}.original.weight"): tensor for key, tensor in state.items()}
    content |= {f"{name}.matrix_A.0": torch.ones(2, 64), f"{name}.matrix_B.0": torch.ones(64, 2)}
    write_step(sat, {"module": content})
    refused(sat, "trained with SAT's lora2 .*sat-lora import --from lora2")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.complex64, torch.float8_e4m3fn, torch.bool], ids=str)
def test_weights_of_other_kinds_of_numbers_are_named(sat, hf, state, dtype):
    name = "transformer.layers.1.mlp.dense_h_to_4h.weight"
    write_step(sat, {"module": {**state, name: torch.zeros(96, 64).to(dtype)}})
    refused(sat, f"{name}: dtype {dtype}; .*a quantised model is not a base")
    shard = sorted(hf.glob("*.safetensors"))[-1]
    tensors = load_file(shard)
    key = next(iter(tensors))
    save_file({**tensors, key: torch.zeros(tensors[key].shape).to(dtype)}, shard)
    refused(hf, f"dtype {dtype}; .*a quantised model is not a base")


SIZES = {
    "a million layers": ({"num_layers": 10**6}, "num_layers is 1000000, wanted a whole number from 1 to 10000"),
    "more layers than the weights have": ({"num_layers": 9000}, "num_layers 9000, its weights have 2 layers"),
    "fewer": ({"num_layers": 1}, "num_layers 1, its weights have 2 layers"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads is 0, wanted"),
    "heads that do not divide": ({"num_attention_heads": 5}, "hidden_size 64 does not divide by num_attention_heads 5"),
    "text": ({"hidden_size": "64"}, "hidden_size is '64', wanted"),
    "half a layer": ({"num_layers": 2.5}, "num_layers is 2.5"),
    "true": ({"vocab_size": True}, "vocab_size is True"),
    "negative": ({"inner_hidden_size": -96}, "inner_hidden_size is -96"),
    "thirty digits": ({"hidden_size": 10**30}, "hidden_size is 10000"),
    "a vision transformer that is a list": ({"eva_args": [1]}, r"eva_args is \[1\], wanted an object"),
    "no size of images": ({"eva_args": {**CONFIG["eva_args"], "image_size": 21}}, "eva_args.image_size is 21"),
    "patches of nothing": ({"eva_args": {**CONFIG["eva_args"], "patch_size": 0}}, "eva_args.patch_size is 0"),
    "an order of norms that is none": ({"layernorm_order": "middle\x1b[2J"}, r"layernorm_order is 'middle\\x1b"),
    "an epsilon that is text": ({"layernorm_epsilon": "1e-5"}, "layernorm_epsilon is '1e-5'"),
    "layers of the vision transformer": ({"eva_args": {**CONFIG["eva_args"], "num_layers": 63}}, "num_layers 63, its"),
}  # fmt: skip


@pytest.mark.parametrize("case", SIZES)
def test_a_size_that_cannot_be_is_named_before_a_model_is_built(sat, case):
    changes, message = SIZES[case]
    (sat / "model_config.json").write_text(json.dumps({**CONFIG, **changes}))
    early = () if case == "heads that do not divide" else (lambda folder: [read_config(folder), check_files(folder)],)
    refused(sat, message, load_cogvlm, *early)


@pytest.mark.parametrize(
    "name",
    ["max_sequence_length", "layernorm_order", "hidden_size", "eva_args.num_layers", "eva_args.image_size"],
)
def test_a_size_that_is_missing_is_named(sat, name):
    config = json.loads(json.dumps(CONFIG))
    *path, leaf = name.split(".")
    del (config[path[0]] if path else config)[leaf]
    (sat / "model_config.json").write_text(json.dumps(config))
    refused(sat, f"{sat}: the model config lacks {name} \\(", load_cogvlm, check_files)


HF_SIZES = {
    "heads of nothing": ("num_attention_heads", 0),
    "a rank of layers": ("num_hidden_layers", [2]),
    "null": ("vocab_size", None),
    "a patch of nothing": ("vision_config", {"patch_size": 0}),
    "an image as text": ("vision_config", {"image_size": "490"}),
}


@pytest.mark.parametrize("case", HF_SIZES)
def test_a_size_in_hugging_faces_config_that_cannot_be_is_named(hf, case):
    name, value = HF_SIZES[case]
    content = json.loads((hf / "config.json").read_text())
    content[name] = {**content[name], **value} if isinstance(value, dict) else value
    (hf / "config.json").write_text(json.dumps(content))
    refused(hf, "config.json is not the config of a CogVLM: .*wanted a whole number above 0", read_config)


LATEST = {
    "a place outside": ("../other", "is not the name of a folder"),
    "the folder above": ("..", "is not the name of a folder"),
    "the folder itself": (".", "is not the name of a folder"),
    "an absolute place": ("/etc", "is not the name of a folder"),
    "two levels": ("a/b", "is not the name of a folder"),
    "escapes": ("1\x1b]0;owned\x07", "is not the name of a folder"),
    "two lines": ("1\n2", "is not the name of a folder"),
    "300 letters": ("a" * 300, "is not the name of a folder"),
    "a megabyte": ("1" * 2**20, "latest: cannot be read: larger than"),
}


@pytest.mark.parametrize("case", LATEST)
def test_latest_names_a_folder_in_there_or_nothing(sat, case):
    text, message = LATEST[case]
    shutil.copytree(sat / "release", sat.parent / "other")
    (sat / "latest").write_text(text)
    refused(sat, message)


@pytest.mark.parametrize("length", [1, 8, 10])
def test_places_for_other_than_all_patches_are_an_error_before_a_run(sat, length):
    (sat / "model_config.json").write_text(json.dumps({**CONFIG, "image_length": length}))
    said = f"{sat}: image_length is {length}, and an image of [21, 21] in patches of 7 has {CONFIG['image_length']}"
    options = parse_options(["--from_pretrained", str(sat), "--train-data", str(sat)], environ={})
    problems, _ = option_problems(options, {}, "cpu")
    assert any(said in problem for problem in problems)
    assert image_length_problem(CONFIG) is None


@pytest.mark.parametrize("prompt", ["what \udcff?", "\ud83d"])
def test_a_prompt_that_is_no_text_is_an_error_of_its_option(prompt):
    problems, _ = option_problems(parse_options(["--prompt", prompt], environ={}), {}, "cpu")
    assert sum("--prompt: " in problem and "no UTF-8" in problem for problem in problems) == 1


def test_what_latest_has_to_say_is_said(sat):
    (step,) = [path.parent for path in sat.glob("*/mp_rank_00_model_states.pt")]
    (sat / "latest").write_text(POINTER)
    refused(sat, "latest: cannot be read: it is a pointer of git LFS")
    (sat / "latest").write_text("1000")
    refused(sat, f"`latest` says '1000', so .* should be there; found nothing; in {sat} there are .*{step.name}")
    (sat / "latest").unlink()
    refused(sat, f"missing latest; found: .*; latest is a text with the name .*: write {step.name} into it")


@pytest.mark.parametrize("suffix, words", [(".aria2", "download that did not end"), (".zip", "is packed: unpack it")])
def test_weights_under_another_suffix_are_named(sat, suffix, words):
    (file,) = sat.glob("*/mp_rank_00_model_states.pt")
    file.rename(f"{file}{suffix}")
    refused(sat, f"{file.name}{suffix} .*{words}")


def test_names_of_a_wrapped_model_are_one_problem(sat, state):
    save_weights(sat, CONFIG, {f"module.{name}": tensor for name, tensor in state.items()})
    refused(sat, "each of its names begins with `module.`", check_files, load_cogvlm)


@pytest.mark.parametrize("place", ["../outside.safetensors", "/etc/outside.safetensors", "sub/outside.safetensors"])
def test_the_index_names_files_beside_it(hf, place):
    content = json.loads((hf / INDEX).read_text())
    content["weight_map"]["lm_head.weight"] = place
    (hf / INDEX).write_text(json.dumps(content))
    shutil.copy(sorted(hf.glob("*.safetensors"))[0], hf.parent / "outside.safetensors")
    refused(hf, "its files have to lie beside it")


@pytest.mark.parametrize("name", ["model_config.json", "latest"])
def test_a_pipe_is_not_waited_for(sat, name):
    (sat / name).unlink()
    os.mkfifo(sat / name)
    refused(sat, f"missing {name}")


@pytest.mark.parametrize("text", ["release\r\n", "\ufeffrelease", "  release  \n\n"])
def test_latest_may_have_been_written_by_any_editor(sat, text):
    (sat / "latest").write_text(text, encoding="utf-8")
    check_files(sat)


def test_settings_that_sat_writes_beside_the_sizes_are_taken(sat):
    more = {"num_multi_query_heads": 0, "layernorm_epsilon": 1e-5, "hidden_dropout": 0.1, "tokenizer_type": "vicuna"}
    (sat / "model_config.json").write_text("\ufeff" + json.dumps({**CONFIG, **more}), encoding="utf-8")
    load_cogvlm(sat)


def test_deep_json_and_large_json_are_one_error(sat, hf):
    for text, message in (("[" * 10**5, "nested deeper"), (" " * (17 << 20), "larger than")):
        (sat / "model_config.json").write_text(text)
        refused(sat, f"model_config.json: cannot be read as JSON: {message}", load_cogvlm)
        (hf / INDEX).write_text(text)
        refused(hf, f"index.json: cannot be read as JSON: {message}", check_files)


PLACES = {
    "a name on a hub": ("THUDM/cogvlm-chat-hf", "Nothing is fetched.*huggingface-cli download THUDM/cogvlm-chat-hf"),
    "a path that is nowhere": ("/nowhere/cogvlm-base-490", "is not a SAT model folder: it does not exist"),
}


@pytest.mark.parametrize("case", PLACES)
def test_a_base_that_is_not_there_is_said_to_be_so(case):
    refused(*PLACES[case], open_folder)


def test_a_place_near_the_base_leads_to_it(sat, tmp_path):
    refused(sat / "release", f"; give {sat}$", open_folder)
    refused(tmp_path, f"; give {sat}$", open_folder)
    refused(tmp_path / "sad", f"does not exist.*did you mean {sat}", open_folder)
    shutil.make_archive(str(tmp_path / "sat"), "zip", sat)
    refused(tmp_path / "sat.zip", "unpack the archive", open_folder)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "pytorch_model-00001-of-00008.bin").touch()
    refused(tmp_path / "bin", "only .safetensors are read", open_folder)


def tokenizer_error(folder):
    with pytest.raises(ConfigError) as error:
        load_tokenizer(folder)
    assert str(error.value).count("\n") == 0 and len(str(error.value)) < 900 and "\x1b" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "code", [["foreign.Foreign", None], ["foreign.Foreign\x1b[2J", None], "foreign.Foreign", [None, "foreign.Fast"]]
)
@pytest.mark.parametrize("tokenizer_class", ["Foreign", None, 3])
def test_code_of_a_tokenizer_is_refused_by_name(tmp_path, monkeypatch, code, tokenizer_class):
    write_character_tokenizer(tmp_path)
    config = {"auto_map": {"AutoTokenizer": code}, "tokenizer_class": tokenizer_class}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "foreign.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *arguments: pytest.fail("asked"))
    assert "no code of a tokenizer is run" in tokenizer_error(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_that_transformers_knows_loads_beside_code(tmp_path):
    write_character_tokenizer(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["foreign.Foreign", None]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "foreign.py").write_text("raise SystemExit('ran')\n")
    assert load_tokenizer(tmp_path).encode("ab", add_special_tokens=False) == [69, 70]


def test_errors_of_transformers_are_one_line(tmp_path):
    assert "none of tokenizer.json, tokenizer.model, vocab.json" in tokenizer_error(tmp_path)
    write_character_tokenizer(tmp_path)
    for text in ("[" * 10**5, '{"model": {"type": "BPE"}}', '{"version": "1.0", "model": 3}', "\x1b[2J"):
        (tmp_path / "tokenizer.json").write_text(text)
        assert "does not hold a tokenizer that loads" in tokenizer_error(tmp_path)


def test_a_pipe_as_tokenizer_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "tokenizer.json")
    assert "tokenizer.json: it is a pipe, no file" in tokenizer_error(tmp_path)


def test_a_tokenizer_that_is_nowhere_says_how_to_get_one():
    assert "download the tokenizer" in tokenizer_error("lmsys/vicuna-7b-v1.5")
