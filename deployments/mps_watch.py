"""MPS as the exporter shows it, worked out at every scrape from /proc, NVML and what the keeper has seen: the daemon is
never asked, because each command costs a process and lines in its log."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from typing import Protocol

from deployments.mps import MpsDaemon
from monitoring.exposition import MpsView
from monitoring.sampler import ReadingError

logger = logging.getLogger(__name__)


class Keeper(Protocol):
    """Who owns the daemon, which another may replace, and has counted the faults."""

    daemon: MpsDaemon
    faults: int


class MpsWatch:
    """`clients` yields the processes that are MPS clients now."""

    def __init__(self, keeper: Keeper, clients: Callable[[], Collection[int]]) -> None:
        self._keeper = keeper
        self._clients = clients

    def view(self) -> MpsView:
        up = self._keeper.daemon.alive()
        return MpsView(wanted=True, up=up, clients=self._count_clients(), faults=self._keeper.faults)

    def _count_clients(self) -> int:
        """None that is known of, where NVML does not answer: the rest of the scrape must not be lost with it."""
        try:
            return len(self._clients())
        except ReadingError as error:
            logger.warning("the MPS clients cannot be counted: %s", error)
            return 0
