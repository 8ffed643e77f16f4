"""The places of a node's replicas: who may start where, how long after a death, and when a crash loop ends the trying.

Serve replaces a dead replica at once and for ever, under a new name; a place is what its lives have in common. Pure:
the clock and the question whether a process lives are passed in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from balancer.board import Owner

_ASK_AGAIN_S = 0.5


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """`deaths` in a row, each within `within_s` of having been ready (or before that), are a crash loop.

    The wait before a restart doubles from `first_wait_s` with each such death; after a longer life there is none.
    """

    deaths: int = 3
    within_s: float = 120.0
    first_wait_s: float = 1.0
    longest_wait_s: float = 30.0

    def wait_s(self, early_deaths: int) -> float:
        return min(self.longest_wait_s, self.first_wait_s * 2 ** (early_deaths - 1)) if early_deaths else 0.0


@dataclass(frozen=True, slots=True)
class Leave:
    """What a replica that asks to start is told: its `place`, or to ask again in `ask_again_s`, or never to start."""

    place: int | None = None
    ask_again_s: float = 0.0
    refusal: str = ""


@dataclass(slots=True)
class _Place:
    replica_id: str = ""
    process: Owner | None = None
    ready_s: float | None = None
    ended_s: float | None = None
    planned: bool = False
    early_deaths: int = 0
    not_before_s: float = 0.0


class Places:
    """`count` places, each held by one replica at a time."""

    def __init__(self, count: int, policy: RestartPolicy, alive: Callable[[Owner], bool] = Owner.alive) -> None:
        self._places = [_Place() for _ in range(count)]
        self._policy = policy
        self._alive = alive

    def ask(self, replica_id: str, process: Owner, now_s: float) -> Leave:
        """May this replica start? The same replica may ask as often as it likes."""
        index = self._of(replica_id)
        if index is None:
            index = self._vacant()
            if index is None:
                return Leave(ask_again_s=_ASK_AGAIN_S)
            self._take(self._places[index], replica_id, process, now_s)
        place = self._places[index]
        if self._looping(place):
            return Leave(refusal=self._refusal(index))
        if now_s < place.not_before_s:
            return Leave(ask_again_s=place.not_before_s - now_s)
        return Leave(index)

    def ready(self, replica_id: str, now_s: float) -> None:
        """It serves: from now on its life is measured."""
        index = self._of(replica_id)
        if index is not None:
            self._places[index].ready_s = now_s

    def ended(self, replica_id: str, planned: bool, now_s: float) -> None:
        """It has lost its engine, or gave it up as `planned`; its place is free although its process may live on."""
        index = self._of(replica_id)
        if index is not None:
            self._places[index].ended_s, self._places[index].planned = now_s, planned

    def all_given_up(self) -> bool:
        """Whether every place is in a crash loop: nothing is left that could serve."""
        return all(map(self._looping, self._places))

    def starting(self) -> list[int]:
        """Places whose replica is not ready yet and has neither ended nor been given up."""
        waiting = [i for i, place in enumerate(self._places) if self._held(place) and place.ready_s is None]
        return [i for i in waiting if not self._looping(self._places[i])]

    def processes(self) -> dict[int, Owner]:
        """The replica processes that live, by place."""
        return {i: p.process for i, p in enumerate(self._places) if p.process is not None and self._alive(p.process)}

    def _of(self, replica_id: str) -> int | None:
        return next((i for i, place in enumerate(self._places) if place.replica_id == replica_id), None)

    def _vacant(self) -> int | None:
        """A place never used, else one whose replica has ended, the least unlucky first."""
        free = [(bool(p.replica_id), p.early_deaths, i) for i, p in enumerate(self._places) if not self._held(p)]
        return min(free)[-1] if free else None

    def _held(self, place: _Place) -> bool:
        return place.ended_s is None and place.process is not None and self._alive(place.process)

    def _take(self, place: _Place, replica_id: str, process: Owner, now_s: float) -> None:
        early_deaths = self._early_deaths(place, now_s) if place.replica_id else 0
        place.replica_id, place.process = replica_id, process
        place.ready_s = place.ended_s = None
        place.planned, place.early_deaths = False, early_deaths
        place.not_before_s = now_s + self._policy.wait_s(early_deaths)

    def _early_deaths(self, place: _Place, now_s: float) -> int:
        ended_s = now_s if place.ended_s is None else place.ended_s
        long_life = place.ready_s is not None and ended_s - place.ready_s >= self._policy.within_s
        return 0 if place.planned or long_life else place.early_deaths + 1

    def _looping(self, place: _Place) -> bool:
        return place.early_deaths >= self._policy.deaths

    def _refusal(self, index: int) -> str:
        return (
            f"its last {self._policy.deaths} starts (place {index + 1} of {len(self._places)}) each ended within"
            f" {self._policy.within_s:.0f} s of being ready or before, so it is not started again: mend what the"
            " messages above say, then start the system anew"
        )
