"""Adapters to combine, their deltas, and the same combinations by PEFT."""

from functools import cache

import peft
import torch
from torch import nn

from sat_lora import LoraConfig, add_lora, save_adapter
from sat_lora.adapters.format import PAIR
from sat_lora.adapters.read import read_adapter
from tests.support.tiny import fill_adapters, tiny_model

SMALL = {"target_modules": ["language-attention", "vit-mlp"], "r": 4, "lora_alpha": 16}
QKV, DENSE = "transformer.layers.0.attention.query_key_value", "transformer.layers.0.attention.dense"


def adapter_maker(root):
    """A function that saves an adapter with seeded values below `root` and gives its folder, which is to be left alone:
    the same values are saved once."""
    made = {}

    def make(seed, dtype=torch.float64, **fields):
        key = repr((seed, dtype, sorted(fields.items())))
        if key not in made:
            model = tiny_model(dtype)
            add_lora(model, LoraConfig(**{**SMALL, **fields}))
            fill_adapters(model, seed)
            made[key] = root / f"adapter{len(made)}"
            save_adapter(model, made[key])
        return made[key]

    return make


def factors_of(folder):
    """{(layer, slot): (A, B, scale)} of an adapter folder, in float64; the slot is "" where there is none."""
    saved = read_adapter(folder)
    return {
        (name, slot): (*(saved.tensors[saved.keys(name, leaf)[number]].double() for leaf in PAIR), entry.scale)
        for name, entry in saved.layers.items()
        for number, slot in enumerate(entry.slots or ("",))
    }


def deltas_of(folder):
    return {site: s * b @ a for site, (a, b, s) in factors_of(folder).items()}


def summed(folders, weights):
    total = {}
    for folder, weight in zip(folders, weights):
        for site, delta in deltas_of(folder).items():
            total[site] = total.get(site, 0) + weight * delta
    return total


def assert_same(deltas, expected, tolerance):
    assert deltas.keys() == expected.keys()
    for site, delta in deltas.items():
        assert (delta - expected[site]).norm() <= tolerance * expected[site].norm(), site


@cache
def under_peft(*folders):
    """(PEFT model with the adapters "0", "1", ..., the sites): an nn.Sequential with one linear for each site."""
    adapters = [factors_of(folder) for folder in folders]
    sites = sorted({site for adapter in adapters for site in adapter})
    shapes = [next((b.shape[0], a.shape[1]) for a, b, _ in (d[s] for d in adapters if s in d)) for s in sites]
    plain = nn.Sequential(*(nn.Linear(columns, rows, bias=False) for rows, columns in shapes)).double()
    model = None
    for number, adapter in enumerate(adapters):
        ranks = {str(i): len(adapter[site][0]) for i, site in enumerate(sites) if site in adapter}
        alphas = {i: adapter[sites[int(i)]][2] * rank for i, rank in ranks.items()}
        config = peft.LoraConfig(
            r=max(ranks.values()), target_modules=list(ranks), rank_pattern=ranks, alpha_pattern=alphas
        )
        if model is None:
            model = peft.get_peft_model(plain, config, adapter_name="0")
        else:
            model.add_adapter(str(number), config)
        for i in ranks:
            a, b, _ = adapter[sites[int(i)]]
            layer = model.base_model.model[int(i)]
            layer.lora_A[str(number)].weight.data.copy_(a)
            layer.lora_B[str(number)].weight.data.copy_(b)
    return model, sites


def deltas_by_peft(folders, weights, method, **options):
    """The deltas of PEFT's add_weighted_adapter."""
    model, sites = under_peft(*folders)
    names = [str(number) for number in range(len(folders))]
    model.base_model.add_weighted_adapter(names, weights, "combined", combination_type=method, **options)
    layers = model.base_model.model
    deltas = {site: layers[i].get_delta_weight("combined").detach() for i, site in enumerate(sites)}
    model.delete_adapter("combined")
    return deltas
