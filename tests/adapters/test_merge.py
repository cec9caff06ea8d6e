"""`sat-lora merge`: base and adapter become one checkpoint."""

import json
import re
import shutil

import pytest
import safetensors.torch
import torch

from sat_lora import AdapterError, CheckpointError, MergeError, SatLoraError, add_lora, save_adapter
from sat_lora.adapters import merge as merge_checkpoint
from sat_lora.adapters.merge import merge_adapter
from sat_lora.cli import main
from sat_lora.cogvlm.checkpoints.load import load_cogvlm, map_weights, save_weights
from sat_lora.cogvlm.checkpoints.sat_folder import make_sat_weights
from sat_lora.cogvlm.inputs.text import load_tokenizer
from sat_lora.cogvlm.network.model import build_cogvlm
from sat_lora.lora.apply import adapters_of
from sat_lora.lora.mixin import lora_mixins
from sat_lora.parallel.distributed import init_distributed, init_model_parallel
from tests.support.character_tokenizer import write_character_tokenizer
from tests.support.memory import peak_of_anonymous_memory
from tests.support.ranks import run_ranks
from tests.support.tiny import CONFIG, fill_adapters, logits_of, tiny_batch, tiny_model

pytestmark = [
    pytest.mark.usefixtures("single_process_group"),
    pytest.mark.filterwarnings("ignore:LoRA rank"),  # the ViT has a vocabulary of one
]
WEIGHTS = "release/mp_rank_00_model_states.pt"


def trained_model(dtype, **fields):
    model = tiny_model(dtype).eval()
    add_lora(model, **{"r": 4, **fields})
    fill_adapters(model, std=0.1)
    with torch.no_grad():
        for mixin in lora_mixins(model).values():
            for parameter in mixin.trained.tensors.values():
                parameter *= 1.5
    return model


@pytest.fixture
def folders(tmp_path):
    """(base, adapter, out) of a dtype: a base with its tokenizer, an adapter trained on it, a folder not there yet."""

    def make(dtype=torch.float32, **fields):
        base = tmp_path / "base"
        save_weights(base, CONFIG, tiny_model(dtype).state_dict())
        write_character_tokenizer(base)
        save_adapter(trained_model(dtype, **fields), tmp_path / "adapter")
        return base, tmp_path / "adapter", tmp_path / "merged"

    return make


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


EVERYTHING = ["all-linear", "lm-head", "patch-embedding"]
VARIANTS = {
    "default": {},
    "q and v": {"qkv_slots": ("q", "v"), "use_rslora": True},
    "every kind of layer": {"target_modules": [*EVERYTHING, "word_embeddings", "position_embeddings"]},
    "dora": {"use_dora": True, "target_modules": EVERYTHING, "qkv_slots": "qv"},
    "pissa": {"init_lora_weights": "pissa"},
    "parameters whole": {"modules_to_save": ["linear_proj", "boi"], "bias": "all"},
}


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_the_merged_model_is_base_and_adapter_together(folders, fields):
    base, adapter, out = folders(**fields)
    merge_adapter(base, adapter, out)
    batch = tiny_batch()
    exact = {**batch, "images": batch["images"].double()}
    merged = load_cogvlm(out)[0].eval()
    expected = trained_model(torch.float32, **fields).double()
    torch.testing.assert_close(logits_of(merged.double(), exact), logits_of(expected, exact), rtol=1e-4, atol=3e-5)
    plain = logits_of(load_cogvlm(base)[0].eval(), batch)
    assert (logits_of(merged.float(), batch) - plain).norm() > 0.1 * plain.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_the_exact_sum_rounded_once(folders, dtype):
    base, adapter, out = folders(dtype, lora_alpha=6)
    merge_adapter(base, adapter, out)
    old, new = map_weights(base / WEIGHTS), map_weights(out / WEIGHTS)
    exact = {name: tensor.double() for name, tensor in old.items()}
    for name, a in adapters_of(trained_model(dtype, lora_alpha=6)).items():
        row = 0
        for number, (start, stop) in enumerate(a.target.rows):
            factors = a.B[row : row + stop - start].double(), a.A[number * a.rank : (number + 1) * a.rank].double()
            exact[f"{name}.weight"][start:stop] += (6 / 4) * factors[0] @ factors[1]
            row += stop - start
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {f"{name}.weight" for name in adapters_of(trained_model(dtype))}
    for name in changed:
        assert new[name].dtype == dtype
        torch.testing.assert_close(
            new[name].double(), exact[name], rtol=0.501 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).tiny
        )


