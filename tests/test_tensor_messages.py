"""What bypasses protobuf on the way is what protobuf would have made of it, and the other way."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2 as messages

from remix.errors import InvalidOption
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
    message, found = decode_request(theirs.SerializeToString())
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
    _, found = decode_request(raw + message.SerializeToString())
    np.testing.assert_array_equal(found["x"], x)


@given(st.binary(max_size=200))
def test_bytes_of_any_kind_are_refused_or_read_as_protobuf_reads_them(data: bytes) -> None:
    try:
        message, _ = decode_request(data)
    except InvalidOption:
        return
    theirs = messages.ModelInferRequest.FromString(data)
    assert message.model_name == theirs.model_name


def test_request_that_is_cut_short_has_no_tensor() -> None:
    data = encode_request("m", {"x": np.zeros(100, np.float32)})
    for length in range(len(data)):
        try:
            _, found = decode_request(data[:length])
        except InvalidOption:
            continue
        assert not found
