"""CogVLM with quantised weights from a folder: encoded while it is read, or once before."""

import json
import shutil

import pytest
import torch

from sat_lora import (
    AdapterError,
    CheckpointError,
    ConfigError,
    QuantizationError,
    add_lora,
    combine_adapters,
    describe_text,
    load_adapter,
    save_adapter,
)
from sat_lora.adapters.inspect import describe_adapter, inspect_adapter
from sat_lora.adapters.loftq_base import approximate_base
from sat_lora.adapters.merge import merge_adapter
from sat_lora.adapters.read import read_adapter
from sat_lora.adapters.verify import verify_merge
from sat_lora.cli import main
from sat_lora.cogvlm.checkpoints import load as loading
from sat_lora.cogvlm.checkpoints.base_weights import BaseWeights
from sat_lora.cogvlm.checkpoints.hugging_face_writer import make_hugging_face_weights
from sat_lora.cogvlm.checkpoints.load import check_files, load_cogvlm, save_weights
from sat_lora.cogvlm.checkpoints.quantized_writer import quantize_base
from sat_lora.lora.apply import adapters_of
from sat_lora.lora.live_base import identity_of_model
from sat_lora.lora.mixin import lora_mixins
from sat_lora.quantization.apply import quantize_model
from sat_lora.quantization.config import NAMES, Quantization
from sat_lora.quantized.layers import quantized_weights
from tests.support.tiny import WIDE, fill_adapters, logits_of, tiny_batch, tiny_model

