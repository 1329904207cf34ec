from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedfuse.data.manifest import read_manifest
from fedfuse.data.prepare import prepare
from fedfuse.data.spec import DataConfig
from fedfuse.errors import DataError

RECORDS = [
    {
        "id": f"r{i}",
        "split": "train" if i < 6 else "test",
        "client": "a",
        "label": i % 2,
        "note": None if i == 3 else f"the patient has sign number {i}",
        "features": [float(i), 1.5, 2.0],
    }
    for i in range(9)
]


def write(records: list[dict[str, object]], path: Path) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        lines = [",".join(records[0])]
        for record in records:
            features = ";".join(str(v) for v in record["features"])  # type: ignore[attr-defined]
            cells = [*(str(v) if v is not None else "" for v in list(record.values())[:-1])]
            lines.append(",".join([*cells, features]))
        path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("name", ["m.csv", "m.jsonl", "m.parquet"])
def test_every_format_gives_the_same_records(name: str, tmp_path: Path) -> None:
    prepared = prepare(DataConfig(manifest=str(write(RECORDS, tmp_path / name))), seed=0)
    assert {m.name: m.kind.value for m in prepared.schema.modalities} == {
        "note": "text",
        "features": "vector",
    }
    assert prepared.train.ids.tolist() == [f"r{i}" for i in range(6)]
    assert prepared.train.present("note").tolist() == [True, True, True, False, True, True]
    batch = prepared.train.batch(np.arange(6))
    assert np.allclose(batch.inputs["features"][4], np.arcsinh([4, 1.5, 2.0]))
    assert batch.target.tolist() == [0, 1, 0, 1, 0, 1]


def test_lines_of_a_csv_count_quoted_line_breaks(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_text('id,split,client,label,note\na,train,x,0,"two\nlines"\nb,test,x,1,one\n')
    assert [row.line for row in read_manifest(path).rows] == [2, 4]


def test_a_byte_order_mark_and_capital_headers_are_understood(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_bytes(b"\xef\xbb\xbfID,Split,Client,Label,note\na,train,x,0,hello\n")
    assert read_manifest(path).columns == ("id", "split", "client", "label", "note")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "empty"),
        (b"id,split,client,label,note\n", "no rows"),
        (b"id,client,label,note\na,b,0,hi\n", "no column split"),
        (b"id,split,client,note\na,train,b,hi\n", "label or target"),
        (b"id,split,client,label\na,train,b,0\n", "no modality"),
        (b"id,split,client,label,x,x\na,train,b,0,1,1\n", "two columns"),
        (b"\xff\xfe\x00\x01", "not UTF-8"),
    ],
)
def test_an_unusable_manifest_is_refused(content: bytes, what: str, tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=what):
        read_manifest(path)


@pytest.mark.parametrize("name", ["m.jsonl", "m.parquet"])
def test_garbage_is_refused_in_other_formats(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(b"garbage")
    with pytest.raises(DataError, match="cannot be read"):
        read_manifest(path)


def test_a_missing_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_manifest(tmp_path / "m.csv")


def test_ragged_and_malformed_lines_become_problems(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_text("id,split,client,label,note\na,train,x,0,hello, world\nb,test,x,1,hi\n")
    assert [problem.line for problem in read_manifest(path).problems] == [2]
    path = tmp_path / "m.jsonl"
    path.write_text('{"id":"a","split":"train","client":"x","label":0,"note":"hi"}\n{oops\n')
    assert [problem.line for problem in read_manifest(path).problems] == [2]
