"""Messages in memory that two processes share."""

from __future__ import annotations

import os

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedfuse.errors import WireError
from fedfuse.federation.shared import Sheet, owned
from fedfuse.federation.wire import Weights, decode, encode, template_of

WEIGHTS: Weights = {
    "a": np.arange(5000, dtype=np.float32).reshape(50, 100),
    "b": np.array(2.5, dtype=np.float64),
    "c": np.zeros((0, 3), dtype=np.int64),
}


def message(scale: int = 1) -> RecordDict:
    weights = {name: np.asarray(value * scale, value.dtype) for name, value in WEIGHTS.items()}
    return RecordDict({"arrays": encode(weights), "config": ConfigRecord({"n": scale})})


def both() -> tuple[Sheet, Sheet]:
    sheet = Sheet()
    return sheet, Sheet(os.dup(sheet.descriptor))


def test_what_is_laid_down_is_read_again() -> None:
    writer, reader = both()
    packed = writer.put(message())
    assert len(packed.rest) < 1000
    record = reader.get(packed)
    assert record.config_records["config"]["n"] == 1
    back = decode(record.array_records["arrays"], template_of(WEIGHTS))
    for name, value in WEIGHTS.items():
        np.testing.assert_array_equal(back[name], value)
    assert list(record.array_records["arrays"]) == sorted(WEIGHTS)
    writer.close()
    reader.close()


def test_a_reader_cannot_write_and_has_no_copy() -> None:
    writer, reader = both()
    record = reader.get(writer.put(message()))
    data = record.array_records["arrays"]["a"].data
    assert isinstance(data, memoryview)
    assert data.readonly
    with pytest.raises(TypeError):
        data[0] = 1  # type: ignore[index]
    writer.put(message(2))
    changed = decode(record.array_records["arrays"], template_of(WEIGHTS))
    assert changed["b"] == 5.0


def test_an_owned_message_outlives_the_next_one() -> None:
    writer, reader = both()
    record = owned(reader.get(writer.put(message())))
    writer.put(message(3))
    assert decode(record.array_records["arrays"], template_of(WEIGHTS))["b"] == 2.5


def test_each_reading_is_a_record_of_its_own() -> None:
    writer, reader = both()
    packed = writer.put(message())
    reader.get(packed).array_records["arrays"].clear()
    assert len(reader.get(packed).array_records["arrays"]) == 3


def test_a_sheet_grows_while_it_is_read() -> None:
    writer, reader = both()
    small = RecordDict({"arrays": encode({"x": np.ones(3, np.float32)})})
    before = reader.get(writer.put(small)).array_records["arrays"]["x"].data
    large = np.ones(1_000_000, np.float32)
    record = reader.get(writer.put(RecordDict({"arrays": encode({"x": large})})))
    assert decode(record.array_records["arrays"], {"x": (large.shape, "float32")})["x"].all()
    assert len(before) == 128 + 12


def test_a_view_is_checked_like_any_other_array() -> None:
    writer, reader = both()
    bad = RecordDict({"arrays": ArrayRecord([np.full(3, np.nan, np.float32)])})
    record = reader.get(writer.put(bad))
    with pytest.raises(WireError, match="not finite"):
        decode(record.array_records["arrays"], {"0": ((3,), "float32")})
