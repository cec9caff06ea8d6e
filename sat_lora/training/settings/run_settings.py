"""The settings in the run.json of a run, which one that goes on takes over."""

from pathlib import Path

from sat_lora.errors import ConfigError
from sat_lora.files.foreign import read_json
from sat_lora.printable import printable
from sat_lora.training.settings.config import DEFAULTS, KNOWN, NOT_RESUMED
from sat_lora.training.settings.fields import shown


def settings_of_run(folder: str | Path) -> dict:
    """Return the settings in FOLDER/run.json that a resumed run takes over, by name, and under `given` the names of
    those that were set by hand.

    The fields of LoraConfig are for that to check. Raises ConfigError where the folder is none of a run, or settings
    are of types or values that no option has; all of them in one message.
    """
    folder = Path(folder)
    try:
        content = read_json(folder / "run.json")
        if not isinstance(content, dict) or not isinstance(content.get("settings"), dict):
            raise ValueError("it has no settings")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ConfigError(
            f"{printable(folder)} is no run folder with a readable run.json: {printable(reason)}; {_what_it_is(folder)}"
        ) from error
    settings = content["settings"]
    given = settings.get("given", [])
    known = {}
    problems = []
    for name in [name for name in settings if name in DEFAULTS and name not in NOT_RESUMED]:
        try:
            known[name] = KNOWN[name].checked(settings[name])
        except ValueError as error:
            problems.append(f"{name}: got {shown(settings[name])}, wanted {error}")
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
        problems.append("given: wanted a list of names")
    if problems:
        raise ConfigError(f"{printable(folder / 'run.json')} has settings that no run has: {'; '.join(problems)}")
    return {**known, "given": [name for name in given if name in DEFAULTS]}


def _what_it_is(folder: Path) -> str:
    """Return what to give instead of a folder that is none of a run."""
    wanted = "give a run folder like runs/NAME"
    if (folder / "run.json").exists():
        return "mend that file, or start a new run"
    for inner, outer in ((folder, folder.parent), (folder, folder.parent.parent)):
        if inner != outer and (outer / "run.json").is_file():
            return f"it lies in a run folder; give {printable(outer)}"
    if not folder.exists():
        return f"there is no such folder; {wanted}"
    if any((folder / name).exists() for name in ("lock", "watchdog")):
        return "a run there was ended before its first step; start it anew"
    runs = sorted(path.parent.name for path in folder.glob("*/run.json")) if folder.is_dir() else []
    return f"{wanted}; in it there are {printable(', '.join(runs[:5]))}" if runs else wanted
