"""Scripts of the checkout that are in no package, as modules, and finetune_cogvlm.py run in this process."""

import contextlib
import importlib.util
import io
from pathlib import Path
from types import ModuleType

from tests.support.paths import DEMO


def load_file(path: Path) -> ModuleType:
    """The module that a file of Python makes, anew with each call."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_script(name: str) -> ModuleType:
    """The script finetune_demo/NAME.py."""
    return load_file(DEMO / f"{name}.py")


def run_script(argv: list[str], refuse_to_load: bool = False) -> tuple[int, str]:
    """The status of finetune_cogvlm.py with these arguments, and what it wrote to stderr.

    refuse_to_load: it is a RuntimeError if the run comes as far as loading its model.
    """
    import sat_lora.training.prepare as prepare

    if refuse_to_load:

        def load_cogvlm(*args, **kwargs):
            raise RuntimeError("the model was loaded")

        prepare.load_cogvlm = load_cogvlm
    script = load_script("finetune_cogvlm")
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        try:
            status = script.main(argv)
        except SystemExit as stop:
            status = stop.code
    return status, errors.getvalue()
