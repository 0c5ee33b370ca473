"""weight file -> named arrays, and nothing in the file is ever executed.

Three formats: torch's zip checkpoints (and pickled dicts of numpy arrays, in a zip or alone),
CTranslate2's `model.bin`, safetensors.
"""

from __future__ import annotations

import io
import json
import re
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.read_pickle import read_pickle
from remix.errors import InvalidModel

Arrays = dict[str, NDArray[Any]]

_CTRANSLATE2_VERSIONS = range(3, 7)
_CTRANSLATE2_DTYPES = {0: "<f4", 1: "i1", 2: "<i2", 3: "<i4", 4: "<f2"}
"""The identifiers of ctranslate2/types.h, in CTranslate2 4."""

_SAFETENSORS_DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "?",
}


def read_arrays(data: bytes) -> Arrays:
    """Every array in a weight file, by its name.

    Args:
        data: the file's content; its first bytes tell the format.

    Returns:
        Arrays by name. Nested dicts are joined by dots: `{"model": {"w": a}}` is `model.w`.
        What is no array (step counters, settings) is left out.

    Raises:
        InvalidModel: the format is unknown, the file is damaged, or a pickle in it names
            something that is not on the list.

    Example:
        >>> import pickle
        >>> read_arrays(pickle.dumps({"model": {"w": np.arange(3)}}))
        {'model.w': array([0, 1, 2])}
    """
    reader = _reader_of(data)
    try:
        return reader(data)
    except InvalidModel:
        raise
    except Exception as error:  # damaged bytes fail in every way
        raise InvalidModel(
            f"The weight file ({len(data)} bytes) cannot be read: {error!r}. Fetch it again."
        ) from error


def _reader_of(data: bytes) -> Callable[[bytes], Arrays]:
    if data[:4] == b"PK\x03\x04":
        return _read_zip
    if data[:1] == b"\x80" and data[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return read_pickle
    if data[8:9] == b"{":
        return _read_safetensors
    if len(data) >= 4 and int.from_bytes(data[:4], "little") in _CTRANSLATE2_VERSIONS:
        return _read_ctranslate2
    raise InvalidModel(
        f"A weight file begins with {data[:9]!r}: neither a torch checkpoint, nor a pickle of "
        "protocol 2 to 5, nor safetensors, nor CTranslate2 (version 3 to 6)."
    )


def _read_zip(data: bytes) -> Arrays:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        pickles = [name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise InvalidModel(f"A checkpoint has {len(pickles)} members data.pkl, not one.")
        folder = pickles[0].removesuffix("data.pkl")
        byteorder = f"{folder}byteorder"
        if byteorder in archive.namelist() and archive.read(byteorder) != b"little":
            raise InvalidModel("A checkpoint is big-endian; only little-endian ones are read.")
        return read_pickle(
            archive.read(pickles[0]), lambda key: archive.read(f"{folder}data/{key}")
        )


def _read_ctranslate2(data: bytes) -> Arrays:
    """Source: CTranslate2 4, src/models/model.cc, `Model::load`."""
    file = io.BytesIO(data)

    def unpack(layout: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{layout}", file.read(struct.calcsize(f"<{layout}")))

    def text() -> str:
        (length,) = unpack("H")
        return file.read(length)[:-1].decode()  # ends in a zero byte

    (version,) = unpack("I")
    text()  # the name of the model's specification
    unpack("I")  # and its revision
    (count,) = unpack("I")
    arrays: Arrays = {}
    for _ in range(count):
        name = text()
        (rank,) = unpack("B")
        shape = unpack(f"{rank}I")
        if version >= 4:
            dtype_id, n_bytes = unpack("BI")
            dtype = _CTRANSLATE2_DTYPES[dtype_id]
        else:
            item_size, n_items = unpack("BI")
            dtype, n_bytes = {4: "<f4", 2: "<i2", 1: "i1"}[item_size], item_size * n_items
        arrays[name] = np.frombuffer(file.read(n_bytes), dtype).reshape(shape)
    (n_aliases,) = unpack("I")
    for _ in range(n_aliases):
        alias, target = text(), text()
        arrays[alias] = arrays[target]
    return arrays


def _read_safetensors(data: bytes) -> Arrays:
    """Source: the format section of safetensors' README, version 0.8."""
    n_header = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + n_header])
    content = memoryview(data)[8 + n_header :]
    arrays: Arrays = {}
    for name, row in header.items():
        if name == "__metadata__":
            continue
        if row["dtype"] not in _SAFETENSORS_DTYPES:
            raise InvalidModel(f"Array {name} has dtype {row['dtype']}, which is not supported.")
        begin, end = row["data_offsets"]
        dtype = _SAFETENSORS_DTYPES[row["dtype"]]
        arrays[name] = np.frombuffer(content[begin:end], dtype).reshape(row["shape"])
    return arrays


def why_unread(error: Exception) -> str:
    """What torch says of a file that it does not load, without its advice to execute it.

    >>> why_unread(EOFError())
    'EOFError'
    """
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    found = re.search(r"WeightsUnpickler error: (.+?)(?:\.? Please|\n|$)", text)
    return found[1] if found else text.split("\n")[0] or type(error).__name__
