"""LoraConfig: what is adapted, how strongly, and in which precision."""

import difflib
import math
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

from sat_lora.errors import ConfigError
from sat_lora.files.patterns import matches, pattern_problem, shortened

DTYPES = ("float32", "bfloat16", "float16", "float64")
LARGEST_FACTOR = 3.4028e38  # of what is multiplied with float32 tensors
MOST_LAYERS = 10_000  # a range of any length would be counted out
SLOTS = ("q", "k", "v")
BIASES = ("none", "lora_only", "all")
LOFTQ = "loftq"
MOST_ROUNDS = 1000  # of it, each of which takes an SVD of every weight
INITS = ("kaiming", "gaussian", "orthogonal", "pissa", "pissa_niter_N", "olora", LOFTQ)


def _described(default: Any, help: str) -> Any:
    """Return a field with this default, or what this class makes, with what is said of it where settings are shown."""
    if isinstance(default, type):
        return field(default_factory=default, metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """What is adapted, and how: y = W x + (lora_alpha / r) B A x. Field names are PEFT's where PEFT has the field."""

    r: int = _described(
        16,
        "Rank of A (r x in) and B (out x r). Halved where the pair would cost more than the full matrix.",
    )
    lora_alpha: float = _described(32.0, "The delta is scaled by lora_alpha / r.")
    lora_dropout: float = _described(0.0, "Probability of dropping an input of A while training.")
    use_rslora: bool = _described(False, "Scale by lora_alpha / sqrt(r) instead (rsLoRA, arXiv 2312.03732).")
    use_dora: bool = _described(
        False,
        "Train the length of each row of the weight apart from its direction (DoRA, arXiv 2402.09353).",
    )
    init_lora_weights: str = _described(
        "kaiming",
        "How A and B begin: kaiming, gaussian (B zero), orthogonal (B A zero), pissa, pissa_niter_N (N "
        "steps of a randomised SVD), olora (the part of the weight that A and B take is subtracted, so "
        "step 0 is the base), loftq (with a quantised base: A and B begin as what the codes miss of the weight).",
    )
    loftq_iter: int = _described(
        1,
        "Rounds of loftq, in each of which the weight is encoded and A and B are computed anew (LoftQ, arXiv "
        "2310.08659).",
    )
    freeze_a: bool = _described(
        False,
        "Train B alone (LoRA-FA, arXiv 2308.03303): the inputs need not be kept for backward.",
    )
    target_modules: str | tuple[str, ...] = _described(
        "all-linear",
        "A preset (see sat_lora.lora.targets.PRESETS), a regular expression for the whole name, or a list "
        "of presets and suffixes.",
    )
    exclude_modules: str | tuple[str, ...] = _described(
        (),
        "The same forms; taken away from what target_modules selects.",
    )
    layers_to_transform: str | tuple[int, ...] | None = _described(
        None,
        'Layer numbers for every tower, or text such as "language:0-15,vit:40-62"; None is all layers.',
    )
    modules_to_save: tuple[str, ...] = _described(
        (),
        "Modules or parameters, by suffix, that are trained and saved whole, for example linear_proj, boi, eoi.",
    )
    bias: str = _described(
        "none",
        "Biases of the base that train as well: none, lora_only (those of adapted layers) or all.",
    )
    rank_pattern: dict[str, int] = _described(
        dict,
        "Regular expression for the end of a name -> rank; the first that matches wins.",
    )
    alpha_pattern: dict[str, float] = _described(
        dict,
        "Regular expression for the end of a name -> alpha; the first that matches wins.",
    )
    qkv_slots: str | tuple[str, ...] = _described(
        SLOTS,
        "Which parts of a fused query/key/value linear get a factor pair, each its own: any of q, k, v.",
    )
    adapter_dtype: str | None = _described(None, '"float32", "bfloat16", ...; None takes the dtype of the base weight.')
    lr_ratio: float = _described(
        1.0,
        "Learning rate of B over that of A (LoRA+, arXiv 2402.12354), by `sat_lora.parameter_groups`.",
    )
    seed: int = _described(
        1234,
        "Seeds the initial A. The values depend on this and on the linear's name, not on the parallel layout.",
    )

    def __new__(cls, /, **values: Any) -> "LoraConfig":
        """Refuse unknown fields, with the nearest names and together with what is wrong with the known ones."""
        field_names = [f.name for f in fields(cls)]
        problems = []
        for name in sorted(values.keys() - set(field_names)):
            near = difflib.get_close_matches(name, field_names, n=1)
            problems.append(f"there is no field {name!r}" + (f", did you mean {near[0]!r}?" if near else ""))
        if problems:
            try:
                cls(**{name: value for name, value in values.items() if name in field_names})
            except ConfigError as error:
                problems += error.problems
            raise ConfigError.of(problems, _HEAD)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules", "layers_to_transform", "qkv_slots", "modules_to_save"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        if isinstance(self.modules_to_save, str) or self.modules_to_save is None:  # PEFT's default is None
            object.__setattr__(self, "modules_to_save", (self.modules_to_save,) if self.modules_to_save else ())
        scheme: object = self.init_lora_weights
        if scheme is True:  # PEFT's spelling of its default
            object.__setattr__(self, "init_lora_weights", "kaiming")
        problems = list(self._problems())
        if problems:
            raise ConfigError.of(problems, _HEAD)

    def _problems(self) -> Iterator[str]:
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(getattr(self, name), dict):
                yield f"{name} has to be a dictionary of patterns, got {getattr(self, name)!r}"
                return
            for pattern in getattr(self, name):
                problem = pattern_problem(pattern) if isinstance(pattern, str) else "is no text"
                if problem:
                    yield f"{name}: {shortened(pattern)} {problem}"
        ranks = {"r": self.r, **{f"rank_pattern[{k!r}]": v for k, v in self.rank_pattern.items()}}
        for name, value in ranks.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                yield f"{name} has to be a whole number of at least 1, got {value!r}"
            elif self.init_lora_weights == "orthogonal" and value % 2:
                yield f"{name} has to be even for init_lora_weights='orthogonal', got {value!r}"
        numbers = {
            "lora_alpha": self.lora_alpha,
            **{f"alpha_pattern[{k!r}]": v for k, v in self.alpha_pattern.items()},
            "lr_ratio": self.lr_ratio,
        }
        for name, number in numbers.items():
            if not _is_number(number) or (name == "lr_ratio" and number <= 0):
                yield f"{name} has to be a finite number{' above 0' * (name == 'lr_ratio')}, got {number!r}"
            elif self.init_lora_weights == LOFTQ and number <= 0:
                yield f"{name} has to be above 0 for init_lora_weights='loftq', got {number!r}"
            elif abs(number) > LARGEST_FACTOR:
                yield f"{name} has to be {LARGEST_FACTOR:g} at most, where float32 ends, got {number!r}"
        if not _is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            yield f"lora_dropout has to be in [0, 1), got {self.lora_dropout!r}"
        for name in ("use_rslora", "use_dora", "freeze_a"):
            if not isinstance(getattr(self, name), bool):
                yield f"{name} has to be True or False, got {getattr(self, name)!r}"
        if not re.fullmatch(
            r"kaiming|gaussian|orthogonal|pissa(_niter_[1-9]\d*)?|olora|loftq", str(self.init_lora_weights)
        ):
            yield f"init_lora_weights has to be one of {', '.join(INITS)}, got {self.init_lora_weights!r}"
        rounds = self.loftq_iter
        if isinstance(rounds, bool) or not isinstance(rounds, int) or not 1 <= rounds <= MOST_ROUNDS:
            yield f"loftq_iter has to be a whole number from 1 to {MOST_ROUNDS}, got {rounds!r}"
        if self.bias not in BIASES:
            yield f"bias has to be one of {', '.join(BIASES)}, got {self.bias!r}"
        if not self.target_modules:
            yield "target_modules is empty, nothing would be adapted"
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            patterns = getattr(self, name)
            if not isinstance(patterns, str) and not _are_strings(patterns):
                yield f"{name} has to be text or a list of texts, got {patterns!r}"
        slots = self.qkv_slots if isinstance(self.qkv_slots, str) or _are_strings(self.qkv_slots) else ()
        if not slots or set(slots) - set(SLOTS) or len(set(slots)) != len(slots):
            yield f"qkv_slots has to name some of q, k, v, each once, got {self.qkv_slots!r}"
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            yield f"seed has to be a whole number from 0 to 2**63 - 1, got {self.seed!r}"
        if self.adapter_dtype is not None and self.adapter_dtype not in DTYPES:
            yield f"adapter_dtype has to be one of {', '.join(DTYPES)} or None, got {self.adapter_dtype!r}"
        try:
            self.layers()
        except (ValueError, TypeError) as error:
            yield f"layers_to_transform: {error}"

    def layers(self) -> dict[str | None, frozenset[int]] | None:
        """Return layer numbers by tower name; the key None stands for every tower, and None for all layers of all."""
        if self.layers_to_transform is None:
            return None
        if not isinstance(self.layers_to_transform, str):
            return {None: frozenset(self.layers_to_transform)}
        chosen: dict[str | None, set[int]] = {}
        for part in self.layers_to_transform.split(","):
            match = re.fullmatch(r"\s*(?:([\w.-]+):)?(\d+)(?:-(\d+))?\s*", part)
            if not match:
                raise ValueError(f"cannot read {part!r}; write for example language:0-15,vit:40-62")
            first = int(match[2])
            last = int(match[3] or match[2])
            if last < first:
                raise ValueError(f"{part.strip()!r} runs backwards")
            if last >= MOST_LAYERS:
                raise ValueError(f"{part.strip()!r} is beyond {MOST_LAYERS} layers")
            chosen.setdefault(match[1], set()).update(range(first, last + 1))
        return {tower: frozenset(numbers) for tower, numbers in chosen.items()}

    def rank_for(self, name: str) -> int:
        """Return the rank asked for at the layer of that name, before the bound."""
        return _first_match(self.rank_pattern, name, self.r)

    def scale_for(self, name: str, rank: int) -> float:
        """Return the factor before B A at the layer of that name, with the rank in effect."""
        alpha = _first_match(self.alpha_pattern, name, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    @property
    def takes_from_base(self) -> bool:
        """Whether the pair that A and B begin as is in the base already, and is subtracted (PiSSA, OLoRA, LoftQ)."""
        return self.init_lora_weights.startswith(("pissa", "olora", LOFTQ))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name, as `from_dict` and an adapter file take them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LoraConfig":
        """Return the config of a dictionary such as that of an adapter file. Raises ConfigError as the class does."""
        return cls(**values)


_HEAD = "LoraConfig: "
Setting = TypeVar("Setting")


def _is_number(value: object) -> bool:
    """Return whether the value is a number that a float holds."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _are_strings(values: object) -> bool:
    return isinstance(values, (tuple, list)) and all(isinstance(value, str) for value in values)


def _first_match(patterns: Mapping[str, Setting], name: str, default: Setting) -> Setting:
    return next((value for pattern, value in patterns.items() if ends_with(name, pattern)), default)


def ends_with(name: str, pattern: str) -> bool:
    """Return whether the dotted end of `name` matches the regular expression, as in rank_pattern and alpha_pattern."""
    return matches(rf"(.*\.)?({pattern})", name)
