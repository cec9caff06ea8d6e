"""Options as one namespace that is written back into, as they were before `TrainConfig`: for scripts of that time.

`sat_lora.training.options` and `sat_lora.training.deepspeed_config` are these, see `_moved`.
"""

import os
from argparse import Namespace
from collections.abc import Mapping

from sat_lora.commands.parts import demo_of_clone
from sat_lora.training.settings import options as settings_options
from sat_lora.training.settings.config import TrainConfig
from sat_lora.training.settings.deepspeed_config import settle


def parse_options(
    argv: list[str] | None = None, *, environ: Mapping[str, str] = os.environ, prog: str | None = None
) -> Namespace:
    """Return every option with its value, `given` (names of those set by hand) and `run_folder`.

    A mistake ends the process with status 2 and one line on rank 0, in the name of `prog`.
    """
    config = settings_options.parse_options(argv, environ=environ, prog=prog, demo=demo_of_clone())
    return Namespace(**config.flat(), given=frozenset(config.given), run_folder=config.run_folder)


def deepspeed_config(options: Namespace, *, device: str, environ: Mapping[str, str] = os.environ) -> dict:
    """Return the config for `deepspeed.initialize`, and write into `options` what it decides.

    device: `cuda` or `cpu`. Raises the errors of `settle`.
    """
    settled = settle(TrainConfig.of_flat(vars(options), options.given), device=device, environ=environ)
    vars(options).update(settled.config.flat())
    return settled.engine