def test_the_base_stays_as_it_was_and_its_tokenizer_comes_along(folders):
    base, adapter, out = folders()
    (base / "notes.txt").write_text("mine")
    before = content(base), content(adapter)
    merge_adapter(base, adapter, out)
    assert (content(base), content(adapter)) == before
    names = {"latest", "model_config.json", "notes.txt", "tokenizer.json", "tokenizer_config.json", WEIGHTS}
    assert set(content(out)) == names
    assert load_tokenizer(out).encode("ab") == load_tokenizer(base).encode("ab")
    assert json.loads((out / "model_config.json").read_text())["eva_args"] == CONFIG["eva_args"]
    assert (out / WEIGHTS).stat().st_size < 1.01 * (base / WEIGHTS).stat().st_size


def test_an_existing_folder_is_not_overwritten(folders):
    base, adapter, out = folders()
    out.mkdir()
    with pytest.raises(CheckpointError, match="--out: .*merged exists; give a new folder"):
        merge_adapter(base, adapter, out)
    assert not list(out.iterdir())


def test_an_adapter_of_another_base_is_refused(folders):
    """One layer more: every adapted linear is there and fits, and still the sum would be another model."""
    base, adapter, out = folders()
    shutil.rmtree(base)
    save_weights(base, CONFIG, {**tiny_model().state_dict(), "transformer.layers.2.x": torch.zeros(1)})
    with pytest.raises(AdapterError, match="--adapter: .*adapter was trained on a base with other names or shapes"):
        merge_adapter(base, adapter, out)
    assert not out.exists()


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_every_kind_of_base_and_cut_gives_the_same_weights(folders, tmp_path, fields):
    """SAT cut for 1, 2 and 4 ranks and Hugging Face, from and to, with each step starting at the last one's folder."""
    base, adapter, plain = folders(**fields)
    merge_adapter(base, adapter, plain)
    expected = map_weights(plain / WEIGHTS)
    nothing = tmp_path / "nothing"
    model = tiny_model()
    add_lora(model, r=1)  # B is zero
    save_adapter(model, nothing)
    for number, (to, ranks) in enumerate([("sat", 2), ("hf", 1), ("sat", 4), ("sat", 2), ("hf", 1), ("sat", 1)]):
        recut = tmp_path / f"recut {number}"
        merge_adapter(base, nothing, recut, to=to, model_parallel_size=ranks)
        merged = tmp_path / f"merged {number}"
        merge_adapter(recut, adapter, merged)
        found = map_weights(merged / WEIGHTS)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():  # how a mapped tensor is aligned shows in the last bit of DoRA's norms
            torch.testing.assert_close(found[name], tensor, rtol=1e-6 if fields else 0, atol=0)
        base = recut
    assert json.loads((tmp_path / "recut 2" / "model_config.json").read_text())["model_parallel_size"] == 4
    assert len(list((tmp_path / "recut 2" / "release").iterdir())) == 4


def test_a_hugging_face_folder_has_the_published_names_and_loads(folders, tmp_path):
    base, adapter, out = folders()
    merge_adapter(base, adapter, out, to="hf")
    tensors = safetensors.torch.load_file(out / "model.safetensors")
    assert "model.layers.0.self_attn.vision_expert_query_key_value.weight" in tensors
    frequencies = map_weights(base / WEIGHTS)["mixins.rotary.rotary_emb.inv_freq"]
    for layer in range(CONFIG["num_layers"]):
        assert torch.equal(tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"], frequencies)
    assert json.loads((out / "config.json").read_text())["vision_config"]["num_positions"] == 10
    merge_adapter(base, adapter, tmp_path / "sat")
    batch = tiny_batch()
    models = [load_cogvlm(folder)[0].eval() for folder in (out, tmp_path / "sat")]
    assert torch.equal(*(logits_of(model, batch) for model in models))


def test_a_size_that_does_not_divide_is_refused(folders):
    base, adapter, out = folders()
    with pytest.raises(SatLoraError, match="3 does not divide"):
        merge_adapter(base, adapter, out, model_parallel_size=3)
    assert not out.exists()


def test_memory_grows_by_little_more_than_one_tensor(tmp_path):
    """A process that merges a base of 0.77 GB, whose largest tensor is of 67 MB."""
    config = {**CONFIG, "hidden_size": 2048, "inner_hidden_size": 8192, "vocab_size": 16384, "num_layers": 2}
    wide = build_cogvlm(config, device="meta", dtype=torch.bfloat16)
    layout = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in wide.state_dict().items()}
    (tensors,) = make_sat_weights(tmp_path / "base", config, [layout])
    for tensor in tensors.values():
        tensor.fill_(0.01)
    size, largest = (of(t.numel() * t.itemsize for t in tensors.values()) for of in (sum, max))
    del tensors
    assert size > 2**29
    run_ranks(write_adapter_for, 1, tmp_path)
    (growth,) = run_ranks(peak_of_merging, 1, tmp_path)
    assert growth < largest + 500 * 10**6


