"""Files and batches of OpenAI's batch interface, on disk: one folder that all replicas of an application share.

An SQLite database in WAL mode holds what there is and each line's result, so that nothing finished is done twice after
a restart; the files' contents lie beside it. Everything is private to the user (0600), and appears whole or not at all.
Every method may be called from any thread and process, and takes milliseconds, but for those that copy a file.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from deployments.batch_lines import Line, LineError, expired_line, read_lines

WINDOW_S = 24 * 3600
# What a runner still has to do something about, in the order of a batch's life.
UNFINISHED = ("validating", "in_progress", "finalizing", "cancelling")
_BUSY_S = 30.0
_SCHEMA = """
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS files (
    id TEXT PRIMARY KEY, position INTEGER, bytes INTEGER, created_at INTEGER, filename TEXT, purpose TEXT,
    expires_at INTEGER);
CREATE TABLE IF NOT EXISTS batches (id TEXT PRIMARY KEY, position INTEGER, status TEXT, document TEXT);
CREATE TABLE IF NOT EXISTS lines (
    batch TEXT, number INTEGER, custom_id TEXT, start INTEGER, length INTEGER, ok INTEGER, result TEXT,
    prompt_tokens INTEGER, output_tokens INTEGER, PRIMARY KEY (batch, number));
PRAGMA user_version = 1;
COMMIT;
"""
# A file that nothing names is left over from a crash once it is as old as this; an upload takes less.
_ORPHAN_S = 3600.0
_BATCH: dict[str, Any] = {
    "object": "batch", "errors": None, "output_file_id": None, "error_file_id": None, "in_progress_at": None,
    "finalizing_at": None, "completed_at": None, "failed_at": None, "expired_at": None, "cancelling_at": None,
    "cancelled_at": None, "model": None, "usage": None, "metadata": None,
}  # fmt: skip


class StoreError(Exception):
    """What was asked for cannot be done; `status` is HTTP's, the message says why in one sentence."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param


