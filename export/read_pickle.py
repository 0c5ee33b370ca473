"""pickle -> named arrays, without running it.

A pickle is a program: it may name any function of any module and have it called. Python's
unpickler is therefore not used. Its opcodes are followed here, names stay names, no module is
imported on a pickle's behalf, and a name that is not on a short list is an error.

Source: the opcodes' meaning, `pickletools` of Python 3.11; what numpy and torch write with them,
numpy 1.16 to 2.4 and torch 1.6 to 2.13 (`torch/_utils.py`).
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remix.errors import InvalidModel

_TORCH_STORAGES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}

_GLOBALS = {
    "_codecs.encode",
    "__builtin__.bytes",  # protocol 2 spells an empty content so
    "collections.OrderedDict",
    "numpy.ndarray",
    "numpy.dtype",
    "numpy.core.multiarray._reconstruct",  # numpy 1
    "numpy._core.multiarray._reconstruct",  # numpy 2
    "numpy.core.numeric._frombuffer",  # protocol 5
    "numpy._core.numeric._frombuffer",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    *(f"torch.{name}" for name in _TORCH_STORAGES),
}
"""All that a pickle may name."""

_LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
"""Opcodes that push their own argument."""


def read_pickle(
    pickled: bytes, read_storage: Callable[[str], bytes] | None = None
) -> dict[str, NDArray[Any]]:
    """Every array of a pickled dict, by its name; nested dicts are joined by dots.

    Args:
        pickled: of protocol 2 to 5.
        read_storage: gives the bytes of the torch storage of a key; none for a pickle of numpy
            arrays.

    Raises:
        InvalidModel: the pickle names or does something that is not on this file's lists.
        (Damaged bytes raise whatever they meet: `read_arrays` maps it.)
    """
    arrays: dict[str, NDArray[Any]] = {}

    def collect(value: object, path: tuple[str, ...]) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                collect(item, (*path, str(key)))
        elif isinstance(value, _Array):
            arrays[".".join(path)] = value.array()
        elif isinstance(value, _Tensor):
            if read_storage is None:
                raise InvalidModel("A pickle has torch tensors but no storages beside it.")
            arrays[".".join(path)] = _strided(value, read_storage(value.key))

    collect(_value_of(pickled), ())
    return arrays


@dataclass(frozen=True)
class _Global:
    """A name that a pickle wants to call; here it stays a name."""

    name: str


@dataclass
class _Dtype:
    """`numpy.dtype` by its code ("f4"), and the byte order that its state tells."""

    code: str
    order: str = "="

    def build(self, state: Any) -> None:
        """State: (version, byte order, …)."""
        self.order = state[1] if state[1] in ("<", ">") else "="

    def dtype(self) -> np.dtype[Any]:
        if self.code[:1] not in ("f", "i", "u", "b"):
            raise InvalidModel(f"A pickle has an array of dtype {self.code!r}: not numbers.")
        return np.dtype(self.code).newbyteorder(self.order)  # type: ignore[arg-type]


@dataclass
class _Array:
    """A numpy array, as the state that its pickle tells."""

    state: Any = None

    def array(self) -> NDArray[Any]:
        """State: (version, shape, dtype, whether in Fortran order, bytes)."""
        match self.state:
            case (_, tuple(shape), _Dtype() as dtype, bool(is_fortran), bytes(content)):
                flat = np.frombuffer(content, dtype.dtype())
                return flat.reshape(shape, order="F" if is_fortran else "C")
        raise InvalidModel("A pickle has an array that is not plain bytes of numbers.")


@dataclass(frozen=True)
class _Tensor:
    """A torch tensor, as its place in a storage; offset and strides count elements."""

    key: str
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _call(function: object, arguments: Any) -> object:
    """What the named function would have made, for the few that weight files need."""
    match function, arguments:
        case _Global("_codecs.encode"), (str(text), "latin1"):
            return text.encode("latin1")  # how protocol 2 spells bytes
        case _Global("__builtin__.bytes"), ():
            return b""
        case _Global("collections.OrderedDict"), ():
            return {}
        case _Global("numpy.dtype"), (str(code), *_):
            return _Dtype(code)
        case _Global(name), (_Global("numpy.ndarray"), *_) if name.endswith("._reconstruct"):
            return _Array()
        case _Global(name), (
            bytes(content) | bytearray(content),
            dtype,
            shape,
            order,
        ) if name.endswith("._frombuffer"):
            return _Array((1, shape, dtype, order == "F", bytes(content)))
        case _Global(name), _ if name.endswith(".scalar"):
            return None  # a number that is no weight
        case _Global("torch._utils._rebuild_tensor_v2"), (
            ("storage", str(storage), str(key)),
            int(offset),
            tuple(shape),
            tuple(strides),
            *_,
        ):
            return _Tensor(key, _TORCH_STORAGES[storage], offset, shape, strides)
        case _Global("torch._utils._rebuild_parameter"), (_Tensor() as tensor, *_):
            return tensor
    raise InvalidModel(f"A pickle calls {str(function)[:80]} in a way that no weight file needs.")


def _storage_of(persistent_id: Any) -> tuple[str, str, str]:
    match persistent_id:
        case ("storage", _Global(name), str(key), *_) if name.startswith("torch."):
            return "storage", name.removeprefix("torch."), key
    raise InvalidModel(f"A pickle refers to {str(persistent_id)[:80]}: no torch storage.")


def _global(module: str, name: str) -> _Global:
    full_name = f"{module}.{name}"
    if full_name not in _GLOBALS:
        raise InvalidModel(
            f"A pickle names {full_name}, which is not on the list of export/read_pickle.py. "
            "Nothing of it was executed. Do not use this file."
        )
    return _Global(full_name)


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}


def _value_of(pickled: bytes) -> Any:
    """The value that a pickle describes, by following its opcodes one by one.

    `pickletools` decodes the opcodes; what they mean is done here, and only for those that
    weight files of protocol 2 to 5 have.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    argument: Any

    def since_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    def set_items(items: list[Any]) -> None:
        stack[-1].update(zip(items[::2], items[1::2], strict=True))

    for opcode, argument, _ in pickletools.genops(pickled):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                marks.append(len(stack))
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
                size = int(name[-1])
                stack[-size:] = [tuple(stack[-size:])]
            case "SETITEM":
                marks.append(len(stack) - 2)
                set_items(since_mark())
            case "SETITEMS":
                set_items(since_mark())
            case "APPEND":
                stack[-2].append(stack.pop())
            case "APPENDS":
                items = since_mark()
                stack[-1].extend(items)
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "NONE" | "NEWTRUE" | "NEWFALSE" as name:
                stack.append(_CONSTANTS[name])
            case name if name in _LITERALS:
                stack.append(argument)
            case "GLOBAL":
                stack.append(_global(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                stack[-2:] = [_global(stack[-2], stack[-1])]
            case "REDUCE":
                stack[-2:] = [_call(stack[-2], stack[-1])]
            case "BINPERSID":
                stack[-1] = _storage_of(stack[-1])
            case "BUILD":
                _build(stack[-2], stack.pop())
            case name:
                raise InvalidModel(f"A pickle has opcode {name}, which no weight file needs.")
    raise InvalidModel("A pickle ends before its end. Fetch the file again.")


def _build(target: object, state: Any) -> None:
    """Give an object the state that follows it in the pickle."""
    match target:
        case _Array():
            target.state = state
        case _Dtype():
            target.build(state)
        case dict():
            pass  # torch hangs `_metadata` on its state dicts
        case _:
            raise InvalidModel(f"A pickle sets the state of {str(target)[:80]}.")


def _strided(tensor: _Tensor, storage: bytes) -> NDArray[Any]:
    """The tensor's view of its storage, copied; the bounds are checked, numpy does not."""
    flat = np.frombuffer(storage, tensor.dtype)
    sizes_and_strides = list(zip(tensor.shape, tensor.strides, strict=True))
    negative = any(n < 0 or s < 0 for n, s in sizes_and_strides) or tensor.offset < 0
    last = tensor.offset + sum((n - 1) * s for n, s in sizes_and_strides)
    if negative or (math.prod(tensor.shape) > 0 and last >= flat.size):
        raise InvalidModel(
            f"A tensor of shape {tensor.shape}, strides {tensor.strides}, offset {tensor.offset} "
            f"reaches outside its storage of {flat.size} elements. Fetch the file again."
        )
    strides = [s * flat.itemsize for s in tensor.strides]
    view = np.lib.stride_tricks.as_strided(flat[tensor.offset :], tensor.shape, strides)
    return np.ascontiguousarray(view).reshape(tensor.shape)
