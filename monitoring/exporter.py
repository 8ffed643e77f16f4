"""One Prometheus endpoint for each node: reads the board when it is asked."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest

from balancer import ledger
from balancer.board import REPLICA_SLOTS, Board
from balancer.counters import CountersReader
from balancer.readings import ReplicaReading, Snapshot
from monitoring.exposition import MpsView, NodeView, SharedWeights, render
from monitoring.lives import LifeWatch

ADDRESS = "127.0.0.1"
PORT = 9410
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Exporter:
    """Serves one node's metrics on `/metrics`, and with them what others register on `registry`.

    `mps` and `weights` are asked at every scrape, so they must answer at once, from what is known.
    `slots` is how many slots are shown even when empty: the replicas configured, and room for their successors.
    """

    def __init__(
        self,
        board: Path,
        desired: int,
        *,
        slots: int = REPLICA_SLOTS,
        gpus: tuple[int, ...] = (0,),
        mps: Callable[[], MpsView] = MpsView,
        weights: Callable[[], Sequence[SharedWeights]] = tuple,
        clock: Callable[[], float] = time.monotonic,
        registry: CollectorRegistry | None = None,
    ) -> None:
        self.registry = registry or CollectorRegistry()
        self._path = board
        self._desired = desired
        self._slots = tuple(range(slots))
        self._gpus = gpus
        self._mps = mps
        self._weights = weights
        self._clock = clock
        self._board: Board | None = None
        self._last: dict[int, ReplicaReading] = {}
        self._counters = CountersReader(board)
        self._watch = LifeWatch()
        self._turn = threading.Lock()
        self._server: ThreadingHTTPServer | None = None

    def look(self) -> NodeView:
        """What there is to see now. Calling it more often than Prometheus does makes start and load times finer."""
        with self._turn:
            snapshot, copies = self._snapshot(), self._weights()
            return NodeView(
                snapshot or Snapshot(self._clock(), ()),
                self._counters.read(),
                dict(self._watch.look(snapshot)) if snapshot else {},
                self._mps(),
                self._desired,
                snapshot is not None,
                self._slots,
                self._gpus,
                ledger.read(self._path),
                {copy.gpu: copy.size_bytes for copy in copies},
                self._mapped(copies),
            )

    def scrape(self) -> bytes:
        """What `/metrics` answers."""
        return render(self.look()).encode() + generate_latest(self.registry)

    def start(self, port: int = PORT, address: str = ADDRESS) -> int:
        """Serve until `close`; the port in use (0 asks for a free one). Raises OSError when it is taken."""
        self._server = ThreadingHTTPServer((address, port), _handler(self.scrape))
        threading.Thread(target=self._server.serve_forever, args=(0.1,), name="exporter", daemon=True).start()
        return int(self._server.server_address[1])

    def close(self) -> None:
        """Closing twice does nothing."""
        server, self._server = self._server, None
        if server:
            server.shutdown()
            server.server_close()
        with self._turn:
            if self._board:
                self._board.close()
            self._board = None

    def _snapshot(self) -> Snapshot | None:
        """None while there is no board: to open one would make it."""
        if self._board and self._board.replaced():
            self._board.close()
            self._board = None
        if self._board is None and self._path.exists():
            self._board = Board.open(self._path)
        return self._mended(self._board.snapshot(self._clock())) if self._board else None

    def _mapped(self, copies: Sequence[SharedWeights]) -> dict[int, int]:
        """The weights that each slot's replica maps; slots whose replica has its own are left out."""
        sizes = {pid: copy.size_bytes for copy in copies for pid in copy.replica_pids}
        if not self._board or not sizes:
            return {}
        owners = {slot: self._board.owner(slot) for slot in self._slots}
        return {slot: sizes[owner.pid] for slot, owner in owners.items() if owner and owner.pid in sizes}

    def _mended(self, snapshot: Snapshot) -> Snapshot:
        """With the last whole reading of each torn slot: a counter that fell to 0 and came back would count twice."""
        torn = {slot: self._last[slot] for slot in snapshot.torn_slots if slot in self._last}
        self._last = {**torn, **{replica.slot: replica for replica in snapshot.replicas}}
        return replace(snapshot, replicas=tuple(self._last.values())) if torn else snapshot


def _handler(scrape: Callable[[], bytes]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 10.0

        def do_GET(self) -> None:
            found = self.path.partition("?")[0] in ("/metrics", "/")
            body = scrape() if found else b"only /metrics is served here\n"
            self.send_response(200 if found else 404)
            self.send_header("Content-Type", CONTENT_TYPE if found else "text/plain")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Scrapes are no news."""

    return Handler
