"""PEFT adapters as people have them, saved by the real `peft`: under its names in memory, pickled, edited by hand."""

import json
import shutil
import warnings

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from sat_lora.adapters.read import read_adapter
from sat_lora.cogvlm.checkpoints.load import save_weights
from sat_lora.errors import AdapterError
from sat_lora.interop.peft_import import import_from_peft
from tests.support.hf_tree import HuggingFaceTree
from tests.support.tiny import CONFIG, tiny_model

WEIGHTS, SETTINGS, PICKLED = "adapter_model.safetensors", "adapter_config.json", "adapter_model.bin"
WRAPS = {
    "linears": dict(target_modules=r".*(query_key_value|fc1|down_proj)"),
    "an embedding": dict(target_modules=r".*(embed_tokens|fc1)"),
    "a convolution": dict(target_modules=r".*(patch_embedding\.proj|fc2)"),
    "dora": dict(target_modules=r".*(language_expert_dense|up_proj)", use_dora=True),
    "modules saved whole": dict(target_modules=r".*fc1", modules_to_save=["lm_head", "norm1"]),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory, single_process_group):
    folder = tmp_path_factory.mktemp("base")
    save_weights(folder, CONFIG, tiny_model(torch.float64).state_dict())
    return folder


@pytest.fixture(scope="module")
def peft(single_process_group):
    """A function: a PEFT model of those settings with an adapter of that name, its factors filled."""
    kept = {}

    def make(case, name="default"):
        if (case, name) not in kept:
            tree = HuggingFaceTree(tiny_model(torch.float64).state_dict(), CONFIG).eval()
            config = PeftConfig(r=3, lora_alpha=5, **WRAPS[case])
            model = get_peft_model(tree, config, adapter_name=name, autocast_adapter_dtype=False)
            generator = torch.Generator().manual_seed(5)
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    if "lora_" in key or "modules_to_save" in key:
                        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
            kept[case, name] = model
        return kept[case, name]

    return make