def write_adapter_for(folder):
    init_model_parallel(init_distributed())
    model, _ = load_cogvlm(folder / "base", dtype=torch.bfloat16)
    add_lora(model, r=8)
    save_adapter(model, folder / "adapter")


def peak_of_merging(folder):
    return peak_of_anonymous_memory(merge_adapter, folder / "base", folder / "adapter", folder / "out")


def test_a_sum_that_is_not_finite_is_refused(folders):
    base, adapter, out = folders(torch.float16)
    model = trained_model(torch.float16)
    with torch.no_grad():
        adapters_of(model)["transformer.layers.0.attention.dense"].B.fill_(6e4)
    save_adapter(model, adapter)
    with pytest.raises(MergeError, match="layers.0.attention.dense.weight: .* merged values are not finite"):
        merge_adapter(base, adapter, out)
    assert not out.exists()


def run(capsys, base, adapter, out, *more):
    status = main(["merge", "--base", str(base), "--adapter", str(adapter), "--out", str(out), *more])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_the_command_merges_and_says_where(folders, capsys):
    base, adapter, out = folders()
    status, printed, error = run(capsys, base, adapter, out)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) / 1e6
    expected = f"merged model in {out}, {size:.1f} MB\nuse it as   --from_pretrained {out}, without an adapter\n"
    assert (status, printed, error) == (0, expected, "")
    assert (out / WEIGHTS).is_file()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("more", [["--to", "hf"], ["--model-parallel-size", "2"]])
def test_verify_says_that_the_logits_are_the_same(folders, capsys, dtype, more):
    base, adapter, out = folders(dtype)
    status, printed, _ = run(capsys, base, adapter, out, "--verify", *more)
    assert status == 0 and re.search("verified: merging lost [0-9.]+% of the adapter's effect on the logits", printed)


def test_verify_fails_where_they_are_not(folders, capsys, monkeypatch):
    monkeypatch.setattr(merge_checkpoint, "merged_weight", lambda weight, *rest: weight.float())
    base, adapter, out = folders()
    status, printed, _ = run(capsys, base, adapter, out, "--verify")
    assert status == 1 and "WRONG: merging lost 100.00% of the adapter's effect" in printed


def test_a_cut_of_a_hugging_face_folder_is_refused(folders, capsys):
    base, adapter, out = folders()
    status, _, error = run(capsys, base, adapter, out, "--to", "hf", "--model-parallel-size", "2")
    assert status == 2 and "--model-parallel-size: got 2" in error


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda base, adapter, out: (base / WEIGHTS, adapter, out), "is a file; give the model folder"),
        (lambda base, adapter, out: (base, base, out), "is not an adapter folder"),
        (lambda base, adapter, out: (adapter, adapter, out), "is not a SAT model folder"),
        (lambda base, adapter, out: (base, adapter, base), "base exists; give a new folder"),
        (lambda base, adapter, out: (base, adapter, base / "latest" / "x"), "--out: .*latest/x cannot be written"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(folders, capsys, spoil, message):
    status, out, err = run(capsys, *spoil(*folders()))
    assert status == 2 and out == ""
    assert "Traceback" not in err and err.count("\n") == 1
    assert re.match(f"sat-lora merge: error: .*{message}", err)


def test_a_missing_option_is_named(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["merge", "--base", "x"])
    assert stop.value.code == 2 and "required: --adapter, --out" in capsys.readouterr().err
