"""LoraConfig: what is adapted, how strongly, and in which precision."""

import difflib
import math
import re
from dataclasses import asdict, dataclass, field, fields

from sat_lora.errors import ConfigError

DTYPES = ("float32", "bfloat16", "float16", "float64")
SLOTS = ("q", "k", "v")
TOWERS = ("language", "vit")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """y = W x + (lora_alpha / r) B A x. Field names are PEFT's where PEFT has the field."""

    r: int = 16
    """Rank of A (r x in) and B (out x r). Halved where the pair would cost more than the full matrix."""
    lora_alpha: float = 32.0
    """The delta is scaled by lora_alpha / r."""
    lora_dropout: float = 0.0
    """Probability of dropping an input of A while training."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead (rsLoRA, arXiv 2312.03732)."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """A preset (see sat_lora.targets.PRESETS), a regular expression for the whole name, or a list of presets and
    suffixes."""
    exclude_modules: str | tuple[str, ...] = ()
    """The same forms; taken away from what target_modules selects."""
    layers_to_transform: str | tuple[int, ...] | None = None
    """Layer numbers for every tower, or text such as "language:0-15,vit:40-62"; None is all layers."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Regular expression for the end of a name -> rank; the first that matches wins."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Regular expression for the end of a name -> alpha; the first that matches wins."""
    qkv_slots: str | tuple[str, ...] = SLOTS
    """Which parts of a fused query/key/value linear get a factor pair, each its own: any of q, k, v."""
    adapter_dtype: str | None = None
    """"float32", "bfloat16", ...; None takes the dtype of the base weight."""
    seed: int = 1234
    """Seeds the initial A. The values depend on this and on the linear's name, not on the parallel layout."""

    def __post_init__(self):
        for name in ("target_modules", "exclude_modules", "layers_to_transform", "qkv_slots"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        problems = list(self._problems())
        if problems:
            raise ConfigError("LoraConfig: " + "; ".join(problems))

    def _problems(self):
        ranks = {"r": self.r, **{f"rank_pattern[{k!r}]": v for k, v in self.rank_pattern.items()}}
        for name, value in ranks.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                yield f"{name} has to be a whole number of at least 1, got {value!r}"
        for pattern in [*self.rank_pattern, *self.alpha_pattern]:
            try:
                re.compile(pattern)
            except re.error as error:
                yield f"rank_pattern, alpha_pattern: {pattern!r} is not a regular expression: {error}"
        alphas = {"lora_alpha": self.lora_alpha, **{f"alpha_pattern[{k!r}]": v for k, v in self.alpha_pattern.items()}}
        for name, value in alphas.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                yield f"{name} has to be a finite number, got {value!r}"
        if not isinstance(self.lora_dropout, (int, float)) or not 0 <= self.lora_dropout < 1:
            yield f"lora_dropout has to be in [0, 1), got {self.lora_dropout!r}"
        if not self.target_modules:
            yield "target_modules is empty, nothing would be adapted"
        slots = tuple(self.qkv_slots)
        if not slots or set(slots) - set(SLOTS) or len(set(slots)) != len(slots):
            yield f"qkv_slots has to name some of q, k, v, each once, got {self.qkv_slots!r}"
        if self.adapter_dtype is not None and self.adapter_dtype not in DTYPES:
            yield f"adapter_dtype has to be one of {', '.join(DTYPES)} or None, got {self.adapter_dtype!r}"
        try:
            self.layers()
        except ValueError as error:
            yield f"layers_to_transform: {error}"

    def layers(self) -> dict[str | None, frozenset[int]] | None:
        """Layer numbers by tower name; the key None stands for every tower. None where all layers are meant."""
        if self.layers_to_transform is None:
            return None
        if not isinstance(self.layers_to_transform, str):
            return {None: frozenset(self.layers_to_transform)}
        chosen: dict[str | None, set[int]] = {}
        for part in self.layers_to_transform.split(","):
            match = re.fullmatch(r"\s*(?:([a-z-]+):)?(\d+)(?:-(\d+))?\s*", part)
            if not match:
                raise ValueError(f"cannot read {part!r}; write for example language:0-15,vit:40-62")
            if match[1] not in (None, *TOWERS):
                raise ValueError(f"there is no tower {match[1]!r}, only {' and '.join(TOWERS)}")
            first, last = int(match[2]), int(match[3] or match[2])
            if last < first:
                raise ValueError(f"{part.strip()!r} runs backwards")
            chosen.setdefault(match[1], set()).update(range(first, last + 1))
        return {tower: frozenset(numbers) for tower, numbers in chosen.items()}

    def rank_for(self, name: str) -> int:
        """The rank asked for at the linear of that name, before the bound."""
        return _first_match(self.rank_pattern, name, self.r)

    def scale_for(self, name: str, rank: int) -> float:
        """The factor before B A at the linear of that name, with the rank in effect."""
        alpha = _first_match(self.alpha_pattern, name, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "LoraConfig":
        """From a dictionary such as the one in an adapter file; an unknown field is an error with the nearest name."""
        known = [f.name for f in fields(cls)]
        problems = []
        for name in values.keys() - set(known):
            near = difflib.get_close_matches(name, known, n=1)
            problems.append(f"there is no field {name!r}" + (f", did you mean {near[0]!r}?" if near else ""))
        if problems:
            raise ConfigError("LoraConfig: " + "; ".join(sorted(problems)))
        try:
            return cls(**values)
        except (TypeError, AttributeError) as error:
            raise ConfigError(f"LoraConfig: a field has the wrong type: {error}") from error


def _first_match(patterns: dict, name: str, default):
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", name):
            return value
    return default
