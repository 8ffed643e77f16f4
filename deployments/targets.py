"""Tells Prometheus what to scrape: the exporter, every replica's own port, HAProxy. Kept true while the run lives."""

from __future__ import annotations

import platform
import re
import time
from pathlib import Path

from balancer.board import Board, BoardError
from balancer.haproxy_view import server_name
from balancer.readings import ReplicaReading
from monitoring import discovery
from monitoring.discovery import ReplicaTarget, TargetGroup

_SERVER = re.compile(r"^\s*server (\S+) (\S+:\d+)", re.MULTILINE)


class Targets:
    """The run's file of scrape targets; `update` writes it when they changed, `remove` takes it away."""

    def __init__(
        self, run_id: str, board: Path, folder: Path, exporter_port: int | None, haproxy_port: int | None
    ) -> None:
        self._file = discovery.targets_file(run_id)
        self._board = board
        self._folder = folder
        self._exporter_port = exporter_port
        self._haproxy_port = haproxy_port
        self._written: list[TargetGroup] = []

    def update(self) -> None:
        """Raises OSError when the folder for such files belongs to somebody else."""
        if self._exporter_port is None:
            return
        haproxy = f"127.0.0.1:{self._haproxy_port}" if self._haproxy_port else None
        exporter = f"127.0.0.1:{self._exporter_port}"
        found = discovery.groups(platform.node(), exporter, self._replicas(), haproxy)
        if found != self._written:
            discovery.write(self._file, found)
            self._written = found

    def remove(self) -> None:
        discovery.remove(self._file)

    def _replicas(self) -> list[ReplicaTarget]:
        """Those that HAProxy's configuration gives an address; Serve's own proxy reaches replicas without one."""
        texts = [path.read_text() for path in self._folder.glob("*/haproxy.cfg")]
        addresses = {name: address for text in texts for name, address in _SERVER.findall(text)}
        named = [(reading, addresses.get(server_name(reading.replica_id))) for reading in self._readings()]
        return [ReplicaTarget.of(reading, address) for reading, address in named if address]

    def _readings(self) -> list[ReplicaReading]:
        if not self._board.exists():
            return []
        try:
            board = Board.open(self._board)
        except BoardError:
            return []
        readings = list(board.snapshot(time.monotonic()).replicas)
        board.close()
        return readings
