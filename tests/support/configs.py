"""Configs of runs as tests want them."""

from sat_lora.training.settings import options
from sat_lora.training.settings.config import Origin, TrainConfig
from tests.support.paths import DEMO
from tests.support.scripts import load_file

demo = load_file(DEMO / "demo.py")


def parse_options(argv=None, *, demo=demo.DEMO, **settings) -> TrainConfig:
    """What finetune_cogvlm.py makes of a command line: with its demo, where no base is named."""
    return options.parse_options(argv, demo=demo, **settings)


def config_of(*, given=(), **values) -> TrainConfig:
    """The defaults but for these values; given: the names of those that are as if set by hand."""
    return TrainConfig.of(values, dict.fromkeys(given, Origin.OPTION))
