"""The table of predictions: columns, formats, and writing whole or not at all."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnnpipe.classify.table import Columns, Prediction, TableFormat, read_table, table_columns, write_table
from cnnpipe.errors import PredictionsError
from cnnpipe.paths import escape_path

MODEL = "tiny/20260101T000000Z"
ODD_NAMES = (
    'a"b.png',
    "a,b.png",
    "a\nb.png",
    "a\rb.png",
    "a\r\nb.png",
    " a .png",
    "=1+1.png",
    "ü/日本.png",
    "\\x41.png",
)


def ok(path: str, *likeliest: tuple[str, float]) -> Prediction:
    labels, probabilities = zip(*likeliest, strict=True)
    return Prediction(path, "ok", labels, probabilities, "", "", "a" * 64, MODEL)


def failed(path: str, sha256: str = "b" * 64) -> Prediction:
    return Prediction(path, "error", (), (), "truncated", 'ends, "too early"', sha256, MODEL)


def columns(rows: Sequence[Prediction], top_k: int) -> Columns:
    labels = [[row.labels[rank] if row.labels else None for row in rows] for rank in range(top_k)]
    probabilities = [[row.probabilities[rank] if row.labels else -1 for row in rows] for rank in range(top_k)]
    errors = [f"{row.error_kind}: {row.error}" if row.error_kind else None for row in rows]
    return Columns(
        [escape_path(row.path) for row in rows],
        labels,
        np.array(probabilities, np.float32).reshape(top_k, len(rows)),
        errors,
        [row.sha256 or None for row in rows],
        MODEL,
    )


def write(path: Path, rows: list[Prediction], top_k: int = 1, *, safe_csv: bool = False) -> Path:
    write_table(path, TableFormat(path.suffix, top_k, safe_csv), (columns([row], top_k) for row in rows))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    """Return the rows of any format, with None for what is empty and float32 for probabilities."""
    if path.suffix == ".parquet":
        rows = pq.read_table(path).to_pylist()
    elif path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_bytes().decode().split("\n")[:-1]]
    else:
        rows = list(csv.DictReader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="")))
    return [
        {name: np.float32(value) if name.startswith("prob") and value else value or None for name, value in row.items()}
        for row in rows
    ]


def test_columns_grow_with_top_k() -> None:
    assert table_columns(1) == ["path", "status", "label", "probability", "error", "sha256", "model"]
    assert table_columns(3)[2:8] == ["label", "probability", "label_2", "probability_2", "label_3", "probability_3"]


def test_csv_is_plain_text_with_empty_cells_for_errors(tmp_path: Path) -> None:
    rows = [ok("a.png", ("cat", 0.1), ("dog", 1e-7)), failed("b.png", sha256="")]
    assert write(tmp_path / "t.csv", rows, 2).read_bytes().decode() == (
        "path,status,label,probability,label_2,probability_2,error,sha256,model\n"
        f"a.png,ok,cat,0.1,dog,1e-07,,{'a' * 64},{MODEL}\n"
        f'b.png,error,,,,,"truncated: ends, ""too early""",,{MODEL}\n'
    )


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_every_format_holds_the_same_values(tmp_path: Path, suffix: str) -> None:
    rows = [
        *(ok(name, ("cat", 0.33333334), ("dog, small", 1e-45)) for name in ODD_NAMES),
        failed("b.png"),
        failed("c.png", sha256=""),
    ]
    found = read(write(tmp_path / f"t{suffix}", rows, 2))
    assert [list(row) for row in found] == [table_columns(2)] * len(rows)
    assert [row["path"] for row in found] == [*ODD_NAMES, "b.png", "c.png"]
    assert found[0] == {
        "path": ODD_NAMES[0],
        "status": "ok",
        "label": "cat",
        "probability": np.float32(1 / 3),
        "label_2": "dog, small",
        "probability_2": np.float32(1e-45),
        "error": None,
        "sha256": "a" * 64,
        "model": MODEL,
    }
    assert found[-1] == {
        "path": "c.png",
        "status": "error",
        "label": None,
        "probability": None,
        "label_2": None,
        "probability_2": None,
        "error": 'truncated: ends, "too early"',
        "sha256": None,
        "model": MODEL,
    }


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_names_that_are_not_utf8_are_escaped(tmp_path: Path, suffix: str) -> None:
    name = b"caf\xe9.png".decode("utf-8", "surrogateescape")
    assert read(write(tmp_path / f"t{suffix}", [failed(name)]))[0]["path"] == "caf\\xe9.png"


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1))
@settings(max_examples=100, deadline=None)
def test_any_name_survives_csv(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = write(tmp_path_factory.getbasetemp() / "any.csv", [ok(text, (text, 0.5))])
    row = next(csv.DictReader(io.StringIO(path.read_bytes().decode(), newline="")))
    assert (row["path"], row["label"]) == (text, text)


def test_parquet_columns_are_typed(tmp_path: Path) -> None:
    schema = pq.read_schema(write(tmp_path / "t.parquet", [ok("a.png", ("cat", 0.5))]))
    assert schema.names == table_columns(1)
    assert {field.name for field in schema if field.type == pa.float32()} == {"probability"}
    assert {field.name for field in schema if not field.nullable} == {"path", "status", "model"}


@pytest.mark.parametrize(
    "values",
    [
        [0.0, 1.0, 0.5, 0.1, 1e-7, 1e-45, 0.33333334, 1e-12, 1 - 2**-24, 1e-4, 1e-5],
        np.random.default_rng(0).random(100_000).tolist(),
        (10 ** np.random.default_rng(1).uniform(-14, 0, 100_000)).tolist(),
    ],
    ids=["special", "even", "small"],
)
def test_probabilities_have_the_fewest_digits_that_give_the_float32_back(values: list[float], tmp_path: Path) -> None:
    probabilities = np.array(values, np.float32)
    rows = Columns(
        [""] * len(values), [["cat"] * len(values)], probabilities[None], [None] * len(values), [None], MODEL
    )
    rows = replace(rows, sha256=[None] * len(values))
    write_table(tmp_path / "t.csv", TableFormat(".csv", 1), [rows])
    written = [line.split(",")[3] for line in (tmp_path / "t.csv").read_text().splitlines()[1:]]
    assert written == [str(float(str(value))) for value in probabilities]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("num_rows", [1_000, 40_000], ids=["at the end", "on the way"])
def test_disk_that_takes_no_more_is_one_error_that_names_the_table(tmp_path: Path, suffix: str, num_rows: int) -> None:
    program = (
        "import hashlib, resource, signal, sys; from pathlib import Path\n"
        "from cnnpipe.errors import StorageError\n"
        "import numpy as np\n"
        "from cnnpipe.classify.table import Columns, TableFormat, write_table\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n"
        "try:\n"
        "    path = Path(sys.argv[1])\n"
        "    digests = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(int(sys.argv[2]))]\n"
        "    names = [str(number) for number in range(len(digests))]\n"
        "    none = np.zeros((1, len(names)), np.float32)\n"
        "    rows = Columns(names, [[None] * len(names)], none, ['empty: no bytes'] * len(names), digests, 'm')\n"
        "    write_table(path, TableFormat(path.suffix, 1), [rows])\n"
        "except StorageError as error: print(error)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / f"t{suffix}"), str(num_rows)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert shown.stdout.startswith(f"cannot write {tmp_path / f't{suffix}'}: ")
    assert "File too large" in shown.stdout
    assert shown.stdout.count("\n") == 1
    assert shown.stderr == ""


FORMULAS = ("=1+1.png", "+1.png", "-1.png", "@SUM(A1).png", "\t=1.png", "\r=1.png", "'quoted.png")


def test_safe_csv_has_no_field_that_a_spreadsheet_computes(tmp_path: Path) -> None:
    rows = [ok(name, ("=cat", 0.5)) for name in (*FORMULAS, "plain.png", "a=b.png")]
    found = read(write(tmp_path / "t.csv", rows, safe_csv=True))
    assert [row["path"] for row in found] == [*("'" + name for name in FORMULAS), "plain.png", "a=b.png"]
    assert {row["label"] for row in found} == {"'=cat"}
    assert {row["probability"] for row in found} == {np.float32(0.5)}


def test_formulas_stay_as_they_are_unless_asked(tmp_path: Path) -> None:
    found = read(write(tmp_path / "t.csv", [ok(name, ("=cat", 0.5)) for name in FORMULAS]))
    assert [row["path"] for row in found] == list(FORMULAS)


@pytest.mark.parametrize(
    ("suffix", "safe_csv"), [(".csv", False), (".csv", True), (".jsonl", False), (".parquet", False)]
)
def test_tables_are_read_back_as_they_were_written(tmp_path: Path, suffix: str, safe_csv: bool) -> None:
    rows = [
        *(ok(name, ("cat", 0.33333334), ("-dog, small", 1e-45)) for name in (*ODD_NAMES, *FORMULAS)),
        failed("b.png"),
        failed("c.png", sha256=""),
    ]
    path = write(tmp_path / f"t{suffix}", rows, 2, safe_csv=safe_csv)
    found = list(read_table(path, TableFormat(suffix, 2, safe_csv)))
    rounded = [replace(row, probabilities=tuple(float(np.float32(each)) for each in row.probabilities)) for row in rows]
    assert [
        replace(row, probabilities=tuple(float(np.float32(each)) for each in row.probabilities)) for row in found
    ] == rounded


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".csv", b""),
        (".csv", b"path,label\na.png,cat\n"),
        (".csv", b"path,status,label,probability,error,sha256,model\na.png,fine,cat,1,,,m\n"),
        (".csv", b"path,status,label,probability,error,sha256,model\na.png,ok,cat\n"),
        (".csv", b"\xff"),
        (".csv", b'path,status,label,probability,error,sha256,model\n"a.png,ok,cat,1,,,m\n'),
        (".jsonl", b"{"),
        (".jsonl", b"[]\n"),
        (".parquet", b"PAR1"),
    ],
)
def test_what_is_not_a_table_is_one_clear_error(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"t{suffix}"
    path.write_bytes(content)
    with pytest.raises(
        PredictionsError, match=rf"t\{suffix} cannot be read as a table of 1 classes a row: .*--overwrite"
    ):
        list(read_table(path, TableFormat(suffix, 1)))
