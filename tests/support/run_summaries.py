"""What a run says before its first step, by the label of each line."""

from sat_lora.training.run_summary import columns, look_at, run_summary
from tests.support.configs import demo, parse_options
from tests.support.datasets import WORLD

CONFIG = {"model_class": "CogVLMModel", "num_layers": 2, "vocab_size": 128}


def summary_lines(source, *argv, start_step=0, steps=20, valid=None, **changes):
    """{label: line} of the summary of a run with these options."""
    options = parse_options(["--train-data", "images", "--model-parallel-size", "2", *argv], environ={})
    options = options.replaced(distributed_backend="gloo", **changes)
    texts = look_at(source, CONFIG["vocab_size"])
    sources = dict(data=source, valid=valid, steps=steps, start_step=start_step, fingerprint="0123456789abcdef")
    text = run_summary(options, WORLD, CONFIG, texts, **sources, demo=demo.DEMO)
    lines = text.splitlines()
    assert len(lines) <= 10 and text.isprintable() is (len(lines) == 1)
    assert all(columns(line) <= 80 for line in lines if not line.startswith("run "))
    return {line[:10].strip(): line[10:] for line in lines}
