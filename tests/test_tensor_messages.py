"""What bypasses protobuf on the way is what protobuf would have made of it, and the other way."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2 as messages

from remix.errors import InvalidOption
from runners.shared_memory import OFFSET, OUTPUTS, lent
from runners.tensor_messages import (
    NUMPY_DTYPES,
    decode_request,
    decode_response,
    encode_request,
    encode_response,
)

arrays = npst.arrays(
    st.sampled_from(list(NUMPY_DTYPES.values())), npst.array_shapes(min_dims=0, min_side=0)
)
tensors = st.dictionaries(st.text(max_size=8), arrays, max_size=3)


def same(one: dict[str, NDArray[Any]], other: dict[str, NDArray[Any]]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype
        and one[name].shape == other[name].shape
        and one[name].tobytes() == other[name].tobytes()
        for name in one
    )


@given(st.text(max_size=8), tensors)
def test_request_is_what_protobuf_reads_and_writes(
    model: str, inputs: dict[str, NDArray[Any]]
) -> None:
    data = encode_request(model, inputs)
    theirs = messages.ModelInferRequest.FromString(data)
    assert theirs.model_name == model
    assert list(theirs.raw_input_contents) == [array.tobytes() for array in inputs.values()]
    assert theirs.SerializeToString() == data
    message, found, _ = decode_request(theirs.SerializeToString())
    assert message.model_name == model
    assert same(found, inputs)
    assert all(array.flags.aligned for array in found.values())


@given(tensors)
def test_response_is_what_protobuf_reads_and_writes(outputs: dict[str, NDArray[Any]]) -> None:
    message = messages.ModelInferResponse(model_name="m", id="7")
    message.parameters["queue_s"].double_param = 0.25
    data = encode_response(message, outputs)
    theirs = messages.ModelInferResponse.FromString(data)
    assert list(theirs.raw_output_contents) == [array.tobytes() for array in outputs.values()]
    found_message, found = decode_response(theirs.SerializeToString())
    assert found_message.id == "7"
    assert found_message.parameters["queue_s"].double_param == 0.25
    assert same(found, outputs)


def test_fields_may_come_in_any_order() -> None:
    x = np.arange(3, dtype=np.float32)
    message = messages.ModelInferRequest(model_name="m")
    message.inputs.add(name="x", datatype="FP32", shape=[3])
    raw = messages.ModelInferRequest(raw_input_contents=[x.tobytes()]).SerializeToString()
    _, found, _ = decode_request(raw + message.SerializeToString())
    np.testing.assert_array_equal(found["x"], x)


@given(st.binary(max_size=200))
def test_bytes_of_any_kind_are_refused_or_read_as_protobuf_reads_them(data: bytes) -> None:
    try:
        message, _, _ = decode_request(data)
    except InvalidOption:
        return
    theirs = messages.ModelInferRequest.FromString(data)
    assert message.model_name == theirs.model_name


def test_request_that_is_cut_short_has_no_tensor() -> None:
    data = encode_request("m", {"x": np.zeros(100, np.float32)})
    for length in range(len(data)):
        try:
            _, found, _ = decode_request(data[:length])
        except InvalidOption:
            continue
        assert not found


@given(tensors, tensors)
def test_lent_memory_holds_what_a_message_would(
    inputs: dict[str, NDArray[Any]], outputs: dict[str, NDArray[Any]]
) -> None:
    with lent() as memory, ExitStack() as held:
        request = encode_request("m", inputs, memory)
        _, found, answer = decode_request(request, held)
        assert same(found, inputs)
        response = encode_response(messages.ModelInferResponse(), outputs, answer)
        _, found_outputs = decode_response(response, memory.outputs)
    assert same(found_outputs, outputs)  # and stays when nobody lends it any more
    assert max(len(request), len(response)) < 1000


def test_memory_of_a_call_that_is_over_is_never_another_calls() -> None:
    with lent() as memory:
        late = encode_request("m", {"x": np.zeros(3, np.float32)}, memory)
        number = memory.outputs.name.split(":")[0]
    with lent() as memory, ExitStack() as held:
        assert memory.outputs.name.split(":")[0] == number  # the descriptor has come again
        with pytest.raises(InvalidOption, match="no memory"):
            decode_request(late, held)
        assert len(memory.outputs.read(0, 1)) == 0


@pytest.mark.parametrize("name", ["", "/etc/passwd", "/proc/1/fd/0", "/proc/self/fd/1:3:4"])
def test_name_of_no_memory_is_refused(name: str) -> None:
    with lent() as memory, ExitStack() as held:
        request, _, _ = decode_request(encode_request("m", {}, memory), held)
        request.parameters[OUTPUTS].string_param = name
        with pytest.raises(InvalidOption, match="no memory"):
            decode_request(request.SerializeToString(), held)


def test_file_in_the_place_of_memory_is_left_alone(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file, lent() as memory, ExitStack() as held:
        request = messages.ModelInferRequest.FromString(encode_request("m", {}, memory))
        _, device, inode = memory.outputs.name.split(":")
        name = f"/proc/{os.getpid()}/fd/{file.fileno()}:{device}:{inode}"
        request.parameters[OUTPUTS].string_param = name
        with pytest.raises(InvalidOption, match="no memory"):
            decode_request(request.SerializeToString(), held)


def test_nothing_of_a_call_is_open_when_it_is_over() -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    kept = []
    for _ in range(3):
        with lent() as memory, ExitStack() as held:
            data = encode_request("m", {"x": np.ones(1000, np.float32)}, memory)
            _, inputs, answer = decode_request(data, held)
            data = encode_response(messages.ModelInferResponse(), inputs, answer)
            kept.append((inputs, decode_response(data, memory.outputs)[1]))
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert all(same(inputs, outputs) for inputs, outputs in kept)


def test_tensor_that_lies_outside_of_its_memory_is_refused() -> None:
    with lent() as memory, ExitStack() as held:
        data = encode_request("m", {"x": np.zeros(100, np.float32)}, memory)
        request = messages.ModelInferRequest.FromString(data)
        request.inputs[0].parameters[OFFSET].int64_param = 64
        with pytest.raises(InvalidOption, match="400 bytes at 64 of its memory"):
            decode_request(request.SerializeToString(), held)


def test_runner_on_a_network_takes_no_memory() -> None:
    with lent() as memory:
        data = encode_request("m", {"x": np.zeros(3, np.float32)}, memory)
        with pytest.raises(InvalidOption, match="listens on a network"):
            decode_request(data)
