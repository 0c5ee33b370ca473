"""Named arrays <-> the Open Inference Protocol's messages, as bytes, each array copied once.

A protobuf message copies its large fields three times on their way (into the message, out of it,
into the wire's bytes). They stand at a message's end, each behind a tag and its length, so here
they are joined to it, and found in it, without protobuf (`benchmarks/hop.py` measures both ways).
The bytes are those of `SerializeToString`: any other client or server of the protocol may be at
the other end.

Source: https://protobuf.dev/programming-guides/encoding
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from math import prod
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2 as messages

from remix.errors import InvalidOption, excerpt
from remix.stages import Tensors
from runners.shared_memory import BYTES, INPUTS, OFFSET, OUTPUTS, Lent, Region, opened

NUMPY_DTYPES: Mapping[str, np.dtype[Any]] = {
    "FP32": np.dtype("<f4"),
    "FP16": np.dtype("<f2"),
    "INT64": np.dtype("<i8"),
    "INT32": np.dtype("<i4"),
    "BOOL": np.dtype("?"),
}

CONTENTS = {
    "FP32": "fp32_contents",
    "INT64": "int64_contents",
    "INT32": "int_contents",
    "BOOL": "bool_contents",
}
"""Where the protocol keeps tensors that a client sends as numbers instead of bytes."""

REQUEST_RAW = messages.ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER
RESPONSE_RAW = messages.ModelInferResponse.RAW_OUTPUT_CONTENTS_FIELD_NUMBER

MAX_BYTES = 1 << 30
"""Of a tensor in memory: more than a message may have."""

LENGTH = 2
"""The wire type of a field that has its length before it."""


def encode_request(model: str, inputs: Tensors, lent: Lent | None = None) -> bytes:
    """Named arrays -> a ModelInferRequest, which names the memory that is lent for it."""
    message = messages.ModelInferRequest(model_name=model)
    if lent is None:
        return _encode(message, message.inputs, REQUEST_RAW, inputs, None)
    message.parameters[INPUTS].string_param = lent.inputs.name
    message.parameters[OUTPUTS].string_param = lent.outputs.name
    return _encode(message, message.inputs, REQUEST_RAW, inputs, lent.inputs)


def decode_request(
    data: bytes, held: ExitStack | None = None
) -> tuple[Any, dict[str, NDArray[Any]], Region | None]:
    """A ModelInferRequest -> the message without raw contents, named arrays, memory for the answer.

    Args:
        data: the message.
        held: keeps that memory until the answer is written; none where callers may be elsewhere,
            and send all in the message.

    Raises:
        InvalidOption: what was sent is no such message, or its tensors are not what they say.
    """
    message, raw = _split(messages.ModelInferRequest, REQUEST_RAW, data)
    if OUTPUTS not in message.parameters:
        return message, _arrays(message.inputs, raw), None
    if held is None:
        raise InvalidOption(
            "This runner listens on a network: it takes no memory of its callers.",
            value=OUTPUTS,
            limit="no such parameter",
            remedy="Send the tensors in the message.",
        )
    answer = held.enter_context(opened(message.parameters[OUTPUTS].string_param))
    with opened(message.parameters[INPUTS].string_param) as memory:
        contents = [_lying(tensor, memory) for tensor in message.inputs]
    return message, _arrays(message.inputs, contents), answer


def encode_response(message: Any, outputs: Tensors, region: Region | None = None) -> bytes:
    """A ModelInferResponse without tensors, named arrays -> the whole of it."""
    return _encode(message, message.outputs, RESPONSE_RAW, outputs, region)


def decode_response(
    data: bytes, region: Region | None = None
) -> tuple[Any, dict[str, NDArray[Any]]]:
    """A ModelInferResponse -> the message without its raw contents, and named arrays.

    Raises:
        InvalidOption: see `decode_request`.
    """
    message, raw = _split(messages.ModelInferResponse, RESPONSE_RAW, data)
    if region is not None:
        raw = [_lying(tensor, region) for tensor in message.outputs]
    return message, _arrays(message.outputs, raw)


def _encode(
    message: Any, tensors: Any, field: int, arrays: Tensors, region: Region | None
) -> bytes:
    for name, array in arrays.items():
        tensor = tensors.add(name=name, datatype=_datatype(array), shape=array.shape)
        if region is not None:
            offset, size = region.write(array)
            tensor.parameters[OFFSET].int64_param = offset
            tensor.parameters[BYTES].int64_param = size
    return _join(message, field, arrays.values() if region is None else ())


def _lying(tensor: Any, region: Region) -> memoryview:
    """The contents of a tensor in memory."""
    begin, size = tensor.parameters[OFFSET].int64_param, tensor.parameters[BYTES].int64_param
    is_right = begin >= 0 and 0 <= size <= MAX_BYTES
    if not is_right or len(contents := region.read(begin, size)) != size:
        raise InvalidOption(
            f"Tensor {excerpt(tensor.name)} is said to have {size} bytes at {begin} of its memory, "
            "where they are not.",
            value=[begin, size],
            limit=MAX_BYTES,
            remedy="Say where it lies.",
        )
    return contents


def _join(message: Any, field: int, arrays: Iterable[NDArray[Any]]) -> bytes:
    parts: list[bytes | memoryview] = [message.SerializeToString()]
    tag = _varint(field << 3 | LENGTH)
    for array in arrays:
        contents = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        parts += [tag, _varint(contents.nbytes), contents]
    return b"".join(parts)


def _split(kind: Any, field: int, data: bytes) -> tuple[Any, list[memoryview]]:
    view = memoryview(data)
    raw, rest = [], []
    at = 0
    try:
        while at < len(data):
            start = at
            key, at = _read_varint(data, at)
            size = 0
            match key & 7:  # the wire type
                case 0:
                    _, at = _read_varint(data, at)
                case 1:
                    size = 8
                case 2:
                    size, at = _read_varint(data, at)
                case 5:
                    size = 4
                case other:  # 3 and 4 are protobuf 2's groups
                    raise DecodeError(f"wire type {other}")
            if at + size > len(data):
                raise DecodeError(f"{len(data)} bytes, cut short")
            at += size
            if key == field << 3 | LENGTH:
                raw.append(view[at - size : at])
            else:
                rest.append(view[start:at])
        return kind.FromString(b"".join(rest)), raw
    except (DecodeError, IndexError) as error:
        raise InvalidOption(
            f"What was sent is no {kind.DESCRIPTOR.name}: {error}.",
            value=len(data),
            limit=kind.DESCRIPTOR.full_name,
            remedy="Send what the Open Inference Protocol's .proto describes.",
        ) from error


def _varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first; all but the last have the highest bit set.

    >>> _varint(300).hex()
    'ac02'
    """
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    found.append(number)
    return bytes(found)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = data[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
        shift += 7
        if shift >= 70:  # 64 bits are ten bytes
            raise DecodeError("a number of more than ten bytes")


def _arrays(tensors: Sequence[Any], raw: Sequence[memoryview]) -> dict[str, NDArray[Any]]:
    if raw and len(raw) != len(tensors):
        raise InvalidOption(
            f"{len(tensors)} tensors came with {len(raw)} raw contents; each must have one.",
            value=len(raw),
            limit=len(tensors),
            remedy="Send every tensor raw, or none.",
        )
    return {
        tensor.name: _array(tensor, raw[index] if raw else None)
        for index, tensor in enumerate(tensors)
    }


def _array(tensor: Any, raw: memoryview | None) -> NDArray[Any]:
    name = excerpt(tensor.name)
    dtype = NUMPY_DTYPES.get(tensor.datatype)
    if dtype is None:
        raise InvalidOption(
            f"Tensor {name} has the datatype {excerpt(tensor.datatype)!r}.",
            value=excerpt(tensor.datatype),
            limit=list(NUMPY_DTYPES),
            remedy=f"Use one of {', '.join(NUMPY_DTYPES)}.",
        )
    if raw is not None:
        array = np.frombuffer(raw, dtype, count=len(raw) // dtype.itemsize)
        left_over = len(raw) % dtype.itemsize
    elif tensor.datatype in CONTENTS:
        array = np.array(getattr(tensor.contents, CONTENTS[tensor.datatype]), dtype)
        left_over = 0
    else:
        raise InvalidOption(
            f"Tensor {name} is {tensor.datatype} without raw contents.",
            value=tensor.datatype,
            limit=list(CONTENTS),
            remedy="Send it raw.",
        )
    shape = tuple(tensor.shape)
    if left_over or any(size < 0 for size in shape) or array.size != prod(shape):
        raise InvalidOption(
            f"Tensor {name} has {array.size} values; its shape {excerpt(shape)} needs "
            f"{prod(shape)}.",
            value=array.size,
            limit=list(shape[:8]),
            remedy="Send as many values as the shape says.",
        )
    # Where a message ends is chance: models want their floats on the boundaries of floats.
    return np.require(array.reshape(shape), requirements="A")


def _datatype(array: NDArray[Any]) -> str:
    for datatype, dtype in NUMPY_DTYPES.items():
        if array.dtype == dtype:
            return datatype
    raise InvalidOption(
        f"{array.dtype} has no datatype in the protocol.",
        value=str(array.dtype),
        limit=list(NUMPY_DTYPES),
        remedy="Use float32.",
    )
