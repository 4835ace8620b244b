"""Tensors without contents: any code of torch runs on them at little cost, and what it would allocate is counted.

Every operation, those of backward passes and optimisers too, goes through `Phantoms`. Large tensors are known by their
shape alone, and computed on torch's meta device; small ones whose contents are known are computed as ever, so that code
which looks at contents (targets, boxes, indices) goes its way. Contents that nobody knows are zeros where code looks.

All phantoms are on the CPU. `gpu_rules` makes torch do as it does on GPUs, where that changes memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten

_KNOWN = 2**23  # elements of the largest tensor whose contents are followed
_KNOWN_IF_HEAVY = 2**14
_KNOWN_WEIGHT = 2**12  # while a model is built: of more, all weights would be drawn


class Allocator:
    """What is allocated.

    Attributes:
        live: bytes at this moment.
        peak: the most bytes at any moment since the last mark.
    """

    def __init__(self) -> None:
        self.live = 0
        self.peak = 0
        self._blocks: weakref.WeakValueDictionary[int, Block] = weakref.WeakValueDictionary()

    def mark(self) -> int:
        """The peak since the last mark; it is counted anew from now on."""
        peak, self.peak = self.peak, self.live
        return peak

    def block_of(self, inner: Tensor) -> Block:
        """The block that a tensor lies in; views share theirs."""
        storage = inner.untyped_storage()
        block = self._blocks.get(storage._cdata)
        if block is None:
            block = self._blocks[storage._cdata] = Block(self, storage)
            self.live += block.num_bytes
            self.peak = max(self.peak, self.live)
        return block


class Block:
    """A storage; free once the last tensor in it is gone."""

    def __init__(self, allocator: Allocator, storage: torch.UntypedStorage) -> None:
        self.num_bytes = storage.nbytes()
        self._allocator = allocator
        self._storage = storage  # as long as it is there, no other has its address

    def __del__(self) -> None:
        self._allocator.live -= self.num_bytes


class Phantom(Tensor):
    """A tensor that is an outline.

    Attributes:
        held: on the meta device, or on the CPU where the contents are known.
        block: that it lies in.
    """

    held: Tensor
    block: Block

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls: type[Phantom], inner: Tensor, block: Block) -> Phantom:
        """A phantom of a tensor that is no phantom."""
        made: Phantom = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=torch.device("cpu")
        )
        made.held, made.block = inner, block
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise AssertionError(f"{func} of phantoms outside of their mode")

    def numpy(self, *, force: bool = False) -> npt.NDArray[Any]:
        """The contents; zeros where they are not known."""
        with _disable_current_modes():
            array: npt.NDArray[Any] = _seen(self.held).numpy()
        return array

    def tolist(self) -> Any:
        """The contents; zeros where they are not known."""
        with _disable_current_modes():
            return _seen(self.held).tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied = self.detach().clone()
        made = nn.Parameter(copied, self.requires_grad) if isinstance(self, nn.Parameter) else copied
        memo[id(self)] = made
        return made


class Phantoms(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it, whatever is made is a phantom.

    Attributes:
        allocator: counts what is allocated.
        flops: of matrix products, convolutions and attention so far; a multiplication and an addition are two.
        traffic: bytes that operations have read and written so far.
        launches: operations so far, but for views.
        is_building: a model is being made, whose weights are not drawn.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.allocator = Allocator()
        self.flops = 0
        self.traffic = 0
        self.launches = 0
        self.is_building = False
        self._results: dict[Any, _Known] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind, tensors = _kind_of(func), list[Tensor]()
        inner = _unwrapped(args, tensors)
        named = {name: _unwrapped(value, tensors) for name, value in kwargs.items()} if kwargs else {}
        if func in _INDEXING:  # by a mask, the result's size is in the contents
            inner = (inner[0], [each for index in inner[1] for each in _as_integers(index)], *inner[2:])
        if self._is_followed(kind, inner, tensors):
            result = func(*_mapped(_seen, inner), **{name: _mapped(_seen, value) for name, value in named.items()})
        else:
            result = None if kind.changes else self._outlined(kind, inner, named)
        made = [tensors[0]] if kind.changes and tensors else list[Tensor]()
        wrapped = args[0] if kind.changes else self._wrapped(result, made)
        if not kind.is_view:
            self.launches += 1
            self.traffic += sum(tensor.numel() * tensor.element_size() for tensor in (*tensors, *made))
        return wrapped if func._schema.returns else None

    def _wrapped(self, result: Any, made: list[Tensor]) -> Any:
        """The result with phantoms of its tensors, which are added to those made."""
        if isinstance(result, Tensor):
            made.append(result)
            return Phantom(result, self.allocator.block_of(result))
        return type(result)(self._wrapped(x, made) for x in result) if isinstance(result, list | tuple) else result

    def forget(self, tensors: Iterable[Tensor]) -> None:
        """From here on, nobody knows what these phantoms hold, where they are floating."""
        with _disable_current_modes():
            for tensor in tensors:
                if isinstance(tensor, Phantom) and tensor.is_floating_point():
                    tensor.held = _outline(tensor.held)
                    tensor.block = self.allocator.block_of(tensor.held)

    def _is_followed(self, kind: _Kind, args: Any, tensors: Sequence[Tensor]) -> bool:
        """Whether the contents of the result are computed."""
        if kind.func in _LOOKING:
            return True
        largest = max((tensor.numel() for tensor in tensors), default=0)
        if kind.sized is not None and len(args) > kind.sized:
            largest = max(largest, int(np.prod(args[kind.sized], dtype=np.int64)))
        num_unknown = sum(tensor.is_meta for tensor in tensors)
        if largest > (_KNOWN_WEIGHT if self.is_building else _KNOWN_IF_HEAVY if kind.is_heavy else _KNOWN):
            return False
        if kind.changes or kind.is_heavy:
            return num_unknown == 0
        return num_unknown < len(tensors) or not tensors or kind.func in _DECIDING

    def _outlined(self, kind: _Kind, args: Any, kwargs: dict[str, Any]) -> Any:
        """The result on the meta device: as torch computes it there, or did for arguments of the same outlines."""
        key = (kind.func, _to_key(args), _to_key(tuple(kwargs.items())))
        if (known := self._results.get(key)) is not None:
            self.flops += known.flops
            return _mapped(_blank, known.result)
        if kind.is_placed:
            kwargs = {**kwargs, "device": "meta"}
        args = _mapped(_outline, args)
        kwargs = {name: _mapped(_outline, value) for name, value in kwargs.items() if name != "generator"}
        result = kind.func(*args, **kwargs)
        flops = _flops(kind.func, args, kwargs, result) if kind.is_heavy else 0
        self.flops += flops
        if not kind.is_view and kind.func is not aten._unsafe_view.default:
            self._results[key] = _Known(_mapped(_blank, result), flops)
        return result


class _Known(NamedTuple):
    """What an operation gave, and its floating-point operations."""

    result: Any
    flops: int


@dataclass(frozen=True)
class _Kind:
    """What is to know of an operation.

    Attributes:
        func: torch's.
        changes: it writes into its first argument.
        is_view: the result lies in the blocks of its arguments.
        is_placed: it is told a device.
        is_heavy: it is not computed unless all is known.
        sized: where it is told the size of what it makes.
    """

    func: Any
    changes: bool
    is_view: bool
    is_placed: bool
    is_heavy: bool
    sized: int | None


@cache
def _kind_of(func: Any) -> _Kind:
    arguments, returns = func._schema.arguments, func._schema.returns
    changes = bool(arguments) and arguments[0].alias_info is not None and arguments[0].alias_info.is_write
    return _Kind(
        func,
        changes=changes,
        is_view=not changes and any(output.alias_info is not None for output in returns),
        is_placed=any(argument.name == "device" for argument in arguments),
        is_heavy=func._overloadpacket in _HEAVY,
        sized=_SIZED.get(func),
    )


def _unwrapped(value: Any, tensors: list[Tensor]) -> Any:
    """An argument with what is inside its phantoms; its tensors are added to the list."""
    if isinstance(value, Tensor):
        inner = value.held if isinstance(value, Phantom) else value
        tensors.append(inner)
        return inner
    return type(value)(_unwrapped(x, tensors) for x in value) if isinstance(value, list | tuple) else value


def _to_key(value: Any) -> Any:
    """An argument by its outline."""
    if isinstance(value, Tensor):
        return (value.shape, value.stride(), value.dtype, type(value))
    return tuple(map(_to_key, value)) if isinstance(value, list | tuple) else (value, type(value))


def _mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """An argument with its tensors changed."""
    if isinstance(value, Tensor):
        return change(value)
    return type(value)(_mapped(change, x) for x in value) if isinstance(value, list | tuple) else value


def _flops(func: Any, args: Any, kwargs: Mapping[str, Any], result: Any) -> int:
    """As torch counts them, but for gradients of grouped convolutions, which it counts as if there were no groups."""
    if func is aten.convolution_backward.default:
        outward, images, weight, mask = args[0], args[1], args[2], args[10]
        return int(sum(mask[:2])) * int(flop_registry[aten.convolution](images, weight, *args[3:10], out_val=outward))
    formula = flop_registry.get(func._overloadpacket)
    return int(formula(*args, **kwargs, out_val=result)) if formula else 0


def _as_integers(index: Tensor | None) -> Sequence[Tensor | None]:
    """An index as integers; of a mask, one for each of its dimensions."""
    if index is None or index.dtype not in (torch.bool, torch.uint8):
        return [index]
    return _seen(index).nonzero(as_tuple=True)


def _seen(inner: Tensor) -> Tensor:
    """On the CPU; zeros where nobody knows."""
    return torch.zeros_like(inner, device="cpu") if inner.is_meta else inner


def _outline(inner: Tensor) -> Tensor:
    """On the meta device."""
    return inner if inner.is_meta else _blank(inner)


def _blank(inner: Tensor) -> Tensor:
    """Another one of this outline, on the meta device."""
    return torch.empty_strided(inner.shape, inner.stride(), dtype=inner.dtype, device="meta")


# --- operations ---------------------------------------------------------------------------------------------------

_INDEXING = (aten.index.Tensor, aten._unsafe_index.Tensor)
_LOOKING = {  # the result, or its size, is in the contents
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.bincount.default,
    aten.repeat_interleave.Tensor,
    aten.equal.default,
}
_DECIDING = {  # what code goes by, from contents that nobody knows
    *(aten.topk.default, aten.sort.default, aten.sort.stable, aten.argsort.stable, aten.argmax.default),
    *(aten.eq.Tensor, aten.eq.Scalar, aten.ne.Tensor, aten.ne.Scalar, aten.all.default, aten.any.default),
    *(aten.gt.Scalar, aten.ge.Scalar, aten.lt.Scalar, aten.le.Scalar, aten.kthvalue.default, aten.exp.default),
}
_HEAVY = {*flop_registry, aten.grid_sampler_2d, aten.upsample_bilinear2d}  # hardly computed
_SIZED = {  # where an operation is told the size of what it makes
    **dict.fromkeys((aten.empty.memory_format, aten.zeros.default, aten.ones.default, aten.full.default), 0),
    **dict.fromkeys((aten.rand.default, aten.rand.generator, aten.randn.default, aten.randn.generator), 0),
    **dict.fromkeys((aten.empty_strided.default, aten.eye.default, aten.arange.default, aten.randperm.default), 0),
    **dict.fromkeys((aten.new_empty.default, aten.new_zeros.default, aten.new_full.default), 1),
    **dict.fromkeys((aten.new_ones.default, aten.expand.default, aten.new_empty_strided.default), 1),
}


# --- as on GPUs ---------------------------------------------------------------------------------------------------

_IN_FLOAT32 = (  # by autocast on GPUs, but not on CPUs
    *("exp", "expm1", "log", "log1p", "log2", "log10", "reciprocal", "rsqrt", "softplus", "cumsum", "cumprod"),
    *("pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "softmax.int", "log_softmax.int", "logsumexp"),
    *("layer_norm", "group_norm", "rms_norm", "sum", "sum.dim_IntList", "norm.Scalar", "norm.ScalarOpt_dim"),
    *("linalg_vector_norm", "cosine_similarity", "dist", "upsample_nearest2d", "upsample_bilinear2d"),
    *("upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"),
)


@contextmanager
def gpu_rules() -> Iterator[None]:
    """Within it, torch does on CPUs as on GPUs, where that changes memory.

    Autocast keeps more operations in float32; dropout keeps a mask of bytes; attention is fused.
    """
    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    for name in _IN_FLOAT32:
        packet, _, overload = name.partition(".")
        operation = _in_float32(getattr(getattr(aten, packet), overload or "default"))
        library.impl(name, operation, "AutocastCPU")  # type: ignore[no-untyped-call]
    try:
        with (
            patch.object(F, "dropout", _dropout),
            patch.object(F, "scaled_dot_product_attention", _attention),
        ):
            yield
    finally:
        library._destroy()  # type: ignore[no-untyped-call]


def _in_float32(operation: Any) -> Any:
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)

    def cast(tensor: Tensor) -> Tensor:
        return tensor.float() if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            args, kwargs = tree_map_only(Tensor, cast, (args, kwargs))
            return operation(*args, **kwargs)

    return run


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or p == 0:
        return input
    dropped: Tensor = torch.native_dropout(input, p, True)[0]
    return dropped


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Flash attention in half precision without a mask, else the memory-efficient one, as torch chooses on GPUs."""
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    settings = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
    out: Tensor
    if attn_mask is None and query.dtype != torch.float32:
        out, *_ = aten._scaled_dot_product_flash_attention(query, key, value, **settings)
        return out
    bias = None
    if attn_mask is not None:
        is_mask = attn_mask.dtype == torch.bool
        bias = torch.zeros_like(attn_mask, dtype=query.dtype) if is_mask else attn_mask.to(query.dtype)
        bias = bias.expand(*query.shape[:-1], key.shape[-2])
    out, *_ = aten._scaled_dot_product_efficient_attention(query, key, value, bias, query.requires_grad, **settings)
    return out
