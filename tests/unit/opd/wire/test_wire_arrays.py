"""Ids, masks and floats as arrays of the wire, and everything a decoder must not believe."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd.errors import InvalidRequestError
from opd.types import PAD_ID, Encoding
from opd.wire import arrays
from opd.wire.pb import teacher_pb2 as pb

MAX_ID = 2**31 - 1


@given(st.integers(0, 31), st.lists(st.integers(PAD_ID, MAX_ID), max_size=40))
@settings(max_examples=200, deadline=None)
def test_ids_survive_packed_to_the_largest(num_bits: int, values: list[int]) -> None:
    ids = np.array([min(value, 2**num_bits - 1) for value in values], np.int32)
    message = arrays.encode_ids(ids)
    decoded = arrays.decode_ids(message, "ids", 1)
    np.testing.assert_array_equal(decoded, ids)
    assert decoded.dtype == np.int32
    assert message.bit_width == max(1, int(ids.max(initial=-1) + 1).bit_length())
    assert len(message.data) == -(-ids.size * message.bit_width // 8)


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0)])
def test_no_ids_are_an_array_too(shape: tuple[int, ...]) -> None:
    decoded = arrays.decode_ids(arrays.encode_ids(np.zeros(shape, np.int32)), "ids", len(shape))
    assert decoded.shape == shape


def test_a_matrix_of_a_large_vocabulary_takes_18_bits_an_id() -> None:
    ids = np.random.default_rng(0).integers(PAD_ID, 151_936, (448, 16), dtype=np.int32)
    ids[0, 0], ids[1, 1] = 151_935, PAD_ID
    message = arrays.encode_ids(ids)
    assert (message.bit_width, len(message.data)) == (18, 448 * 16 * 18 // 8)
    np.testing.assert_array_equal(arrays.decode_ids(message, "ids", 2), ids)


def test_views_that_are_not_contiguous_are_packed_as_they_read() -> None:
    ids = np.arange(40, dtype=np.int32).reshape(5, 8)[:, ::2].T
    np.testing.assert_array_equal(arrays.decode_ids(arrays.encode_ids(ids), "ids", 2), ids)


def test_ids_that_cannot_exist_reach_the_check_that_names_them() -> None:
    ids = np.array([3, -2], np.int32)
    message = arrays.encode_ids(ids)
    assert message.dtype == pb.DTYPE_INT32
    np.testing.assert_array_equal(arrays.decode_ids(message, "ids", 1), ids)


def test_unpacked_ids_and_masks_are_read_too() -> None:
    plain = pb.Array(dtype=pb.DTYPE_INT32, shape=[2], data=np.array([5, -1], "<i4").tobytes())
    np.testing.assert_array_equal(arrays.decode_ids(plain, "ids", 1), [5, -1])
    flags = pb.Array(dtype=pb.DTYPE_BOOL, shape=[3], data=b"\x01\x00\x01")
    np.testing.assert_array_equal(arrays.decode_mask(flags, "mask", 1), [True, False, True])


@given(st.lists(st.booleans(), max_size=40))
@settings(max_examples=100, deadline=None)
def test_masks_take_a_bit_an_element(flags: list[bool]) -> None:
    message = arrays.encode_mask(np.array(flags, np.bool_))
    assert len(message.data) == -(-len(flags) // 8)
    np.testing.assert_array_equal(arrays.decode_mask(message, "mask", 1), np.array(flags, np.bool_))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bit_width": 0}, "ids: bit_width 0 is outside 1 to 32"),
        ({"bit_width": 33}, "ids: bit_width 33 is outside 1 to 32"),
        ({"bit_width": 2**32 - 1}, "ids: bit_width 4294967295"),
        ({"data": bytes(2)}, r"ids: 2 bytes given, shape \(3,\) needs 1"),
        ({"data": b""}, "ids: 0 bytes given"),
        ({"shape": [5]}, r"ids: 1 bytes given, shape \(5,\) needs 2"),
        ({"shape": [3, 1]}, "ids: 2 dimensions given, 1 expected"),
        ({"shape": [2**32 - 1]}, r"ids: shape \(4294967295,\) has more than 16777216 elements"),
        ({"data": b"\xff"}, "ids: bits after the last element are set"),
        ({"dtype": pb.DTYPE_FLOAT32}, "ids: dtype 2 is not accepted; send DTYPE_PACKED_IDS or DTYPE_INT32"),
        ({"dtype": 99}, "ids: dtype 99 is not accepted"),
    ],
    ids=str,
)
def test_malformed_ids_are_refused_by_name(change: dict[str, object], reason: str) -> None:
    fields: dict[str, object] = {"dtype": pb.DTYPE_PACKED_IDS, "shape": [3], "data": b"\x3f", "bit_width": 2}
    np.testing.assert_array_equal(arrays.decode_ids(pb.Array(**fields), "ids", 1), [2, 2, 2])  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match=reason):
        arrays.decode_ids(pb.Array(**{**fields, **change}), "ids", 1)  # type: ignore[arg-type]


def test_the_largest_id_passes_and_the_next_is_refused() -> None:
    def packed(stored: int) -> pb.Array:
        return pb.Array(dtype=pb.DTYPE_PACKED_IDS, shape=[1], data=stored.to_bytes(4, "little"), bit_width=32)

    assert arrays.decode_ids(packed(2**31), "ids", 1).tolist() == [MAX_ID]
    with pytest.raises(InvalidRequestError, match="id 2147483648 is above 2147483647"):
        arrays.decode_ids(packed(2**31 + 1), "ids", 1)


def test_malformed_masks_are_refused_by_name() -> None:
    for shape, data, reason in (
        ([3], b"\x0f", "bits after"),
        ([9], b"\x01", "1 bytes given"),
        ([1, 1], b"\x01", "2 d"),
    ):
        with pytest.raises(InvalidRequestError, match=f"mask: {reason}"):
            arrays.decode_mask(pb.Array(dtype=pb.DTYPE_BITS, shape=shape, data=data), "mask", 1)


def rounded(*values: float) -> list[float]:
    message = arrays.encode_floats(np.array(values, np.float32), Encoding.FLOAT16)
    return [float(value) for value in arrays.decode_floats(message, "values", 1)]


def test_float16_keeps_finite_values_finite_and_others_as_they_are() -> None:
    assert rounded(-65_504.0, -65_519.0, -1e6, 1e6) == [-65_504.0, -65_504.0, -65_504.0, 65_504.0]
    assert rounded(-np.inf, np.inf) == [-np.inf, np.inf]
    assert np.isnan(rounded(np.nan)[0])


def test_float16_errs_by_half_a_unit_at_most() -> None:
    """Near 0 the step is 2 ** -24, an absolute one: a token of probability 0.99999 keeps its log-prob to 3e-8."""
    values = -np.geomspace(1e-8, 65_000, 100_000).astype(np.float32)
    message = arrays.encode_floats(values, Encoding.FLOAT16)
    error = np.abs(arrays.decode_floats(message, "values", 1).astype(np.float64) - values)
    step = np.maximum(2.0 ** (np.floor(np.log2(-values.astype(np.float64))) - 10), 2.0**-24)
    assert (error <= step / 2).all()
    assert error[values > -1e-4].max() <= 2.0**-25