class BatchStore:
    """The store in `folder`, which is made at the first write. `clock` gives Unix seconds."""

    def __init__(self, folder: Path, clock: Callable[[], float], most_bytes: int) -> None:
        self.folder = folder
        self._clock = clock
        self._most_bytes = most_bytes

    @property
    def exists(self) -> bool:
        return (self.folder / "batches.db").exists()

    @property
    def lock_path(self) -> Path:
        """Whoever holds a lock on this file runs the batches."""
        return self.folder / "runner.lock"

    # Files

    def add_file(self, source: BinaryIO, filename: str, purpose: str, lifetime_s: int | None = None) -> dict[str, Any]:
        """Copy `source` into the store. Raises StoreError when the store is full."""
        with self._reading() as database:
            (held,) = database.execute("SELECT coalesce(sum(bytes), 0) FROM files").fetchone()
        if held >= self._most_bytes:
            raise StoreError(507, "the folder for batches is full; delete files that are no longer needed")
        file_id = f"file-{secrets.token_hex(16)}"
        with self._new_file(file_id) as target:
            shutil.copyfileobj(source, target, 1 << 20)
        now = int(self._clock())
        with self._writing() as database:
            self._register(database, file_id, filename, purpose, now + lifetime_s if lifetime_s else None)
        return self.file(file_id)

    def file(self, file_id: str) -> dict[str, Any]:
        """Raises StoreError (404)."""
        with self._reading() as database:
            row = database.execute("SELECT * FROM files WHERE id = ?", (file_id,)).fetchone()
        if row is None:
            raise StoreError(404, f"there is no file {file_id!r}", "file_id")
        return _file(row)

    def files(self, purpose: str | None, after: str | None, limit: int, newest_first: bool) -> list[dict[str, Any]]:
        """One more than `limit` where there are more."""
        wanted, values = ("WHERE purpose = ?", [purpose]) if purpose else ("", [])
        with self._reading() as database:
            rows = _page(database, "files", wanted, values, after, limit, newest_first)
        return [_file(row) for row in rows]

    def content(self, file_id: str) -> Path:
        """Where a file's content lies. Raises StoreError (404)."""
        self.file(file_id)
        return self._path(file_id)

    def delete_file(self, file_id: str) -> None:
        """Raises StoreError: 404, or 409 while a batch still reads it."""
        self.file(file_id)
        with self._writing() as database:
            reads = f"status IN {UNFINISHED} AND json_extract(document, '$.input_file_id') = ?"
            reading = database.execute(f"SELECT id FROM batches WHERE {reads}", (file_id,)).fetchone()
            if reading:
                raise StoreError(409, f"the batch {reading['id']} still reads this file; cancel it first", "file_id")
            database.execute("DELETE FROM files WHERE id = ?", (file_id,))
        self._path(file_id).unlink(missing_ok=True)

    def purge(self) -> None:
        """Delete the files whose time is over and that no batch reads, and what a crash left."""
        with self._reading() as database:
            rows = database.execute("SELECT id FROM files WHERE expires_at <= ?", (int(self._clock()),)).fetchall()
            known = {row["id"] for row in database.execute("SELECT id FROM files")}
        for row in rows:
            with contextlib.suppress(StoreError):
                self.delete_file(row["id"])
        for path in (self.folder / "files").iterdir():
            if path.name not in known and self._clock() - path.stat().st_mtime > _ORPHAN_S:
                path.unlink(missing_ok=True)

    # Batches

    def create_batch(self, input_file_id: str, endpoint: str, metadata: dict[str, str] | None) -> dict[str, Any]:
        """A new batch, still to be validated. Raises StoreError when there is no such file for batches."""
        if self.file(input_file_id)["purpose"] != "batch":
            raise StoreError(400, "the file was not uploaded with the purpose `batch`", "input_file_id")
        now, batch_id = int(self._clock()), f"batch_{secrets.token_hex(16)}"
        document = {
            **_BATCH, "id": batch_id, "endpoint": endpoint, "input_file_id": input_file_id, "completion_window": "24h",
            "created_at": now, "expires_at": now + WINDOW_S, "metadata": metadata,
        }  # fmt: skip
        with self._writing() as database:
            values = (batch_id, _next_position(database, "batches"), "validating", json.dumps(document))
            database.execute("INSERT INTO batches VALUES (?, ?, ?, ?)", values)
        return self.batch(batch_id)

    def batch(self, batch_id: str) -> dict[str, Any]:
        """As OpenAI shows it, with its counts as they are now. Raises StoreError (404)."""
        with self._reading() as database:
            return _batch(database, _row(database, batch_id))

    def batches(self, after: str | None, limit: int) -> list[dict[str, Any]]:
        """Newest first; one more than `limit` where there are more."""
        with self._reading() as database:
            return [_batch(database, row) for row in _page(database, "batches", "", [], after, limit, True)]

    def cancel(self, batch_id: str) -> dict[str, Any]:
        """Have a batch stopped; the runner then writes what was finished. Raises StoreError (404, 409)."""
        with self._writing() as database:
            status = _row(database, batch_id)["status"]
            if status not in (*UNFINISHED[:2], "cancelling"):
                raise StoreError(409, f"a batch that is {status} cannot be cancelled", "batch_id")
            if status != "cancelling":
                self._move(database, batch_id, "cancelling")
        return self.batch(batch_id)

    # For the runner

    def unfinished(self) -> list[str]:
        """The batches that are not over, oldest first."""
        with self._reading() as database:
            query = f"SELECT id FROM batches WHERE status IN {UNFINISHED} ORDER BY position"
            return [row["id"] for row in database.execute(query)]

    def status(self, batch_id: str) -> str:
        with self._reading() as database:
            return str(_row(database, batch_id)["status"])

    def validate(self, batch_id: str) -> None:
        """Read the input file and make the batch in_progress, or failed with its errors."""
        document = self.batch(batch_id)
        with self._path(document["input_file_id"]).open("rb") as file:
            lines, errors, model = read_lines(file, document["endpoint"])
        with self._writing() as database:
            if _row(database, batch_id)["status"] != "validating":
                return  # cancelled meanwhile
            if errors:
                self._move(database, batch_id, "failed", errors=_errors(errors))
                return
            rows = ((batch_id, line.number, line.custom_id, line.start, line.length) for line in lines)
            insert = "INSERT INTO lines (batch, number, custom_id, start, length) VALUES (?, ?, ?, ?, ?)"
            database.executemany(insert, rows)
            self._move(database, batch_id, "in_progress", model=model)

    def pending(self, batch_id: str) -> list[Line]:
        """The lines without a result, in order."""
        query = "SELECT number, custom_id, start, length FROM lines WHERE batch = ? AND ok IS NULL ORDER BY number"
        with self._reading() as database:
            return [Line(*row) for row in database.execute(query, (batch_id,))]

    def request(self, input_file_id: str, line: Line) -> dict[str, Any]:
        """The request in a line of an input file."""
        with self._path(input_file_id).open("rb") as file:
            file.seek(line.start)
            request: dict[str, Any] = json.loads(file.read(line.length))
        return request

    def record(self, batch_id: str, line: Line, ok: bool, result: str, usage: tuple[int, int]) -> None:
        """A line's result, written once and kept: `usage` are its prompt and output tokens."""
        update = (
            "UPDATE lines SET ok = ?, result = ?, prompt_tokens = ?, output_tokens = ?"
            " WHERE batch = ? AND number = ? AND ok IS NULL"
        )
        with self._writing() as database:
            database.execute(update, (ok, result, *usage, batch_id, line.number))

    def finish(self, batch_id: str) -> None:
        """Write the output and error files of what there is, and end the batch: cancelled when that was asked for,
        expired when lines are left, else completed. Interrupted anywhere, it can be called again."""
        with self._writing() as database:
            if _row(database, batch_id)["status"] == "in_progress":
                self._move(database, batch_id, "finalizing")
            cancelled = _row(database, batch_id)["status"] == "cancelling"
        left = self.pending(batch_id)
        output = self._write_results(batch_id, 1, [])
        errors = self._write_results(batch_id, 0, [] if cancelled else [expired_line(line.custom_id) for line in left])
        with self._writing() as database:
            files = {"output_file_id": output, "error_file_id": errors}
            for kind, file_id in (("output", output), ("error", errors)):
                if file_id:
                    self._register(database, file_id, f"{batch_id}_{kind}.jsonl", "batch_output", None)
            self._move(database, batch_id, "cancelled" if cancelled else "expired" if left else "completed", **files)
            # From here on the files are the results; the counts stay in the document.
            database.execute("DELETE FROM lines WHERE batch = ?", (batch_id,))

    def _write_results(self, batch_id: str, ok: int, more: list[str]) -> str | None:
        """A new file of the results of one kind, not yet registered; None when there are none."""
        query = "SELECT result FROM lines WHERE batch = ? AND ok = ? ORDER BY number"
        file_id = f"file-{secrets.token_hex(16)}"
        with self._reading() as database:
            results = database.execute(query, (batch_id, ok))
            first = next(results, None)
            if first is None and not more:
                return None
            with self._new_file(file_id) as target:
                for (line,) in [first] if first else []:
                    target.write(line.encode() + b"\n")
                for (line,) in results:
                    target.write(line.encode() + b"\n")
                for line in more:
                    target.write(line.encode() + b"\n")
        return file_id

    # Below

    def _move(self, database: sqlite3.Connection, batch_id: str, status: str, **more: Any) -> None:
        """To another status, at this time; when the batch is over, with its counts and usage as they are then."""
        row = _row(database, batch_id)
        document = {**json.loads(row["document"]), f"{status}_at": int(self._clock()), **more}
        if status not in UNFINISHED:
            document |= _counted(database, batch_id)
        update = "UPDATE batches SET status = ?, document = ? WHERE id = ?"
        database.execute(update, (status, json.dumps(document), batch_id))

    def _register(
        self, database: sqlite3.Connection, file_id: str, filename: str, purpose: str, expires_at: int | None
    ) -> None:
        size, position = self._path(file_id).stat().st_size, _next_position(database, "files")
        values = (file_id, position, size, int(self._clock()), filename, purpose, expires_at)
        database.execute("INSERT INTO files VALUES (?, ?, ?, ?, ?, ?, ?)", values)

    def _path(self, file_id: str) -> Path:
        return self.folder / "files" / file_id

    @contextlib.contextmanager
    def _new_file(self, file_id: str) -> Iterator[BinaryIO]:
        """A file that appears whole under its name, or not at all."""
        unfinished = self._path(f".{file_id}")
        descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            unfinished.rename(self._path(file_id))
        finally:
            unfinished.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """A connection in one transaction, which is written at the end and undone by an exception."""
        with contextlib.closing(self._connection()) as database:
            database.execute("BEGIN IMMEDIATE")
            yield database
            database.execute("COMMIT")

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """A connection that sees one state of the store; it waits for no writer and none for it."""
        with contextlib.closing(self._connection()) as database:
            database.execute("BEGIN")
            yield database

    def _connection(self) -> sqlite3.Connection:
        path = self.folder / "batches.db"
        if not path.exists():
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            (self.folder / "files").mkdir(mode=0o700, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        database = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None)
        database.row_factory = sqlite3.Row
        database.execute("PRAGMA synchronous = NORMAL")
        if not database.execute("PRAGMA user_version").fetchone()[0]:
            database.execute("PRAGMA journal_mode = WAL")
            database.executescript(_SCHEMA)
        return database


