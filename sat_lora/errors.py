"""The exceptions a user of sat_lora can meet. Each message says what, where, got, wanted and what to do."""

from collections.abc import Sequence
from typing import TypeVar

from sat_lora.printable import printable_lines

_Error = TypeVar("_Error", bound="SatLoraError")


class SatLoraError(Exception):
    """A mistake that the user can mend; command-line tools print it without a traceback.

    Its text only shows on a terminal, whatever names of files, layers and settings are in it: control characters are
    escaped, and a line after the first never begins at the margin, where a tool's own messages do.
    """

    _problems: tuple[str, ...] = ()

    @classmethod
    def of(cls: type[_Error], problems: Sequence[str], head: str = "") -> _Error:
        """Return the error of several problems, whose text is `head` and all of them."""
        error = cls(head + "; ".join(problems))
        error._problems = tuple(problems)
        return error

    @property
    def problems(self) -> tuple[str, ...]:
        """Each problem by itself, without what the text begins with; the whole text where it is one."""
        return self._problems or (super().__str__(),)

    def __str__(self) -> str:
        first, *more = printable_lines(super().__str__()).split("\n")
        return "\n".join([first, *(line if line[:1] == " " or line[:2] == "- " else f"  {line}" for line in more)])


class ConfigError(SatLoraError, ValueError):
    """A setting is wrong: a LoRA field, a command-line option or a DeepSpeed config."""


class CheckpointError(SatLoraError):
    """A base checkpoint folder is missing, incomplete, or does not fit the model."""


class AdapterError(SatLoraError):
    """An adapter folder is missing, damaged, or does not fit the model."""


class DataError(SatLoraError):
    """Training or evaluation data cannot be used."""


class MergeError(SatLoraError):
    """Deltas cannot be written into the weights."""


class TrainingError(SatLoraError):
    """A run cannot go on: a loss or a gradient is not finite."""


class VersionError(SatLoraError, ImportError):
    """A library that is installed is too old or too new."""


class QuantizationError(SatLoraError):
    """A weight that is held in fewer bits cannot be used like a whole one."""
