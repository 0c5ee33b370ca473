"""Weight files are read as their own libraries read them, and no pickle in them ever runs."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from export.read_arrays import read_arrays
from remix.errors import InvalidModel

DTYPES = ("float32", "float64", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")


def arrays_of(seed: int) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(seed)
    shapes = [(), (0,), (5,), (2, 3), (1, 4, 2)]
    return {
        f"{dtype}.{i}": rng.integers(0, 2, shape).astype(dtype)
        for dtype in DTYPES
        for i, shape in enumerate(shapes)
    }


def assert_same(found: dict[str, NDArray[Any]], expected: dict[str, NDArray[Any]]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        assert np.array_equal(found[name], array), name


def in_torch_zip(pickled: bytes, **members: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        for name, content in members.items():
            archive.writestr(f"archive/data/{name}", content)
    return out.getvalue()


def saved(value: object) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


# --- the same arrays as the file's own library reads --------------------------------------


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_read_of_pickled_numpy_arrays_gives_what_pickle_gives(protocol: int) -> None:
    arrays = arrays_of(1)
    nested = {"model": OrderedDict(arrays), "step": 600_000, "rate": np.float32(0.1), "name": "x"}
    expected = {f"model.{name}": array for name, array in arrays.items()}
    pickled = pickle.dumps(nested, protocol=protocol)
    assert_same(read_arrays(pickled), expected)
    assert_same(read_arrays(in_torch_zip(pickled)), expected)


@pytest.mark.parametrize("protocol", [2, 4])
def test_read_of_fortran_and_big_endian_arrays_keeps_their_values(protocol: int) -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    given = {"fortran": np.asfortranarray(array), "big": array.astype(">f4")}
    found = read_arrays(pickle.dumps(given, protocol=protocol))
    assert np.array_equal(found["fortran"], array)
    assert np.array_equal(found["big"], array)


def test_read_of_a_torch_checkpoint_gives_what_torch_gives() -> None:
    arrays = arrays_of(2)
    tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    assert_same(read_arrays(saved(tensors)), arrays)


def test_read_of_views_parameters_and_modules_gives_their_values() -> None:
    base = torch.arange(24.0).reshape(4, 6)
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    found = read_arrays(
        saved(
            {
                "transposed": base.T,
                "sliced": base[1:3, ::2],
                "repeated": torch.ones(1).expand(3, 4),
                "parameter": torch.nn.Parameter(base),
                "net": module.state_dict(),
                "config": {"lr": 0.1, "betas": (0.9, 0.99), "layers": [1, 2], "name": None},
            }
        )
    )
    expected: dict[str, NDArray[Any]] = {
        "transposed": base.T.numpy(),
        "sliced": base[1:3, ::2].numpy(),
        "repeated": np.ones((3, 4), np.float32),
        "parameter": base.numpy(),
        **{f"net.{name}": tensor.numpy() for name, tensor in module.state_dict().items()},
    }
    assert_same(found, expected)


def test_read_of_safetensors_gives_what_safetensors_gives() -> None:
    arrays = arrays_of(3)
    assert_same(read_arrays(safetensors.numpy.save(arrays, metadata={"a": "b"})), arrays)


def test_read_of_ctranslate2_resolves_aliases() -> None:
    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    weight = np.arange(6, dtype=np.float16).reshape(2, 3)
    data = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<I", 3)
    data += struct.pack("<I", 2)
    data += text("a/weight") + struct.pack("<B2I", 2, 2, 3) + struct.pack("<BI", 4, 12)
    data += weight.tobytes()
    data += text("a/scale") + struct.pack("<B", 0) + struct.pack("<BI", 1, 1) + b"\x05"
    data += struct.pack("<I", 1) + text("b/weight") + text("a/weight")
    scale: NDArray[Any] = np.array(5, np.int8)
    expected = {"a/weight": weight, "b/weight": weight, "a/scale": scale}
    assert_same(read_arrays(data), expected)


# --- nothing runs --------------------------------------------------------------------------


class Calls:
    """Pickles as a call of a function, which the unpickler would make."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def attacks(canary: Path) -> dict[str, object]:
    touch = f"touch {canary}"
    return {
        "os.system": Calls(os.system, touch),
        "eval": Calls(eval, f"open({str(canary)!r}, 'w')"),
        "exec": Calls(exec, f"open({str(canary)!r}, 'w')"),
        "open": Calls(open, str(canary), "w"),
        "import": Calls(__import__, "antigravity"),
        "getattr": Calls(getattr, "", "join"),
        "within": {"model": {"w": np.zeros(3), "x": Calls(os.system, touch)}},
        "as a key": {Calls(os.mkdir, str(canary)): 1},
        "in a list": [1, [Calls(os.mkdir, str(canary))]],
    }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("name", attacks(Path()))
