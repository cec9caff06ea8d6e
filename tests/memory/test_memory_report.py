"""The doctor's words on memory: a base that does not fit whole, and would in few bits."""

from types import SimpleNamespace

import pytest
import torch

from sat_lora.errors import ConfigError
from sat_lora.findings.codes import CODES
from sat_lora.memory import memory_report
from sat_lora.memory.components import Memory
from sat_lora.memory.memory_report import estimated_findings
from tests.support.configs import parse_options
from tests.support.paths import TINY_BASE

GIB = 2**30


@pytest.fixture
def found(monkeypatch):
    """Findings of a run with these options, on GPUs of that size. takes: GiB by (scheme, whether all is recomputed)."""

    def findings(options, size, takes):
        asked = []

        def estimated(config, *_):
            scheme, both = config.quantization.quantize, config.checkpointing.checkpoint_activations
            asked.append((scheme, both))
            if (scheme, both) not in takes:
                raise ConfigError("nothing of it can be quantised")
            weights = takes[scheme, both] * GIB
            return Memory(weights=weights, adapters=0, gradients=0, optimizer=0, buffers=0)

        monkeypatch.setattr(memory_report, "_estimated", estimated)
        monkeypatch.setattr(memory_report, "gather_lists", lambda entries: [*entries])
        monkeypatch.setattr(memory_report, "device_memory", lambda device, ranks: size * GIB)
        monkeypatch.setattr(memory_report, "ranks_on_this_machine", lambda ranks: ranks)
        config = parse_options(["--from_pretrained", str(TINY_BASE), *options])
        world = SimpleNamespace(device=torch.device("cuda", 0), size=1)
        return estimated_findings(SimpleNamespace(config=config, world=world)), asked

    return findings


WHOLE, QUANTIZED, RECOMPUTED = ("none", False), ("nf4", False), ("nf4", True)
NF4 = ["--quantize", "nf4"]


@pytest.mark.parametrize(
    ("options", "size", "takes", "fix"),
    [
        ([], 24, {WHOLE: 37, QUANTIZED: 13}, "--quantize nf4: a step then takes 13.00 GiB, which fits"),
        ([], 24, {WHOLE: 37, QUANTIZED: 30, RECOMPUTED: 13},
         "--quantize nf4 --checkpoint-activations --vit_checkpoint_activations: a step then takes 13.00 GiB"),
        ([], 10, {WHOLE: 37, QUANTIZED: 30, RECOMPUTED: 13}, None),
        ([], 24, {WHOLE: 37}, None),
        (NF4, 10, {QUANTIZED: 13}, None),
    ],
)  # fmt: skip
def test_where_a_quantised_base_would_fit_the_option_is_named(found, options, size, takes, fix):
    (finding,), asked = found(options, size, takes)
    assert finding.code == "memory" and f"the device has {size}.00 GiB" in finding.seen
    assert finding.fix is None if fix is None else finding.fix.startswith(fix)
    assert len(asked) == len({*asked})


def test_what_fits_asks_for_no_more(found):
    assert found([], 48, {WHOLE: 37}) == ([], [WHOLE])


def test_a_folder_that_is_quantised_already_is_not_told_to_be(found, monkeypatch):
    monkeypatch.setattr(memory_report, "sizes_of", lambda base: {"quantization": {"scheme": "nf4"}})
    (finding,), asked = found([], 24, {WHOLE: 37, QUANTIZED: 13})
    assert finding.fix is None and asked == [WHOLE]


def test_the_general_advice_names_the_search():
    assert "--quantize nf4" in CODES["memory"].fix and "sat-lora estimate --fit GB" in CODES["memory"].fix