pytestmark = pytest.mark.usefixtures("single_process_group")
ALL_LINEAR = Quantization()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A SAT folder in bfloat16."""
    folder = tmp_path_factory.mktemp("base")
    save_weights(folder, WIDE, tiny_model(torch.bfloat16, config=WIDE).state_dict())
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def written(base, tmp_path_factory):
    """The same base, quantised."""
    folder = tmp_path_factory.mktemp("written") / "nf4"
    assert quantize_base(base, folder, ALL_LINEAR) == []
    return folder


def codes(model) -> dict[str, torch.Tensor]:
    return dict(quantized_weights(model))


def assert_same(model, other) -> None:
    ours, theirs = codes(model), codes(other)
    assert ours.keys() == theirs.keys() and len(ours) > 20
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    plain = other.state_dict()
    for name, tensor in model.state_dict().items():
        assert name.removesuffix(".weight") in ours or torch.equal(tensor, plain[name])


@pytest.mark.parametrize("scheme", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_encoded_while_it_is_read_is_what_is_encoded_afterwards(base, scheme, dtype):
    model, _ = load_cogvlm(base, dtype=dtype, quantize=Quantization(scheme=scheme))
    other, _ = load_cogvlm(base, dtype=dtype)
    quantize_model(other, scheme=scheme)
    assert_same(model, other)
    assert {weight.dtype for weight in codes(model).values()} == {dtype}
    assert identity_of_model(model).difference(identity_of_model(other)) is None


def test_a_hugging_face_folder_is_encoded_as_a_sat_one(base, tmp_path):
    weights = BaseWeights(base)
    name = "mixins.rotary.rotary_emb.inv_freq"
    parts = make_hugging_face_weights(tmp_path, weights.config, weights.layout, weights[name])
    for key in parts:
        parts[key].copy_(weights[key])
    model, _ = load_cogvlm(tmp_path, dtype=torch.bfloat16, quantize=ALL_LINEAR)
    assert_same(model, load_cogvlm(base, dtype=torch.bfloat16, quantize=ALL_LINEAR)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_that_was_quantised_once_gives_the_same(base, written, dtype):
    model, config = load_cogvlm(written, dtype=dtype)
    assert_same(model, load_cogvlm(base, dtype=dtype, quantize=ALL_LINEAR)[0])
    assert config["quantization"]["scheme"] == "nf4"
    images = tiny_batch()["images"].to(dtype)
    assert logits_of(model, {**tiny_batch(), "images": images}).isfinite().all()


def test_it_takes_a_third_of_the_space_and_what_lies_beside_comes_along(base, written):
    size, whole = (sum(f.stat().st_size for f in folder.rglob("*.pt")) for folder in (written, base))
    linears = sum(weight.numel() for weight in codes(load_cogvlm(written)[0]).values())
    assert whole - size == pytest.approx(linears * (16 - 4.25) / 8, rel=0.02)
    assert (written / "tokenizer.json").is_file()


def test_the_base_that_it_was_made_of_is_known(base, written):
    assert BaseWeights(written).identity.difference(BaseWeights(base).identity) is None
    assert identity_of_model(load_cogvlm(written)[0]).difference(BaseWeights(base).identity) is None
    assert BaseWeights(written).identity.name == base.name


def test_the_same_quantisation_may_be_asked_for_again(written):
    assert len(codes(load_cogvlm(written, quantize=ALL_LINEAR)[0])) > 20


@pytest.mark.parametrize(
    ("quantization", "problem"),
    [
        (Quantization(scheme="int8"), "quantised already, to nf4; leave the option"),
        (Quantization(keep_modules=["projector"]), "nf4, and mixins.eva.linear_proj.* is one of 4 layers that differ"),
    ],
)
def test_another_one_is_refused_before_anything_is_read(written, quantization, problem, monkeypatch):
    monkeypatch.setattr(loading._OwnWeights, "copy", lambda *args, **more: pytest.fail("weights were read"))
    with pytest.raises(ConfigError, match=problem):
        load_cogvlm(written, quantize=quantization)


def test_fewer_layers_than_it_has_can_be_loaded(base, written):
    for folder, quantize in ((written, None), (base, ALL_LINEAR)):
        model, _ = load_cogvlm(folder, layers=1, quantize=quantize)
        assert not any(".layers.1." in name for name in codes(model)) and codes(model)


def rewritten(written, tmp_path, change):
    """A copy of the folder with another note: `change` alters it, or returns what stands there instead, in a list."""
    folder = tmp_path / "copy"
    shutil.copytree(written, folder)
    path = folder / "model_config.json"
    config = json.loads(path.read_text())
    replaced = change(config["quantization"])
    if isinstance(replaced, list):
        config["quantization"] = replaced[0]
    path.write_text(json.dumps(config))
    return folder


NOTES = {
    "another version": (lambda note: note.update(format_version=2), "format version 2, this sat_lora reads 1.*anew"),
    "no version": (lambda note: note.pop("format_version"), "not what `sat-lora quantize` writes: no 'format_version'"),
    "another scheme": (lambda note: note.update(scheme="nf5"), "not what .* there is no scheme 'nf5'"),
    "a scheme that is none": (lambda note: note.update(scheme=["nf4"]), "not what .* wanted a scheme, patterns"),
    "another dtype": (lambda note: note.update(dtype="int8"), "not what .* there is no dtype 'int8', only float32, "),
    "no base": (lambda note: note.pop("base"), "not what .* no 'base'"),
    "a base that is none": (lambda note: note.update(base=[1]), "not what `sat-lora quantize` writes"),
    "weights that are none": (lambda note: note.update(weights=[7]), "not what .* no names of weights"),
    "the other scheme": (lambda note: note.update(scheme="int8"), "not hold what its config says: .* codes in"),
    "a name too many": (lambda note: note["weights"].append("x.weight"), "not hold .*: x.weight: no codes and scales"),
    "a name too few": (
        lambda note: note["weights"].__delitem__(-1),
        r"not hold what its config says: .*weight: codes and scales, and no name among its weights",
    ),
    "a version as text": (lambda note: note.update(format_version="1"), "whole number for its format_version, got '1'"),
    "a version that is true": (lambda note: note.update(format_version=True), "format_version, got True"),
    "a version with a point": (lambda note: note.update(format_version=1.0), "format_version, got 1.0"),
    "no number": (lambda note: note.update(format_version=None), "format_version, got None"),
    "version 0": (lambda note: note.update(format_version=0), "in format version 0, this sat_lora reads 1"),
    "a dtype in a list": (
        lambda note: note.update(dtype=["bfloat16"]),
        r"not what .* there is no dtype \['bfloat16'\]",
    ),
    "weights as an object": (
        lambda note: note.update(weights=dict.fromkeys(note["weights"])),
        "not what .* no names of weights, but {'mixins",
    ),
    "weights as a text": (
        lambda note: note.update(weights=note["weights"][0]),
        "no names of weights, but 'mixins",
    ),
    "no weights": (lambda note: note.update(weights=[]), "not what .* no names of weights, but an empty list"),
    "weights of null": (lambda note: note.update(weights=None), "not what .* no names of weights, but None"),
    "a weight twice": (
        lambda note: note["weights"].insert(0, note["weights"][3]),
        r"not what .* the weight '.*\.weight' is named 2 times",
    ),
    "null": (lambda note: [None], "not what `sat-lora quantize` writes: wanted an object, got None"),
    "a scheme alone": (lambda note: ["nf4"], "not what `sat-lora quantize` writes: wanted an object, got 'nf4'"),
    "a list": (lambda note: [[note]], "not what `sat-lora quantize` writes: wanted an object, got "),
    "nothing": (lambda note: [{}], "not what `sat-lora quantize` writes: no 'format_version'"),
}


@pytest.mark.parametrize(("change", "problem"), NOTES.values(), ids=NOTES)
def test_a_damaged_note_is_one_error(written, tmp_path, change, problem):
    folder = rewritten(written, tmp_path, change)
    for use in (check_files, load_cogvlm):
        with pytest.raises(CheckpointError, match=problem) as error:
            use(folder)
        assert len(str(error.value)) < 1500


def test_codes_without_a_note_are_told_in_one_sentence(written, tmp_path):
    folder = shutil.copytree(written, tmp_path / "copy")
    path = folder / "model_config.json"
    config = json.loads(path.read_text())
    del config["quantization"]
    path.write_text(json.dumps(config))
    for use in (check_files, load_cogvlm, BaseWeights):
        with pytest.raises(
            CheckpointError, match="[0-9]+ of its weights are quantised .*`quantization` is missing in"
        ) as e:
            use(folder)
        assert str(e.value).count(".weight") == 1


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_scales_that_are_not_finite_are_refused_by_name(written, tmp_path, value):
    folder = shutil.copytree(written, tmp_path / "copy")
    file = next(folder.rglob("*.pt"))
    content = torch.load(file)
    name = "mixins.mlp.gate_proj.0.weight"
    content["module"][f"{name}.scales"][1, 0] = value
    torch.save(content, file)
    with pytest.raises(CheckpointError, match=f"{name}: scales of its codes are not finite; the file is damaged"):
        load_cogvlm(folder)


def test_codes_of_another_shape_are_named(written, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(written, folder)
    file = next(folder.rglob("*.pt"))
    content = torch.load(file)
    name = "mixins.mlp.gate_proj.0.weight"
    content["module"][f"{name}.scales"] = content["module"][f"{name}.scales"][:, :1].clone()
    torch.save(content, file)
    with pytest.raises(CheckpointError, match=f"{name}: 128 columns with 1 scales"):
        load_cogvlm(folder)


def test_a_quantised_base_is_not_quantised_again(written, tmp_path):
    with pytest.raises(CheckpointError, match="is quantised already, to nf4"):
        quantize_base(written, tmp_path / "again", ALL_LINEAR)
    assert not (tmp_path / "again").exists()


OTHERS = {
    "another scheme": (
        Quantization(scheme="int8"),
        {},
        "quantised to int8: all-linear, and .*nf4 is quantised to nf4: ",
    ),
    "fewer layers": (
        Quantization(keep_modules=["vit-mlp"]),
        {},
        "quantised to nf4: all-linear without vit-mlp, and .*; mixins.eva.* is one of 4 weights that differ",
    ),
    "other modules": (Quantization(modules=["language-mlp"]), {}, "quantised to nf4: language-mlp, and .*that differ"),
    "the same layers in other words": (Quantization(modules=["all-linear", "language-mlp"]), {}, None),
    "what it brings whole": (Quantization(trained=("linear_proj",)), dict(modules_to_save=["linear_proj"]), None),
    "the same": (Quantization(), {}, None),
    "whole weights": (None, {}, "was trained beside the base's own weights, or .*nf4 is quantised to nf4: all-linear"),
}


@pytest.mark.parametrize(("quantization", "fields", "problem"), OTHERS.values(), ids=OTHERS)
def test_a_quantised_folder_is_merged_with_what_was_trained_beside_its_weights_alone(
    base, written, tmp_path, quantization, fields, problem
):
    model, _ = load_cogvlm(base, dtype=torch.bfloat16, quantize=quantization)
    add_lora(model, r=2, target_modules=["language-mlp"], **fields)
    save_adapter(model, tmp_path / "adapter")
    if problem is None:
        merge_adapter(written, tmp_path / "adapter", tmp_path / "merged", onto="trained")
        return
    with pytest.raises(AdapterError, match=f"^--onto trained: .*{problem}.*; merge into the base .*of, {base.name}"):
        merge_adapter(written, tmp_path / "adapter", tmp_path / "merged", onto="trained")
    assert not (tmp_path / "merged").exists()


def test_nothing_is_merged_into_it_unasked(base, written, tmp_path):
    model, _ = load_cogvlm(written)
    add_lora(model, r=2)
    save_adapter(model, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["sat_lora"]["base_quantization"] == {
        "scheme": "nf4", "quantize_modules": "all-linear", "keep_modules": []
    }  # fmt: skip
    with pytest.raises(CheckpointError, match=f"--base: {written} is quantised.*made of, {base.name}"):
        merge_adapter(written, tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")


def test_a_merge_takes_the_base_or_what_was_trained_beside(base, written, tmp_path):
    """The decoded weights come out of the whole base and of the quantised folder alike."""
    model, _ = load_cogvlm(written, dtype=torch.bfloat16)
    decoded = {name: weight.decoded() for name, weight in quantized_weights(model)}
    add_lora(model, r=2, target_modules=["vit-mlp"])
    fill_adapters(model)
    save_adapter(model, tmp_path / "adapter")
    merged = {}
    for name, folder, onto in (("a", base, "base"), ("b", base, "trained"), ("c", written, "trained")):
        merge_adapter(folder, tmp_path / "adapter", tmp_path / name, onto=onto)
        merged[name] = load_cogvlm(tmp_path / name, dtype=torch.bfloat16)[0].state_dict()
        assert "quantization" not in json.loads((tmp_path / name / "model_config.json").read_text())
    whole = load_cogvlm(base, dtype=torch.bfloat16)[0].state_dict()
    assert all(torch.equal(merged["b"][name], tensor) for name, tensor in merged["c"].items())
    adapted = [name for name in merged["a"] if ".mlp." in name and "vit_model" in name and name.endswith("weight")]
    for name, tensor in merged["a"].items():
        weight = decoded.get(name.removesuffix(".weight"))
        if name not in adapted:
            assert torch.equal(tensor, whole[name])
            assert torch.equal(merged["b"][name], whole[name] if weight is None else weight)
        else:
            effect = [merged["b"][name].float() - weight.float(), tensor.float() - whole[name].float()]
            torch.testing.assert_close(*effect, rtol=0, atol=2**-8 * float(tensor.abs().max()) * 2)


@pytest.mark.parametrize("fields", [{}, dict(use_dora=True), dict(modules_to_save=["linear_proj"])])
def test_a_merge_is_verified_against_the_weights_that_it_was_made_of(base, written, tmp_path, fields):
    quantization = Quantization(trained=tuple(fields.get("modules_to_save", ())))
    model, _ = load_cogvlm(base, dtype=torch.bfloat16, quantize=quantization)
    add_lora(model, r=2, target_modules=["language-mlp", "vit-mlp"], **fields)
    fill_adapters(model)
    save_adapter(model, tmp_path / "adapter")
    made = [("base", base, "base"), ("trained", base, "trained")]
    made += [] if fields.get("modules_to_save") else [("written", written, "trained")]
    for name, folder, onto in made:
        merge_adapter(folder, tmp_path / "adapter", tmp_path / name, onto=onto)
        assert verify_merge(folder, tmp_path / "adapter", tmp_path / name, onto=onto).problems == ()
        other = {"base": "trained", "trained": "base"}[onto]
        if folder == base:
            problems = verify_merge(base, tmp_path / "adapter", tmp_path / name, onto=other).problems
            assert problems[0].startswith("not base plus adapter, rounded once: ")


def test_the_command_verifies_what_it_merged_onto_what_was_trained(base, tmp_path, capsys):
    model, _ = load_cogvlm(base, dtype=torch.bfloat16, quantize=ALL_LINEAR)
    add_lora(model, r=2)
    fill_adapters(model)
    save_adapter(model, tmp_path / "adapter")
    line = ["merge", "--base", base, "--adapter", tmp_path / "adapter", "--out", tmp_path / "merged"]
    assert main([*map(str, line), "--onto", "trained", "--verify"]) == 0
    assert "verified: merging lost " in capsys.readouterr().out


LOFTQ = dict(r=4, init_lora_weights="loftq", loftq_iter=2, target_modules=["language-attention", "linear_proj"])


def test_loftq_reads_the_base_again_and_what_it_trained_beside_can_be_made_again(base, tmp_path):
    """By a merge of files onto it, and in a model that is loaded to evaluate the adapter."""
    model, _ = load_cogvlm(base, quantize=Quantization())
    add_lora(model, **LOFTQ)
    fresh = {name: weight.decoded() for name, weight in quantized_weights(model)}
    batch = tiny_batch()
    rough, _ = load_cogvlm(base, quantize=Quantization())
    kept, _ = load_cogvlm(base)
    quantize_model(kept, keep_originals=True)
    add_lora(kept, **LOFTQ)
    for name, weight in quantized_weights(kept):
        assert torch.equal(weight.decoded(), fresh[name])
    with torch.no_grad():
        for adapter in adapters_of(model).values():
            adapter.B.add_(0.01 * torch.randn_like(adapter.B))
    save_adapter(model, tmp_path / "adapter")
    note = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["sat_lora"]["base_quantization"]
    assert (note["scheme"], note["loftq_iter"]) == ("nf4", 2)
    assert ": all-linear, begun by loftq in 2 rounds" in describe_adapter(inspect_adapter(tmp_path / "adapter"))
    assert "; loftq adds a product of low rank to " in describe_text(model)
    load_adapter(rough, tmp_path / "adapter")
    wanted = logits_of(model, batch)

    @torch.no_grad()
    def error(model):
        return float((logits_of(model, batch) - wanted).norm() / wanted.norm())

    assert error(rough) > 0.05
    assert approximate_base(rough, tmp_path / "adapter")
    assert error(rough) < 1e-4
    for mixin in lora_mixins(rough).values():
        mixin.disable()
    for name, weight in quantized_weights(rough):
        torch.testing.assert_close(weight.decoded(), fresh[name], rtol=1e-4, atol=1e-5)
    merge_adapter(base, tmp_path / "adapter", tmp_path / "onto", onto="trained")
    assert error(load_cogvlm(tmp_path / "onto")[0]) < 0.01  # rounded to bfloat16
    merge_adapter(base, tmp_path / "adapter", tmp_path / "whole")
    whole, _ = load_cogvlm(base)
    load_adapter(whole, tmp_path / "adapter")
    wanted = logits_of(whole, batch)
    assert error(load_cogvlm(tmp_path / "whole")[0]) < 0.01
    assert not approximate_base(whole, tmp_path / "adapter")
    quantize_base(base, tmp_path / "nf4", Quantization())
    with pytest.raises(AdapterError, match="was begun by loftq, with other codes than those of a quantised folder"):
        merge_adapter(tmp_path / "nf4", tmp_path / "adapter", tmp_path / "merged", onto="trained")


@pytest.mark.parametrize("rounds", [0, True, "2", 10**9, [1]], ids=str)
def test_a_note_of_loftq_that_is_nonsense_is_an_error_where_it_is_obeyed(base, rounds, tmp_path):
    model, _ = load_cogvlm(base, quantize=Quantization())
    add_lora(model, r=2, target_modules=["linear_proj"])
    save_adapter(model, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    content = json.loads(path.read_text())
    content["sat_lora"]["base_quantization"]["loftq_iter"] = rounds
    path.write_text(json.dumps(content))
    with pytest.raises(AdapterError, match="its note says loftq_iter .* has to be a whole number from 1 to 1000"):
        approximate_base(model, tmp_path / "adapter")
    with pytest.raises(AdapterError, match="its note says loftq_iter .* has to be a whole number from 1 to 1000"):
        merge_adapter(base, tmp_path / "adapter", tmp_path / "merged", onto="trained")
    inspect_adapter(tmp_path / "adapter")
    load_adapter(model, tmp_path / "adapter")  # nobody has to obey it


def test_loftq_wants_the_base_itself(base, written, tmp_path):
    model, _ = load_cogvlm(written)
    with pytest.raises(ConfigError, match="is not to be had any more.*--from_pretrained BASE --quantize nf4"):
        add_lora(model, **LOFTQ)
    shutil.copytree(base, tmp_path / "base")
    model, _ = load_cogvlm(tmp_path / "base", quantize=Quantization())
    for file in (tmp_path / "base").rglob("*.pt"):
        file.unlink()
    with pytest.raises(CheckpointError, match="base"):
        add_lora(model, **LOFTQ)


def trained_beside(base, folder, quantization, seed, **fields):
    """An adapter, in FOLDER, of the base held so."""
    model, _ = load_cogvlm(base, dtype=torch.bfloat16, quantize=quantization)
    add_lora(model, r=2, **{"target_modules": ["language-mlp"], **fields})
    fill_adapters(model, seed)
    save_adapter(model, folder)
    return folder


@pytest.mark.parametrize("method", [dict(method="cat"), dict(method="svd", rank=2)], ids=["cat", "svd"])
@pytest.mark.parametrize("quantization", [ALL_LINEAR, Quantization(scheme="int8", keep_modules=["vit-mlp"])], ids=str)
def test_adapters_of_one_quantised_base_are_combined_to_another(base, quantization, method, tmp_path):
    folders = [trained_beside(base, tmp_path / str(seed), quantization, seed) for seed in range(2)]
    combine_adapters(folders, tmp_path / "sum", **method)
    assert f"trained on    the base quantised to {quantization}\n" in describe_adapter(
        inspect_adapter(tmp_path / "sum")
    )
    merge_adapter(base, tmp_path / "sum", tmp_path / "merged", onto="trained")
    assert verify_merge(base, tmp_path / "sum", tmp_path / "merged", onto="trained").problems == ()
    held = dict(quantized_weights(load_cogvlm(base, dtype=torch.bfloat16, quantize=quantization)[0]))
    merged = load_cogvlm(tmp_path / "merged", dtype=torch.bfloat16)[0]
    adapted = read_adapter(tmp_path / "sum").layers.keys()
    others = [name for name in held if name not in adapted]
    assert others and all(torch.equal(merged.get_parameter(f"{n}.weight"), held[n].decoded()) for n in others)


NOTHING_IN_COMMON = {
    "two schemes": ((ALL_LINEAR, {}), (Quantization(scheme="int8"), {})),
    "other layers": ((ALL_LINEAR, {}), (Quantization(keep_modules=["vit-mlp"]), {})),
    "a whole base": ((ALL_LINEAR, {}), (None, {})),
    "a whole base first": ((None, {}), (ALL_LINEAR, {})),
    "loftq": ((ALL_LINEAR, dict(init_lora_weights="loftq")), (ALL_LINEAR, dict(init_lora_weights="loftq"))),
    "loftq alone": ((ALL_LINEAR, dict(init_lora_weights="loftq")),),
}


@pytest.mark.parametrize("sides", NOTHING_IN_COMMON.values(), ids=NOTHING_IN_COMMON)
def test_adapters_without_a_quantised_base_in_common_note_none_and_that_is_told(base, sides, tmp_path, caplog):
    folders = [trained_beside(base, tmp_path / str(n), held, n, **fields) for n, (held, fields) in enumerate(sides)]
    combine_adapters(folders, tmp_path / "sum", method="svd", rank=2)
    assert "no quantised base in common" in caplog.text and "--onto trained" in caplog.text
    assert read_adapter(tmp_path / "sum").base_quantization is None
    with pytest.raises(
        AdapterError, match="--onto trained: .* names no scheme: .* or is combined of adapters .*; leave"
    ):
        merge_adapter(base, tmp_path / "sum", tmp_path / "merged", onto="trained")
    merge_adapter(base, tmp_path / "sum", tmp_path / "merged")


def test_adapters_of_a_whole_base_are_combined_without_a_word(base, tmp_path, caplog):
    folders = [trained_beside(base, tmp_path / str(seed), None, seed) for seed in range(2)]
    combine_adapters(folders, tmp_path / "sum", method="cat")
    assert read_adapter(tmp_path / "sum").base_quantization is None and not caplog.text


def test_onto_what_was_trained_wants_an_adapter_that_says_it(base, tmp_path):
    model, _ = load_cogvlm(base)
    add_lora(model, r=2)
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(
        AdapterError, match="--onto trained: .* was trained beside the base's own weights, or .*; leave"
    ):
        merge_adapter(base, tmp_path / "adapter", tmp_path / "merged", onto="trained")
    path = tmp_path / "adapter" / "adapter_config.json"
    content = json.loads(path.read_text())
    content["sat_lora"]["base_quantization"] = {"scheme": "nf9"}
    path.write_text(json.dumps(content))
    with pytest.raises(AdapterError, match="--onto trained: .* is not known here: .* no scheme 'nf9'"):
        merge_adapter(base, tmp_path / "adapter", tmp_path / "merged", onto="trained")
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")  # nobody has to obey the note


def test_a_value_that_is_not_finite_is_named(tmp_path):
    model = tiny_model(config=WIDE)
    name = "mixins.mlp.gate_proj.1.weight"
    model.get_parameter(name).data[3, 5] = torch.inf
    save_weights(tmp_path / "base", WIDE, model.state_dict())
    for use in (
        lambda: load_cogvlm(tmp_path / "base", quantize=ALL_LINEAR),
        lambda: quantize_base(tmp_path / "base", tmp_path / "out", ALL_LINEAR),
    ):
        with pytest.raises(QuantizationError, match=f"{name}: it holds values that are not finite"):
            use()
    assert not (tmp_path / "out").exists()