def _row(database: sqlite3.Connection, batch_id: str) -> sqlite3.Row:
    row: sqlite3.Row | None = database.execute("SELECT * FROM batches WHERE id = ?", (batch_id,)).fetchone()
    if row is None:
        raise StoreError(404, f"there is no batch {batch_id!r}", "batch_id")
    return row


def _next_position(database: sqlite3.Connection, table: str) -> int:
    (position,) = database.execute(f"SELECT coalesce(max(position), 0) + 1 FROM {table}").fetchone()
    return int(position)


def _page(
    database: sqlite3.Connection, table: str, where: str, values: list[Any], after: str | None, limit: int, newest: bool
) -> list[sqlite3.Row]:
    if after is not None:
        compare = "<" if newest else ">"
        where += (" AND " if where else "WHERE ") + f"position {compare} (SELECT position FROM {table} WHERE id = ?)"
        values = [*values, after]
    order = "DESC" if newest else "ASC"
    query = f"SELECT * FROM {table} {where} ORDER BY position {order} LIMIT ?"
    return database.execute(query, (*values, limit + 1)).fetchall()


def _file(row: sqlite3.Row) -> dict[str, Any]:
    known = {key: row[key] for key in ("id", "bytes", "created_at", "filename", "purpose", "expires_at")}
    return {**known, "object": "file", "status": "processed"}


def _batch(database: sqlite3.Connection, row: sqlite3.Row) -> dict[str, Any]:
    document = {**json.loads(row["document"]), "status": row["status"]}
    return document if "request_counts" in document else {**document, **_counted(database, row["id"])}


def _counted(database: sqlite3.Connection, batch_id: str) -> dict[str, Any]:
    query = (
        "SELECT count(*), coalesce(sum(ok), 0), coalesce(sum(1 - ok), 0), coalesce(sum(prompt_tokens), 0),"
        " coalesce(sum(output_tokens), 0) FROM lines WHERE batch = ?"
    )
    total, completed, failed, prompt, output = database.execute(query, (batch_id,)).fetchone()
    usage = {
        "input_tokens": prompt, "input_tokens_details": {"cached_tokens": 0}, "output_tokens": output,
        "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": prompt + output,
    }  # fmt: skip
    return {"request_counts": {"total": total, "completed": completed, "failed": failed}, "usage": usage}


def _errors(errors: list[LineError]) -> dict[str, Any]:
    return {"object": "list", "data": [error.as_dict() for error in errors]}