def test_read_of_a_malicious_pickle_names_what_it_wanted_and_runs_nothing(
    name: str, protocol: int, tmp_path: Path
) -> None:
    canary = tmp_path / "ran"
    pickled = pickle.dumps(attacks(canary)[name], protocol=protocol)
    for data in (pickled, in_torch_zip(pickled)):
        with pytest.raises(InvalidModel, match=r"names \S+, which is not on the list"):
            read_arrays(data)
    assert not canary.exists()


def test_the_attacks_do_run_where_they_are_unpickled(tmp_path: Path) -> None:
    """Else the test above would prove nothing."""
    canary = tmp_path / "ran"
    pickle.loads(pickle.dumps(attacks(canary)["os.system"]))
    assert canary.exists()


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x02cos\nsystem\n.",  # only names it
        b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R.",
        b"\x80\x02cnumpy\nndarray\nK\x01\x85R.",  # calls what may only be named
        b"\x80\x02cnumpy\nndarray\n}X\x01\x00\x00\x00aK\x01sb.",  # sets an attribute of it
        b"\x80\x02cnumpy\nndarray\nK\x01\x85\x81.",  # NEWOBJ
        b"\x80\x02(K\x01cnumpy\nndarray\no.",  # OBJ
        b"\x80\x02(K\x01icollections\nOrderedDict\n.",  # INST
        b"\x80\x02\x82\x01.",  # EXT1
        b"\x80\x02X\x01\x00\x00\x00aQ.",  # a persistent id that is no storage
        b"\x80\x02]h\x00.",  # a memo that is not there
        b"\x80\x02.",  # an empty stack
        b"\x80\x02}",  # no end
    ],
)
def test_read_of_a_pickle_that_no_weight_file_needs_is_refused(pickled: bytes) -> None:
    with pytest.raises(InvalidModel):
        read_arrays(pickled)


def test_read_of_a_tensor_that_reaches_outside_its_storage_is_refused() -> None:
    """numpy would read foreign memory here: strides are not checked by `as_strided`."""
    pickled = pickle.dumps(None, protocol=2)
    for offset, size, stride in [
        (0, 5, 1),
        (4, 1, 1),
        (3, 2, 1),
        (0, 2, 4),
        (-1, 1, 1),
        (3, 2, -1),
    ]:
        pickled = (
            b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n("
            b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000"
            b"X\x03\x00\x00\x00cpuK\x04tQ"
            + b"".join(b"J" + struct.pack("<i", n) for n in (offset,))
            + b"J" + struct.pack("<i", size) + b"\x85"
            + b"J" + struct.pack("<i", stride) + b"\x85"
            + b"\x89}tRs."
        )  # fmt: skip
        with pytest.raises(InvalidModel, match="outside its storage"):
            read_arrays(in_torch_zip(pickled, **{"0": bytes(16)}))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_read_of_damaged_files_is_an_error_of_ours_or_no_error(data: st.DataObject) -> None:
    whole = data.draw(
        st.sampled_from(
            [
                pickle.dumps({"w": np.arange(4.0)}, protocol=2),
                pickle.dumps({"w": np.arange(4.0)}, protocol=4),
                saved({"w": torch.arange(4.0)}),
                safetensors.numpy.save({"w": np.arange(4.0)}),
            ]
        )
    )
    damaged = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for _ in range(data.draw(st.integers(0, 3))):
        if damaged:
            damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        read_arrays(bytes(damaged))
    except InvalidModel as error:
        assert str(error)
