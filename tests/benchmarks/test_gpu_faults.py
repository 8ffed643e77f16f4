"""The fault benchmark's judgement of what clients met, and that one broken part never takes the others' rows along."""

from __future__ import annotations

import json
import threading
import time
import types
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_faults
from benchmarks.fault_system import MissedError, Setup
from benchmarks.gpu_faults import Part, Stay, break_it, longest_pause_s, summary
from benchmarks.steady_load import Met, Outcome, SteadyLoad, counts, judge

ERROR = b'{"error": {"message": "the engine died", "code": "replica_lost"}}'
CHUNK = b'data: {"choices": [{"text": "x"}]}\n\n'


@pytest.mark.parametrize(
    ("status", "body", "stream", "expected"),
    [
        (200, b"{}", False, Outcome.OK),
        (200, CHUNK + b"data: [DONE]\n\n", True, Outcome.OK),
        (200, CHUNK, True, Outcome.CUT),
        (200, CHUNK + b"data: " + ERROR + b"\n\n", True, Outcome.EXPLICIT),
        (200, CHUNK + b"data: " + ERROR + b"\n\ndata: [DONE]\n\n", True, Outcome.EXPLICIT),
        (503, ERROR, False, Outcome.EXPLICIT),
        (500, b"Internal Server Error", False, Outcome.BARE),
        (503, b'{"detail": "no"}', True, Outcome.BARE),
    ],
)
def test_an_error_counts_as_explicit_only_when_a_client_can_read_it(
    status: int, body: bytes, stream: bool, expected: Outcome
) -> None:
    """An OpenAI error body or event is explicit; a bare status, or a stream that just ends, is not."""
    assert judge(status, body, stream)[0] is expected


def test_the_longest_pause_is_between_successes() -> None:
    """Errors in between do not shorten it, and it begins with the fault."""
    met = [Met(Outcome.OK, 200, 0, end) for end in (1.0, 11.0, 12.0, 19.0)] + [Met(Outcome.EXPLICIT, 503, 0, 15.0)]
    assert longest_pause_s(met, 10.0) == 7.0
    assert longest_pause_s([], 10.0) == 0.0


class Server(ThreadingHTTPServer):
    """Answers completions until `broken`, then with an OpenAI error, or cuts the connection."""

    daemon_threads = True
    broken = ""
    answered = failed = 0

    def wait_for_answers(self, _: float = 0.0) -> None:
        """In place of a time of load: until the clients have had some answers."""
        enough, deadline = self.answered + 8, time.monotonic() + 20
        while self.answered < enough:
            assert time.monotonic() < deadline
            time.sleep(0.005)


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        wish = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.answered += 1
        self.server.failed += bool(self.server.broken)
        if self.server.broken == "cut":
            self.close_connection = True
            return
        body = ERROR if self.server.broken else CHUNK + b"data: [DONE]\n\n" if wish["stream"] else b"{}"
        self.send_response(503 if self.server.broken else 200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


class FakeSystem:
    """What `break_it` looks at, without engines: replicas are names, and the address is the little server's."""

    def __init__(self, server: Server, log: Path) -> None:
        self.server = server
        self.url = f"http://127.0.0.1:{server.server_address[1]}"
        self.setup = Setup({"replicas": 2, "served_model_name": "m"}, False, 4, 8, 8)
        self.names = {"a", "b"}
        self.log = log
        log.write_text("")

    def ids(self) -> set[str]:
        return self.names

    def replicas(self) -> list[types.SimpleNamespace]:
        return [types.SimpleNamespace(kv_blocks_total=100, kv_block_tokens=16) for _ in self.names]

    def log_says(self, pattern: str) -> int:
        return 0

    async def all_answer(self) -> bool:
        """A lost replica is back once the clients have met some errors."""
        if self.server.failed >= 8:
            self.server.broken = ""
            self.names = {"b", "c"}
        return len(self.names) == 2


@pytest.fixture
def stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server) -> Stay:
    clock = types.SimpleNamespace(monotonic=time.monotonic, sleep=server.wait_for_answers)
    monkeypatch.setattr(gpu_faults, "time", clock)
    monkeypatch.setattr("benchmarks.steady_load._PAUSE_S", 0.02)
    return Stay(tmp_path / "rows.jsonl", tmp_path, 600)


def rows(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("kind", "outcome"), [("explicit", Outcome.EXPLICIT), ("cut", Outcome.CUT)])
def test_a_part_tells_what_clients_met_and_how_long_it_took(
    server: Server, tmp_path: Path, stay: Stay, kind: str, outcome: Outcome
) -> None:
    """Before the fault all is well, during it clients meet errors, afterwards all is well, and one replica is new."""
    system = FakeSystem(server, tmp_path / "log")

    def act(_: Any) -> dict[str, Any]:
        server.broken, system.names = kind, {"b"}
        return {"acted": True}

    row = break_it(system, Part("x", act, True, False, 1), stay)  # type: ignore[arg-type]
    assert set(row["before"]["outcomes"]) == {Outcome.OK}
    assert row["during"]["outcomes"][outcome] > 0
    assert row["after"]["outcomes"][Outcome.OK] > 0
    assert (row["contained"], row["replaced"], row["hangs"], row["acted"]) == (False, 1, 0, True)
    assert row["kv_tokens"] == [1600]
    assert row["back_s"] >= row["lost_s"]


def test_a_fault_that_costs_no_replica_is_called_contained(server: Server, tmp_path: Path, stay: Stay) -> None:
    """Nothing is waited for that does not come."""
    system = FakeSystem(server, tmp_path / "log")
    row = break_it(system, Part("x", lambda _: {}, False, False, 1), stay)  # type: ignore[arg-type]
    assert (row["contained"], row["replaced"]) == (True, 0)
    assert set(row["before"]["outcomes"]) == set(row["after"]["outcomes"]) == {Outcome.OK}


def test_a_failed_part_and_a_skipped_one_are_rows_too(stay: Stay, tmp_path: Path) -> None:
    """Whatever a part raises is written, and a part that the time does not allow is not begun."""

    def fails() -> dict[str, Any]:
        raise MissedError("not ready within 5 s")

    stay.row("first", 1, fails)
    stay.row("second", 10_000, lambda: pytest.fail("begun"))
    first, second = rows(tmp_path)
    assert first["failure"] == "MissedError: not ready within 5 s"
    assert second["skipped"].endswith("10000 needed")


def test_starts_are_held_against_one_engines_start() -> None:
    """The best of the warm starts over one engine's, and how many starts were good."""
    made = summary(
        [{"ready_s": 90.0, "good": True}, {"ready_s": 60.0, "good": False}, {"failure": "x"}], {"ready_s": 40.0}
    )
    assert made == {"good_starts": 1, "ready_s": [90.0, 60.0], "best_ratio_to_one": 1.5}
    assert summary([], {})["best_ratio_to_one"] is None


def test_a_steady_load_ends_when_told(server: Server) -> None:
    """All clients have sent, streaming and not, and none is left afterwards."""
    before = threading.active_count()
    with SteadyLoad(f"http://127.0.0.1:{server.server_address[1]}", "m", 4, 8, 8) as load:
        deadline = time.monotonic() + 20
        while len(load.met) < 20:
            assert time.monotonic() < deadline
            time.sleep(0.005)
    assert counts(load.met)["outcomes"] == {Outcome.OK: len(load.met)}
    assert not load._thread.is_alive()
    assert threading.active_count() <= before + 4  # the little server's own threads end with their connections
