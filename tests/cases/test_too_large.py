"""Numbers beyond float32, in options, adapters and weights of a sum: one error each, and nothing is written."""

import argparse

import pytest
import torch

from sat_lora import AdapterError, ConfigError, LoraConfig, combine_adapters
from sat_lora.adapters.read import read_adapter
from sat_lora.terminal.option_types import rate
from sat_lora.training.settings.deepspeed_config import settle
from tests.support.adapter_folders import write_tiny_adapter
from tests.support.configs import parse_options

pytestmark = pytest.mark.usefixtures("single_process_group")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, single_process_group):
    return write_tiny_adapter(tmp_path_factory.mktemp("adapters") / "one")


@pytest.mark.parametrize(
    "weights", [[1e38, 1e38], [1e300, 1.0], [1.0, -1e300], [5e37, 0.0], [1.7e38, 1.7e38], [1e37, 1]]
)
@pytest.mark.parametrize("method", ["cat", "svd", "linear"])
def test_a_sum_that_would_not_load_is_not_written(adapter, tmp_path, method, weights):
    with pytest.raises(AdapterError, match="not combined|cannot be combined"):
        combine_adapters([adapter, adapter], tmp_path / "out", method=method, weights=weights)
    assert not (tmp_path / "out").exists()


def test_a_large_sum_that_loads_is_written(adapter, tmp_path):
    combine_adapters([adapter, adapter], tmp_path / "out", method="cat", weights=[1e30, 1e20])
    saved = read_adapter(tmp_path / "out")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in saved.tensors.values())


@pytest.mark.parametrize("text", ["3e38", "1e39", "1e308", "1e999", "2e30", "inf", "-1", "0"])
def test_a_rate_that_leaves_float32_is_no_rate(text):
    with pytest.raises(argparse.ArgumentTypeError, match="wanted a number above 0, 1e[+]30 at most"):
        rate(text)


def test_a_rate_that_only_ends_a_run_is_taken():
    assert rate("1e30") == 1e30


@pytest.mark.parametrize("name", ["lora_alpha", "lr_ratio"])
@pytest.mark.parametrize("value", [1e308, 3.5e38, 10**300])
def test_a_factor_beyond_float32_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=f"{name} has to be 3.4028e[+]38 at most"):
        LoraConfig(**{name: value})


def test_patterns_are_bounded_as_well():
    with pytest.raises(ConfigError, match=r"alpha_pattern\['dense'\] has to be 3.4028e[+]38 at most"):
        LoraConfig(alpha_pattern={"dense": 1e39})


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (["--lr", "1e20", "--lr_ratio", "1e20"], r"--lr 1e\+20 x --lr_ratio 1e\+20"),
        (["--lr", "1e25", "--weight-decay", "1e25"], r"--lr 1e\+25 x --weight-decay 1e\+25"),
        (["--lr_ratio", "1e35"], r"--lr_ratio 1e\+35"),
    ],
)
def test_factors_that_leave_float32_together_are_named_together(given, shown):
    options = parse_options(["--from_pretrained", "base", *given], environ={})
    with pytest.raises(ConfigError, match=f"^{shown}: a step of that size leaves float32; 1e[+]30 at most"):
        settle(options, device="cpu", environ={})
