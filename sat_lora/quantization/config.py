"""Quantization: by which scheme the weights of a base are held, and which of them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sat_lora.errors import ConfigError

if TYPE_CHECKING:
    from sat_lora.quantization.weights.schemes import Scheme

NAMES = ("nf4", "int8")
"""The names of the schemes, known without torch."""
Patterns = str | tuple[str, ...]
ALL = "all-linear"


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """Which layers of a base are quantised, and how; raises ConfigError for a scheme that there is not."""

    scheme: str = "nf4"
    """The name of the scheme: nf4 (4.25 bits an element) or int8 (8.25)."""
    modules: Patterns = ALL
    """The layers, in the forms of LoraConfig's target_modules. What a preset selects and cannot be quantised stays
    whole; what another pattern selects and cannot be is an error."""
    keep_modules: Patterns = ()
    """The layers, in the same forms, that are taken away from these."""
    trained: tuple[str, ...] = ()
    """The modules that train whole, as LoraConfig's modules_to_save has them: their weights stay whole."""

    def __post_init__(self) -> None:
        for name in ("modules", "keep_modules", "trained"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        if self.scheme not in NAMES:
            raise ConfigError(f"quantize: there is no scheme {self.scheme!r}, only {' and '.join(NAMES)}")

    @property
    def weights(self) -> "Scheme":
        """The scheme itself."""
        from sat_lora.quantization.weights.schemes import SCHEMES

        return SCHEMES[self.scheme]