def saved(model, folder):
    """The folder that `save_pretrained` filled."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


def imported(folder, base):
    out = folder.parent / f"{folder.name}-imported"
    import_from_peft(folder, out, base=base)
    return out


def in_memory(model, config_folder, folder, *, prefix="", within="", only=("lora_", "modules_to_save.")):
    """The state dict as a trainer saves it that does not know PEFT."""
    folder.mkdir()
    shutil.copy(config_folder / SETTINGS, folder)
    tensors = {key: tensor for key, tensor in model.state_dict().items() if any(part in key for part in only)}
    tensors = {prefix + key.replace(".layers.0.", f".layers.0.{within}"): tensor for key, tensor in tensors.items()}
    save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, folder / WEIGHTS)
    return folder


@pytest.mark.parametrize("case", WRAPS)
def test_names_of_the_model_in_memory_mean_what_save_pretrained_saves(peft, base, tmp_path, case):
    model = peft(case)
    folder = saved(model, tmp_path / "plain")
    expected = (imported(folder, base) / WEIGHTS).read_bytes()
    ways = {
        "the adapter's tensors": in_memory(model, folder, tmp_path / "own"),
        "everything, the base's weights too": in_memory(model, folder, tmp_path / "all", only=("",)),
        "as DDP has it": in_memory(model, folder, tmp_path / "ddp", prefix="module."),
        "compiled": in_memory(model, folder, tmp_path / "compiled", prefix="_orig_mod."),
        "as FSDP has it": in_memory(model, folder, tmp_path / "fsdp", within="_fsdp_wrapped_module."),
        "checkpointed": in_memory(model, folder, tmp_path / "again", within="_checkpoint_wrapped_module._orig_mod."),
    }
    for way, other in ways.items():
        assert (imported(other, base) / WEIGHTS).read_bytes() == expected, way


@pytest.mark.parametrize("name", ["mine", "lora_A1", "学习", "v1-final"])
def test_an_adapter_of_any_name_is_found_in_its_folder(peft, base, tmp_path, name):
    model = peft("modules saved whole", name)
    root = saved(model, tmp_path / "root")
    assert (root / name / SETTINGS).is_file() and not (root / SETTINGS).exists()
    found = read_adapter(imported(root, base))
    own = read_adapter(imported(in_memory(model, root / name, tmp_path / "own"), base))
    assert found.tensors.keys() == own.tensors.keys()
    assert all(torch.equal(tensor, own.tensors[key]) for key, tensor in found.tensors.items())


@pytest.mark.parametrize("nested", [None, "state_dict", "module"])
def test_a_pickled_adapter_is_one(peft, base, tmp_path, nested):
    folder = saved(peft("linears"), tmp_path / "plain")
    expected = (imported(folder, base) / WEIGHTS).read_bytes()
    pickled = shutil.copytree(folder, tmp_path / "pickled")
    tensors = load_file(pickled / WEIGHTS)
    torch.save({nested: tensors} if nested else tensors, pickled / PICKLED)
    (pickled / WEIGHTS).unlink()
    assert (imported(pickled, base) / WEIGHTS).read_bytes() == expected
    whole = shutil.copytree(pickled, tmp_path / "whole")  # as zero_to_fp32 calls it
    (whole / PICKLED).rename(whole / "pytorch_model.bin")
    assert (imported(whole, base) / WEIGHTS).read_bytes() == expected
    (whole / "non_lora_trainables.bin").touch()
    with pytest.raises(AdapterError, match="non_lora_trainables.bin holds weights that were trained whole"):
        import_from_peft(whole, tmp_path / "lost", base=base)


def test_a_model_without_its_head_and_names_without_a_prefix_are_understood(peft, base, tmp_path):
    folder = saved(peft("linears"), tmp_path / "plain")
    expected = (imported(folder, base) / WEIGHTS).read_bytes()
    for number, prefix in enumerate(("", "base_model.model.model.")):
        other = shutil.copytree(folder, tmp_path / f"other{number}")
        tensors = {key.removeprefix("base_model.model.model."): t for key, t in load_file(other / WEIGHTS).items()}
        start = "model." if not prefix else "base_model.model."
        save_file({start + key: tensor for key, tensor in tensors.items()}, other / WEIGHTS)
        assert (imported(other, base) / WEIGHTS).read_bytes() == expected
    bare = shutil.copytree(folder, tmp_path / "bare")
    save_file({f"base_model.model.{key}": tensor for key, tensor in tensors.items()}, bare / WEIGHTS)
    assert (imported(bare, base) / WEIGHTS).read_bytes() == expected


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('went off')",)


def edit(folder, **values):
    config = json.loads((folder / SETTINGS).read_text())
    (folder / SETTINGS).write_text(json.dumps({**config, **values}))


def add(folder, tensors):
    save_file({**load_file(folder / WEIGHTS), **tensors}, folder / WEIGHTS)


def pickle_of(content):
    def place(folder):
        (folder / WEIGHTS).unlink()
        torch.save(content, folder / PICKLED)

    return place


FC1 = "base_model.model.model.vision.transformer.layers.0.mlp.fc1"
WRONG = {
    "an alpha that is text": (lambda f: edit(f, lora_alpha="16"), "lora_alpha has to be a finite number, got '16'"),
    "an alpha beyond all numbers": (lambda f: edit(f, lora_alpha=10**4000), "lora_alpha has to be .*, got 1000"),
    "a rank of 10^15": (lambda f: edit(f, r=10**15), "r has to be a whole number"),
    "a rank of zero": (lambda f: edit(f, r=0), "r has to be a whole number"),
    "a rank that is null": (lambda f: edit(f, r=None), "r has to be a whole number"),
    "another rank than the tensors have": (lambda f: edit(f, r=8), "its tensors have rank 3, .* say 8"),
    "a pattern that is none": (lambda f: edit(f, alpha_pattern={"[": 3}), r"alpha_pattern: '\[' is not a regular"),
    "a target that is no pattern": (lambda f: edit(f, target_modules="(fc1"), "target_modules: .* not a regular"),
    "a list of ranks": (lambda f: edit(f, rank_pattern=[3]), "rank_pattern has to be an object"),
    "a pattern of texts": (lambda f: edit(f, alpha_pattern={"fc1": "3"}), "alpha_pattern has to be an object"),
    "rsLoRA as text": (lambda f: edit(f, use_rslora="yes"), "use_rslora has to be true or false"),
    "deep nesting": (lambda f: (f / SETTINGS).write_text("[" * 10**5), "nested deeper"),
    "another method": (lambda f: edit(f, peft_type="IA3\x1b[31m"), r"its peft_type is 'IA3\\x1b"),
    "no config": (lambda f: (f / SETTINGS).unlink(), "adapter_config.json missing; found: README.md"),
    "a pointer as config": (
        lambda f: (f / SETTINGS).write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"
    ),
    "a pointer as weights": (
        lambda f: (f / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"
    ),
    "a page as weights": (lambda f: (f / WEIGHTS).write_text("<!DOCTYPE html><html>"), "a web page and not the file"),
    "an answer as weights": (lambda f: (f / WEIGHTS).write_text("Entry not found"), "answer, 'Entry not found'"),
    "code in the pickle": (pickle_of(Bomb()), "nothing was run"),
    "a list in the pickle": (pickle_of([1]), "expected a dictionary of tensors"),
    "numbers in the pickle": (pickle_of({f"{FC1}.lora_A.weight": 3}), "int, no tensor"),
    "an unknown name": (
        lambda f: add(f, {"x\x1b[2J.lora_A.weight": torch.ones(3, 3)}), r"x\\x1b\[2J.lora_A.weight: CogVLM has no such"
    ),
    "the same pair twice": (lambda f: add(f, {f"{FC1}.lora_A.other.weight": torch.ones(3, 48)}), "is there twice"),
    "a bias of B": (lambda f: add(f, {f"{FC1}.lora_B.default.bias": torch.ones(72)}), "not a name of PEFT's LoRA"),
    "weights of another base": (
        lambda f: add(f, {f"{FC1}.base_layer.weight": torch.ones(72, 48)}), "--base has other values there"
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(peft, tmp_path_factory):
    return saved(peft("linears"), tmp_path_factory.mktemp("saved") / "plain")


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_imported_is_one_error(plain, base, tmp_path, case):
    folder = shutil.copytree(plain, tmp_path / "peft")
    spoil, message = WRONG[case]
    spoil(folder)
    with pytest.raises(AdapterError, match=message) as error:
        imported(folder, base)
    assert len(str(error.value)) < 6000 and "\x1b" not in str(error.value)
    assert not (tmp_path / "peft-imported").exists()


def test_two_adapters_in_one_file_or_folder_have_to_be_told_apart(plain, base, tmp_path):
    folder = shutil.copytree(plain, tmp_path / "peft")
    layers = (FC1, FC1.replace("0.mlp", "1.mlp"))
    tensors = {
        f"{layer}.lora_{leaf}.{name}.weight": torch.ones(shape)
        for layer, name in zip(layers, ("a", "b"))
        for leaf, shape in (("A", (3, 48)), ("B", (72, 3)))
    }
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(AdapterError, match="holds several adapters, a, b; save one alone"):
        imported(folder, base)
    for name in ("one", "two"):
        shutil.copytree(plain, tmp_path / "several" / name)
    with pytest.raises(AdapterError, match="holds several adapters, one, two; give one"):
        imported(tmp_path / "several", base)


@pytest.mark.parametrize("dropout", [None, 1.0, 0.1, "0.1", -1])
def test_the_dropout_of_an_import_does_not_matter(plain, base, tmp_path, dropout):
    folder = shutil.copytree(plain, tmp_path / "peft")
    edit(folder, lora_dropout=dropout)
    assert read_adapter(imported(folder, base)).config.lora_dropout == (0.1 if dropout == 0.1 else 0)


def test_a_file_or_a_folder_that_is_not_there_is_said(plain, base, tmp_path):
    with pytest.raises(AdapterError, match="does not exist"):
        imported(tmp_path / "nowhere", base)
    with pytest.raises(AdapterError, match="is a file; give the PEFT adapter's folder"):
        import_from_peft(plain / WEIGHTS, tmp_path / "out", base=base)
