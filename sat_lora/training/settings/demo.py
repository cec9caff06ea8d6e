"""The demo of a script, for those who name no base: settings, and the data that go with them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sat_lora.training.settings.config import Data


@dataclass(frozen=True, kw_only=True)
class Demo:
    """A base and data that come with a script, and the settings that suit them."""

    base: Mapping[str, Any]
    """Settings in place of the defaults where no base is named, `from_pretrained` among them."""
    own: Mapping[str, Any] = field(default_factory=dict)
    """Further settings where no other data is named either."""
    data_folder: Path
    """The folder in which all of its data lie."""
    make_data: Callable[[], object] = lambda: None
    """A function that writes the data there."""
    data_hint: str = ""
    """The way in which a person makes the data, as the end of a sentence."""

    @property
    def is_here(self) -> bool:
        """Whether the demo's folder is there: sat_lora may be installed without it."""
        return self.data_folder.parent.is_dir()

    def has(self, paths: Sequence[str | Path]) -> bool:
        """Return whether all of these paths are of the demo's data."""
        folder = self.data_folder.resolve()
        return all(Path(path).resolve().is_relative_to(folder) for path in paths)

    def is_base(self, folder: str | Path) -> bool:
        """Return whether a folder is the demo's base."""
        return Path(folder) == Path(self.base["from_pretrained"])

    def values(self, train_data: Sequence[str | Path] | None) -> dict[str, Any]:
        """Return the settings that replace the defaults where no base is named, by name.

        train_data: the training data that are named; None if none are.
        """
        own = {**self.own} if self.has(train_data or ()) else {}
        if train_data is not None:  # its held-out data says nothing about other data
            own |= {"valid_data": None, "test_data": None}
        return {**self.base, **own}

    def makes(self, path: str | Path) -> bool:
        """Return whether a path of data is one that `make_data` will write."""
        return Path(path).parent == self.data_folder and not self.data_folder.exists()

    def make_missing(self, data: Data) -> None:
        """Write the data, if the settings name some of it and it is not there yet."""
        named = [*(data.train_data or ()), *(data.valid_data or ()), *(data.test_data or ())]
        if any(map(self.makes, named)):
            self.make_data()
