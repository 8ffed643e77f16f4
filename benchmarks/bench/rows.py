"""The bench's record: one line of JSON for everything that happened, written as it happens.

`kind` is one of
    run       what is measured with: machine, versions, model, sizes, seed, the command line
    start     a stage's processes are ready: seconds, versions, KV tokens, MPS clients
    round     one measured round: the cell's facts, `phases.measured`, the device's readings
    skip      a cell or a round that was not run, and why
    failure   something broke; what, and the end of its log
Units are in the names; `*_ratio` is 0 to 1; times inside a row are seconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

Json = dict[str, Any]


class Rows:
    """Appends rows to an open file and flushes each, so that a cut run keeps what it has."""

    def __init__(self, out: TextIO, run_id: str) -> None:
        self._out = out
        self._run_id = run_id

    def write(self, kind: str, row: Json) -> Json:
        date = datetime.now(UTC).isoformat(timespec="seconds")
        full = {"kind": kind, "run": self._run_id, **rounded(row), "date": date}
        self._out.write(json.dumps(full) + "\n")
        self._out.flush()
        return full


def rounded(value: Any) -> Any:
    """Floats to six significant digits, however deep they lie."""
    match value:
        case float():
            return float(f"{value:.6g}")
        case dict():
            return {key: rounded(item) for key, item in value.items()}
        case list() | tuple():
            return [rounded(item) for item in value]
        case _:
            return value


def read(files: Iterable[Path]) -> list[Json]:
    return [json.loads(line) for file in files for line in file.read_text().splitlines() if line.strip()]
