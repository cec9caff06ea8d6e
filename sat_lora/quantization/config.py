"""Quantization: by which scheme the weights of a base are held, and which of them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sat_lora.errors import ConfigError
from sat_lora.files.patterns import shortened
from sat_lora.printable import printable

if TYPE_CHECKING:
    from sat_lora.quantized.schemes import Scheme

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
    slices: int = 1
    """How many model-parallel ranks have encoded their slices in blocks that are not the whole's; 1: none has."""

    def __str__(self) -> str:
        modules, kept = (
            side if isinstance(side, str) else " ".join(side) for side in (self.modules, self.keep_modules)
        )
        cut = f", in the blocks of {self.slices} model-parallel slices" if self.slices > 1 else ""
        return printable(f"{self.scheme}: {modules}" + (f" without {kept}" if kept else "") + cut)

    def to_dict(self) -> dict[str, str | int | list[str]]:
        """Return what JSON holds of it: a scheme, two sets of patterns, and the slices where their blocks matter."""
        cut = {"slices": self.slices} if self.slices > 1 else {}
        sides = {"quantize_modules": self.modules, "keep_modules": self.keep_modules}
        return {"scheme": self.scheme, **{n: p if isinstance(p, str) else list(p) for n, p in sides.items()}, **cut}

    @classmethod
    def from_dict(cls, content: object) -> "Quantization":
        """Return the Quantization of which `to_dict` gave `content`. Raises ConfigError for anything else."""
        values = content if isinstance(content, dict) else {}
        patterns = [values.get("quantize_modules", ALL), values.get("keep_modules", [])]
        slices = values.get("slices", 1)
        is_number = type(slices) is int and slices >= 1  # true is equal to 1
        if not isinstance(values.get("scheme"), str) or not all(map(_are_patterns, patterns)) or not is_number:
            raise ConfigError(f"quantize: wanted a scheme, patterns and a number of slices, got {shortened(content)}")
        modules, keep_modules = (side if isinstance(side, str) else tuple(side) for side in patterns)
        return cls(scheme=values["scheme"], modules=modules, keep_modules=keep_modules, slices=slices)

    def __post_init__(self) -> None:
        for name in ("modules", "keep_modules", "trained"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        if self.scheme not in NAMES:
            raise ConfigError(f"quantize: there is no scheme {self.scheme!r}, only {' and '.join(NAMES)}")

    @property
    def weight_scheme(self) -> "Scheme":
        """The scheme itself."""
        from sat_lora.quantized.schemes import SCHEMES

        return SCHEMES[self.scheme]


def _are_patterns(value: object) -> bool:
    """Return whether a value of JSON is a pattern or a list of patterns."""
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(text, str) for text in value))
