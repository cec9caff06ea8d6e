"""Which base a model is: known by the values of its weights, whatever file, layout and precision they come in.

Names and whole shapes are hashed. Of every tensor a few values are kept, at places that depend on its shape alone, so
that a copy which is cut for model parallelism, partitioned by ZeRO-3 or stored in another format has the same ones.
They are compared as numbers and never as a hash: two copies of a weight lie within one step of the coarser format of
each other. Which format that is can be seen from each value itself, since a run in float32 may have read a bfloat16
file. A base that has been trained further, if only by a step, has some value that moved by more.
"""

import base64
import functools
import hashlib
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from sat_lora.printable import printable

VALUES = 16384  # of a base; of one tensor no fewer and no more than these:
FEWEST = 8
MOST = 64
RUN = 4  # neighbours that are taken together: of a file that is mapped, one page has them
LARGEST_HALF = 65504.0
HALF_STEP = 2.0**-24  # the smallest that float16 tells apart; a bfloat16 file may be a copy of a float16 one
FORMATS = ((torch.bfloat16, 8), (torch.float16, 11), (torch.float32, 24))  # with the bits of their significands


@dataclass(frozen=True)
class BaseIdentity:
    """A base model as an adapter knows it. Two are compared by `difference`; what is None is not known."""

    fingerprint: str
    """SHA-256 over names and whole shapes."""
    name: str | None = None
    """The name of its folder."""
    family: str | None = None
    parameters: int | None = None
    values: torch.Tensor | None = None
    """What `identity_of` has taken of the tensors, in the order of their names: (n,) float32."""
    shapes: Mapping[str, tuple[int, ...]] | None = None
    """The whole shapes by name, of a base that is at hand."""

    def difference(self, other: "BaseIdentity") -> str | None:
        """Return what the other base has that this one has not, as a clause for people.

        It is None if the other is the same, or nothing else can be known.
        """
        if self.fingerprint != other.fingerprint:
            return "other names or shapes"
        if self.values is None or other.values is None:
            return None
        if len(self.values) != len(other.values):
            return "another number of values on record"
        differs = ~same_values(self.values, other.values)
        if not differs.any():
            return None
        shapes = other.shapes or self.shapes
        if shapes is None:
            return f"other values for {int(differs.sum())} of the {len(differs)} weights that were compared"
        count = values_per_tensor(len(shapes))
        lengths = {name: len(positions(shape, count)) for name, shape in sorted(shapes.items())}
        names = [name for name, part in zip(lengths, differs.split([*lengths.values()])) if part.any()]
        return f"other values in {len(names)} of {len(lengths)} tensors ({', '.join(map(printable, names[:2]))}, ...)"

    @property
    def title(self) -> str:
        """Name, family and size, as far as they are known; for people."""
        facts = [self.family, None if self.parameters is None else f"{self.parameters:,} parameters"]
        known = ", ".join(printable(fact) for fact in facts if fact)
        return f"{printable(self.name or 'a base without a name')}{f' ({known})' if known else ''}"

    @property
    def digest(self) -> str:
        """Eight hexadecimal digits over shapes and values, for people and for exact copies only."""
        values = b"" if self.values is None else self.values.numpy().tobytes()
        return hashlib.sha256(self.fingerprint.encode() + values).hexdigest()[:8]

    def to_dict(self) -> dict[str, str | int | None]:
        """Return what JSON holds of the identity, beside the fingerprint."""
        content = {"name": self.name, "family": self.family, "parameters": self.parameters}
        return content if self.values is None else {**content, "values": _encode(self.values)}

    @classmethod
    def from_dict(cls, fingerprint: str, content: object) -> "BaseIdentity":
        """Return the identity of which `to_dict` gave `content`. Raises ValueError or TypeError for another object."""
        if not isinstance(content, dict):
            raise TypeError(f"base has to be an object, got {type(content).__name__}")
        for name, kind in (("name", str), ("family", str), ("parameters", int), ("values", str)):
            if content.get(name) is not None and type(content[name]) is not kind:
                raise TypeError(f"base.{name} has to be of {kind.__name__}, got {type(content[name]).__name__}")
        values = None if content.get("values") is None else _decode(content["values"])
        return cls(fingerprint, content.get("name"), content.get("family"), content.get("parameters"), values)


def _encode(values: torch.Tensor) -> str:
    return base64.b64encode(values.numpy().astype("<f4").tobytes()).decode()


def _decode(text: str) -> torch.Tensor:
    content = base64.b64decode(text, validate=True)
    if not content or len(content) % 4:
        raise ValueError(f"base.values: {len(content)} bytes are no float32 numbers")
    return torch.frombuffer(bytearray(content), dtype=torch.float32)


def fingerprint_of(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return the fingerprint of a base with these names and whole shapes."""
    lines = sorted(f"{name} {list(shape)}" for name, shape in shapes.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def same_values(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return where two float32 tensors of one shape may be the same weights in any of FORMATS, as bool of that shape.

    They may be where they lie within one step of the coarser format.
    """
    largest = torch.maximum(left.abs(), right.abs())
    steps = torch.zeros_like(largest)
    for dtype, bits in FORMATS:
        fits = (left.to(dtype).float() == left) | (right.to(dtype).float() == right)
        step = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - bits)
        steps = torch.where((steps == 0) & fits, step.clamp(min=HALF_STEP) if bits < 24 else step, steps)
    overflown = (left.isinf() | right.isinf()) & (left.sign() == right.sign())
    overflown &= (left.abs() >= LARGEST_HALF) & (right.abs() >= LARGEST_HALF)
    return ((left - right).abs() <= steps) | (left == right) | overflown | (left.isnan() & right.isnan())


def values_per_tensor(tensors: int) -> int:
    """Return how many values are taken of each tensor of a base of that many tensors."""
    return min(MOST, max(FEWEST, VALUES // max(1, tensors) // RUN * RUN))


@functools.lru_cache(maxsize=512)
def positions(shape: tuple[int, ...], count: int) -> torch.Tensor:
    """Return which elements of a tensor of that shape are looked at, (n,) int64 with n <= count; all of a small one."""
    size = torch.Size(shape).numel()
    if size <= count:
        return torch.arange(size)
    generator = torch.Generator().manual_seed(zlib.crc32(str(tuple(shape)).encode()))
    starts = torch.randint(0, size - RUN + 1, (count // RUN,), generator=generator)
    return (starts[:, None] + torch.arange(RUN)).flatten()


def identity_of(
    shapes: Mapping[str, tuple[int, ...]],
    values_at: Callable[[str, torch.Tensor], torch.Tensor],
    *,
    name: str | None = None,
    family: str | None = None,
) -> BaseIdentity:
    """Return the identity of a base of these whole shapes.

    values_at: (name, positions) -> the values there, see `positions`.
    """
    count = values_per_tensor(len(shapes))
    parts = [values_at(key, positions(tuple(shapes[key]), count)).float() for key in sorted(shapes)]
    values = torch.cat(parts).cpu() + 0.0 if parts else torch.zeros(0)  # + 0.0: a zero has no sign
    size = sum(torch.Size(shape).numel() for shape in shapes.values())
    return BaseIdentity(fingerprint_of(shapes), name, family, size, values, dict(shapes))
