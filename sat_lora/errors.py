"""The exceptions a user of sat_lora can meet. Each message says what, where, got, wanted and what to do."""

from sat_lora.printable import printable_lines


class SatLoraError(Exception):
    """A mistake that the user can mend; command-line tools print it without a traceback.

    Its text only shows on a terminal, whatever names of files, layers and settings are in it: control characters are
    escaped, and a line after the first never begins at the margin, where a tool's own messages do.
    """

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
