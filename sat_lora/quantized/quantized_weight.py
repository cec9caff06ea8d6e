"""QuantizedWeight: a frozen weight in fewer bits, in the place of the tensor that it was made of.

A layer that calls `F.linear` needs to know nothing of it: the product decodes the weight, in forward and once more in
backward, and keeps the codes alone in between. Products of matrices are the one thing that decodes it. Whoever reads
W asks `whole`, whatever kind of tensor W is; all else is refused, so that nothing is decoded, or lost, without a word.
W^T is the one view that there is, for products of the form x @ W.t(): decoded, and not to be written to.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.autograd.function import FunctionCtx
from torch.utils._pytree import tree_map

from sat_lora.errors import ConfigError, QuantizationError
from sat_lora.quantized.partition import Partition
from sat_lora.quantized.schemes import BLOCKS, SCHEMES, Scheme, block_for, block_of, encode, has_values

aten = torch.ops.aten
_torch_linear = torch._C._nn.linear  # what `functional.linear` is until ZeRO-3 puts another one there
SAME = (aten.detach.default, aten.alias.default)
PRODUCTS = (aten.mm.default, aten.addmm.default, aten.addmm_.default)


@dataclass(frozen=True)
class LowRank:
    """A product of low rank that is added to ranges of rows when a weight is decoded: scale * B A.

    b: (rows of all ranges, r), a: (ranges * r, in), in the dtype that the weight is decoded to; ranges: of rows of W.
    """

    b: torch.Tensor
    a: torch.Tensor
    scale: float
    ranges: tuple[tuple[int, int], ...]

    def add_to(self, weight: torch.Tensor) -> None:
        """Add it to W (out, in), in place."""
        rank = self.b.shape[1]
        edge = 0
        for number, (start, stop) in enumerate(self.ranges):
            b = self.b[edge : edge + stop - start]
            weight[start:stop].addmm_(b, self.a[number * rank : (number + 1) * rank], alpha=self.scale)
            edge += stop - start

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "LowRank":
        """Return the product of changed factors."""
        return replace(self, b=change(self.b), a=change(self.a))

    def equals(self, other: "LowRank | None") -> bool:
        """Return whether the other has the same factors, at the same rows."""
        if other is None or (self.scale, self.ranges) != (other.scale, other.ranges):
            return False
        return torch.equal(self.b, other.b) and torch.equal(self.a, other.a)


class QuantizedWeight(torch.Tensor):
    """W (out, in) as codes and scales; its dtype is the one that it is decoded to, and computed with.

    codes: (out, in / elements_per_code), scales: (out, in / block) in bfloat16, see `schemes`. `.to(dtype)` changes
    what it is decoded to and leaves both as they are. What is copied into it is encoded. It never requires a gradient.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    scheme: Scheme
    decoded_dtype: torch.dtype
    """The dtype, for what runs in every pass: `dtype` itself is an operation of torch's and goes a long way round."""
    low_rank: LowRank | None
    """What is added to what the codes decode to, see `lora.deltas.loftq`; None: nothing."""
    partition: Partition | None
    """How codes and scales are cut over the data-parallel ranks: `codes` are then this rank's bytes of both, and
    `scales` are empty. None: they are here."""
    original: Callable[[], torch.Tensor] | None
    """What gives the weight (out, in) that was encoded, read again; None where that is not to be had any more."""

    @staticmethod
    def __new__(
        cls,
        codes: torch.Tensor,
        scales: torch.Tensor,
        scheme: Scheme,
        dtype: torch.dtype,
        partition: Partition | None = None,
    ) -> "QuantizedWeight":
        """Return the weight of these codes and scales."""
        rows, columns = codes.shape if partition is None else partition.codes_shape
        shape = (rows, columns * scheme.elements_per_code)
        weight = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=codes.device)
        weight.codes = codes
        weight.scales = scales
        weight.scheme = scheme
        weight.decoded_dtype = dtype
        weight.partition = partition
        weight.low_rank = None
        weight.original = None
        return weight

    @classmethod
    def of(
        cls, weight: torch.Tensor, scheme: Scheme, name: str = "the weight", block: int | None = None
    ) -> "QuantizedWeight":
        """Return a weight (out, in) encoded, on its device.

        block: that divides its rows; None: the largest that does. Raises QuantizationError, with the name, where none
        does, or a value in it is not finite.
        """
        if block is None:
            block = block_for(weight.shape[1]) if weight.dim() == 2 else None
        if block is None:
            raise QuantizationError(
                f"{name}: its shape {tuple(weight.shape)} has no rows that divide into blocks of "
                f"{' or '.join(map(str, BLOCKS))}; leave it whole, with keep_modules"
            )
        codes, scales = encode(weight.detach(), scheme, block)
        if has_values(scales) and not bool(scales.isfinite().all()):
            raise QuantizationError(f"{name}: it holds values that are not finite; {scheme.name} cannot hold them")
        return cls(codes, scales, scheme, weight.dtype)

    @property
    def block(self) -> int:
        """How many elements of a row share a scale."""
        if self.partition is not None:
            return self.shape[1] // self.partition.scales_shape[1]
        return block_of(self.scheme, self.codes, self.scales)

    @property
    def stored_bytes(self) -> int:
        """The bytes of codes and scales, and of what is added to them."""
        return sum(part.nbytes for part in self.parts)

    @property
    def parts(self) -> tuple[torch.Tensor, ...]:
        """The tensors that hold memory."""
        return (self.codes, self.scales, *(() if self.low_rank is None else (self.low_rank.b, self.low_rank.a)))

    def decoded(self) -> torch.Tensor:
        """Return W (out, in), a plain tensor of this dtype. Where it is partitioned every rank has to call it."""
        codes, scales = self.gathered()
        decoded = self.scheme.decode(codes, scales, self.decoded_dtype)
        if self.low_rank is not None:
            self.low_rank.add_to(decoded)
        return decoded

    def decoded_for(self, factor: torch.Tensor) -> torch.Tensor:
        """Return W (out, in) for a product with a factor (..., in) or (..., out).

        For one of no rows nothing is decoded, and the elements are any. A partitioned weight is gathered all the
        same, for the other ranks may have rows.
        """
        if factor.numel():
            return self.decoded()
        if self.partition is not None:
            self.gathered()
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)

    @property
    def has_original(self) -> bool:
        """Whether `read_original` returns the weight that was encoded."""
        return self.original is not None or not has_values(self.codes)

    def read_original(self, name: str) -> torch.Tensor:
        """Return the weight (out, in) that was encoded, read again; of codes without memory, one without memory.

        Raises ConfigError, with the name, where it is not to be had any more.
        """
        if not has_values(self.codes):
            return self.codes.new_empty(self.shape, dtype=self.dtype)
        if self.original is None:
            raise ConfigError(
                f"{name}: the weight that its codes were made of is not to be had any more, and init_lora_weights="
                "'loftq' asks for it; give the base itself and quantise it as it is loaded (--from_pretrained BASE "
                "--quantize nf4), or keep it: quantize_model(model, keep_originals=True)"
            )
        return self.original()

    def gathered(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return whole codes and scales. Where they are partitioned every rank has to call it."""
        return (self.codes, self.scales) if self.partition is None else self.partition.gathered(self.codes)

    def partitioned(self, group: torch.distributed.ProcessGroup) -> "QuantizedWeight":
        """Return the weight of which each rank of the group holds a part. Then all of them use it equally often."""
        partition = Partition(group, tuple(self.codes.shape), self.codes.dtype, tuple(self.scales.shape))
        part = partition.part(self.codes, self.scales)
        weight = QuantizedWeight(part, self.scales.new_empty(0), self.scheme, self.dtype, partition)
        weight.low_rank = self.low_rank
        weight.original = self.original
        return weight

    def take(self, other: "QuantizedWeight") -> None:
        """Hold the codes and scales of another weight of this shape, scheme and block, and what is added to them."""
        if self.partition is not None and other.partition is None:
            self.codes.copy_(self.partition.part(other.codes, other.scales))
        else:
            self.codes.copy_(other.codes)
            self.scales.copy_(other.scales)
        self.low_rank = None
        if other.low_rank is not None:
            self.low_rank = other.low_rank.each(lambda factor: factor.to(self.device, self.dtype, copy=True))

    def __repr__(self, **options: Any) -> str:  # torch's print would decode it
        dtype = str(self.dtype).removeprefix("torch.")
        return f"QuantizedWeight({self.scheme.name}, {tuple(self.shape)}, {dtype}, {self.device})"

    def __deepcopy__(self, memo: dict[int, Any]) -> "QuantizedWeight":
        copied = memo[id(self)] = self._each(torch.clone)
        return copied

    def __reduce_ex__(self, protocol: Any) -> tuple[Callable[..., "QuantizedWeight"], tuple[Any, ...]]:
        if self.partition is not None:
            _refuse("pickle")
        parts = (self.codes, self.scales, self.scheme.name, self.dtype)
        added = self.low_rank
        return rebuilt, parts if added is None else (*parts, (added.b, added.a, added.scale, added.ranges))

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Scheme, torch.dtype]]:
        if self.low_rank is not None or self.partition is not None:
            _refuse("torch.compile")
        return ["codes", "scales"], (self.scheme, self.dtype)

    @staticmethod
    def __tensor_unflatten__(
        inner: Mapping[str, torch.Tensor], context: tuple[Scheme, torch.dtype], size: Any, stride: Any
    ) -> "QuantizedWeight":
        return QuantizedWeight(inner["codes"], inner["scales"], *context)

    def _each(
        self, change: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype | None = None
    ) -> "QuantizedWeight":
        """Return the weight of changed codes and scales, and of another dtype if one is given."""
        parts = (change(self.codes), change(self.scales))
        changed = QuantizedWeight(*parts, self.scheme, dtype or self.dtype, self.partition)
        changed.original = self.original
        if self.low_rank is not None:
            changed.low_rank = self.low_rank.each(lambda factor: change(factor).to(changed.dtype))
        return changed

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Collection[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Return what a function of torch's gives, F.linear by its own way."""
        if function is _torch_linear:
            return linear(*args, **(kwargs or {}))
        if function in _GRADIENT_SETTERS:
            _refuse_gradient(*args, **(kwargs or {}))
        if function == _DATA_SETTER:
            _refuse_data(*args)
        if function in _OF_MEMORY:
            _refuse(function.__name__)
        with torch._C.DisableTorchFunctionSubclass():  # torch's own way would give every result this class
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(
        cls,
        function: Any,
        types: Collection[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Return what an operation gives. Raises QuantizationError for one that needs the elements themselves."""
        kwargs = kwargs or {}
        weight: Any = args[0] if args else None
        if function in PRODUCTS and not isinstance(weight, QuantizedWeight):
            return _product(function, args, kwargs)
        if not isinstance(weight, QuantizedWeight):
            _refuse(_name(function))
        if function in SAME or (function is aten.view.default and list(args[1]) == list(weight.shape)):
            return weight._each(lambda part: part)
        if function is aten.clone.default:
            return weight._each(torch.clone)
        if function is aten._to_copy.default:
            device = kwargs.get("device")
            non_blocking = kwargs.get("non_blocking", False)
            dtype = kwargs.get("dtype")
            if dtype is not None and not dtype.is_floating_point:
                _refuse(_name(function))
            return weight._each(lambda part: part.to(device, non_blocking=non_blocking, copy=True), dtype)
        if function is aten.copy_.default:
            return _fill(weight, args[1])
        if function is aten.equal.default and isinstance(args[1], QuantizedWeight):
            return _are_equal(weight, args[1])
        if function is aten.t.default:  # DeepSpeed 0.19.8 makes F.linear of ZeRO-3 by x @ weight.t()
            return _read_only(weight.decoded().t())
        return _refuse(_name(function))


class ReadOnlyTensor(torch.Tensor):
    """What a weight was decoded to, for products: no part of the weight, so that a write to it would be lost.

    Operations take it as a plain tensor and give plain ones; views of it are what it is.
    """

    plain: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, plain: torch.Tensor) -> "ReadOnlyTensor":
        """Return the tensor that has the elements of a plain one."""
        layout = dict(strides=plain.stride(), storage_offset=plain.storage_offset())
        tensor = torch.Tensor._make_wrapper_subclass(cls, plain.shape, dtype=plain.dtype, device=plain.device, **layout)
        tensor.plain = plain
        return tensor

    def __repr__(self, **options: Any) -> str:
        return repr(self.plain)

    @classmethod
    def __torch_dispatch__(
        cls,
        function: Any,
        types: Collection[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Return what an operation gives. Raises QuantizationError for one that writes to such a tensor."""
        given = {argument.name: value for argument, value in zip(function._schema.arguments, args)} | dict(kwargs or {})
        for argument in function._schema.arguments:
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            if is_written and isinstance(given.get(argument.name), ReadOnlyTensor):
                _refuse(_name(function))
        result = function(*tree_map(_plain, args), **tree_map(_plain, dict(kwargs or {})))
        is_view = isinstance(args[0], ReadOnlyTensor) and any(value.alias_info for value in function._schema.returns)
        return tree_map(_read_only, result) if is_view else result


def _plain(value: Any) -> Any:
    """Return a read-only tensor as a plain one, and anything else as it is."""
    return value.plain if isinstance(value, ReadOnlyTensor) else value


def _read_only(value: Any) -> Any:
    """Return a tensor as a read-only one, and anything else as it is."""
    return ReadOnlyTensor(value) if isinstance(value, torch.Tensor) else value


_DATA_SETTER = torch.Tensor.data.__set__
_GRADIENT_SETTERS = (torch.Tensor.requires_grad_, torch.Tensor.requires_grad.__set__)


def _refuse_data(weight: QuantizedWeight, value: torch.Tensor) -> None:
    """Raise QuantizationError for `weight.data = value`, of which torch would take the name and no element."""
    raise QuantizationError(
        f"data of a quantised weight: it cannot be set; weight.copy_(...) encodes what it gets, {weight!r} stays"
    )


def _refuse_gradient(weight: QuantizedWeight, requires_grad: bool = True) -> None:
    """Raise QuantizationError where a gradient is asked for."""
    if requires_grad:
        raise QuantizationError(
            "a quantised weight does not train; leave it whole, with keep_modules, to name it in modules_to_save"
        )


# What asks for the memory behind the elements: there is none, and torch 2.13 or its reader would go there all the same.
_OF_MEMORY = (
    torch.Tensor.data_ptr,
    torch.Tensor.storage,
    torch.Tensor.untyped_storage,
    torch.Tensor.share_memory_,
    torch.Tensor.__dlpack__,
)


def _name(function: Any) -> str:
    """Return what an operation is called."""
    return str(function.overloadpacket.__name__)


def _refuse(name: str) -> Any:
    raise QuantizationError(
        f"{name} on a quantised weight: its elements are not there to be read or written; "
        "weight.decoded() is a plain tensor of them, and keep_modules leaves a weight whole"
    )


def _product(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return a product of matrices by the decoded weight, which is the last of them."""
    *others, left, right = args[:2] if function is aten.mm.default else args[:3]
    if isinstance(left, QuantizedWeight) or any(isinstance(other, QuantizedWeight) for other in others):
        return _refuse(_name(function))
    return function(*others, left, right.decoded_for(left), **kwargs)


def _fill(weight: QuantizedWeight, source: torch.Tensor) -> QuantizedWeight:
    """Return the weight, with the values of another tensor of its shape in it: encoded, or the codes that it has."""
    if source.shape != weight.shape:
        raise QuantizationError(f"a tensor of shape {tuple(source.shape)} does not fit in {weight!r}")
    if not isinstance(source, QuantizedWeight):
        source = QuantizedWeight.of(source.to(weight.device, weight.dtype), weight.scheme)
    if source.scheme is not weight.scheme or source.block != weight.block:
        raise QuantizationError(f"{source!r}, in blocks of {source.block}, does not fit in {weight!r}")
    weight.take(source)
    weight.original = source.original  # what was read before is another weight
    return weight


def _are_equal(left: QuantizedWeight, right: QuantizedWeight) -> bool:
    """Return whether two weights have the same codes and scales."""
    is_alike = left.scheme is right.scheme and left.shape == right.shape and left.block == right.block
    is_alike = is_alike and left.codes.shape == right.codes.shape
    if left.low_rank is None or not left.low_rank.equals(right.low_rank):
        is_alike = is_alike and left.low_rank is right.low_rank
    return is_alike and torch.equal(left.codes, right.codes) and torch.equal(left.scales, right.scales)


def rebuilt(
    codes: torch.Tensor, scales: torch.Tensor, scheme: str, dtype: torch.dtype, added: tuple[Any, ...] | None = None
) -> QuantizedWeight:
    """Return the weight that `torch.save` or pickle wrote. Raises QuantizationError where it is none.

    added: the fields of a LowRank.
    """
    known = SCHEMES.get(scheme)
    if known is None:
        raise QuantizationError(f"the scheme of a quantised weight is {scheme!r}, wanted {' or '.join(SCHEMES)}")
    problem = parts_problem(codes, scales, known)
    if problem or not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise QuantizationError(f"no quantised weight: {problem or f'it would decode to {dtype}'}")
    weight = QuantizedWeight(codes, scales, known, dtype)
    if added is not None:
        weight.low_rank = _low_rank_of(added, weight)
    return weight


def _low_rank_of(added: tuple[Any, ...], weight: QuantizedWeight) -> LowRank:
    """Return the product that was written beside a weight. Raises QuantizationError where it is none of its shape."""
    try:
        b, a, scale, ranges = added
        ranges = tuple((start, stop) for start, stop in ranges)
        rows = sum(stop - start for start, stop in ranges)
        is_inside = all(0 <= start < stop <= len(weight) for start, stop in ranges)
        shapes = (tuple(b.shape), tuple(a.shape))
        if not is_inside or shapes != ((rows, b.shape[1]), (len(ranges) * b.shape[1], weight.shape[1])):
            raise ValueError(f"factors {shapes} for rows {ranges}")
        return LowRank(b.to(weight.dtype), a.to(weight.dtype), float(scale), ranges)
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        raise QuantizationError(f"no quantised weight: what is added to it is no product: {error}") from error


def parts_problem(codes: torch.Tensor, scales: torch.Tensor, scheme: Scheme) -> str | None:
    """Return why these are no codes and scales of one weight, which a file may hold; None where they are."""
    if codes.dtype is not scheme.codes_dtype or scales.dtype is not torch.bfloat16:
        return f"codes in {codes.dtype} and scales in {scales.dtype}, wanted {scheme.codes_dtype} and torch.bfloat16"
    if codes.dim() != 2 or scales.dim() != 2 or len(codes) != len(scales) or not scales.numel():
        return f"codes {tuple(codes.shape)} and scales {tuple(scales.shape)}"
    columns = codes.shape[1] * scheme.elements_per_code
    if not any(columns == block * scales.shape[1] for block in BLOCKS):
        return f"{columns} columns with {scales.shape[1]} scales, wanted one for each {' or '.join(map(str, BLOCKS))}"
    return None


torch.serialization.add_safe_globals([rebuilt])  # it makes one object, of checked parts


def whole(weight: torch.Tensor) -> torch.Tensor:
    """Return the elements of a weight: the tensor itself, or what a QuantizedWeight is decoded to."""
    return weight.decoded() if isinstance(weight, QuantizedWeight) else weight


def linear(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x W^T + bias (..., out) of x (..., in), as F.linear gives it for the decoded weight, bit for bit."""
    dtype = None
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _Linear.apply(x, weight, bias, dtype)
    return _forward(x, weight, bias, dtype)


def _forward(
    x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None, dtype: torch.dtype | None
) -> torch.Tensor:
    decoded = weight.decoded_for(x)
    return _torch_linear(x, decoded if dtype is None else decoded.to(dtype), bias)


class _Linear(torch.autograd.Function):
    """The autograd Function of a linear whose weight is decoded anew in backward."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: torch.Tensor,
        weight: QuantizedWeight,
        bias: torch.Tensor | None,
        dtype: torch.dtype | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return _forward(x, weight, bias, dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: FunctionCtx, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        need_x, _, need_bias, _ = ctx.needs_input_grad
        dx = dy @ weight.decoded_for(dy).to(dy.dtype) if need_x else None
        return dx, None, dy.reshape(-1, dy.shape[-1]).sum(0) if need_bias else None, None
