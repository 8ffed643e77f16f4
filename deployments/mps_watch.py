"""MPS as the exporter shows it, worked out at every scrape from /proc, NVML and the logs: the daemon is never asked,
because each command costs a process and lines in its log."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection

from deployments.mps import MpsDaemon
from monitoring.exposition import MpsView
from monitoring.sampler import ReadingError

logger = logging.getLogger(__name__)


class MpsWatch:
    """`clients` yields the processes that are MPS clients now."""

    def __init__(self, daemon: MpsDaemon, clients: Callable[[], Collection[int]]) -> None:
        self._daemon = daemon
        self._clients = clients
        self._logged_bytes = -1
        self._last_fault = ""
        self._faults = 0

    def view(self) -> MpsView:
        self._count_faults()
        return MpsView(wanted=True, up=self._daemon.alive(), clients=self._count_clients(), faults=self._faults)

    def _count_clients(self) -> int:
        """None that is known of, where NVML does not answer: the rest of the scrape must not be lost with it."""
        try:
            return len(self._clients())
        except ReadingError as error:
            logger.warning("the MPS clients cannot be counted: %s", error)
            return 0

    def _count_faults(self) -> None:
        """Two faults between two scrapes count as one: the log is parsed for its last only, and only when it grew."""
        logged_bytes = sum(log.stat().st_size for log in self._daemon.paths.log.glob("*.log"))
        if logged_bytes == self._logged_bytes:
            return
        self._logged_bytes = logged_bytes
        fault = self._daemon.recent_fault()
        if fault and fault.at != self._last_fault:
            self._last_fault = fault.at
            self._faults += 1
