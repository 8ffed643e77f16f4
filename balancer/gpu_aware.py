"""The policy `gpu_aware`: among the active replicas whose KV cache and batch have room, the shortest predicted wait.

It works on views, one for each replica, that keep what a decision needs of a reading and what was assigned since that
snapshot was taken. A view is loaded anew only when its replica wrote, so that 64 replicas cost microseconds.
"""

from __future__ import annotations

import math
import random
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from balancer.active_set import ActiveSet, Demand, is_news
from balancer.knobs import Knobs
from balancer.kv_peak import rounding_scatter_tokens
from balancer.readings import Decision, GpuReading, ReplicaReading, ReplicaState, RequestCost, Snapshot, assign
from balancer.selection import kv_tokens_committed

# A fingerprint vouches for this much of a prompt (1,024 characters of about four to a token): what it saves at least.
FINGERPRINT_TOKENS = 256
# Prefixes and sessions remembered; an entry is about 200 bytes.
MEMORY_ENTRIES = 8192
# New requests are let in again once this much more than the reserve is free, or every freed block would flip the gate.
RECOVERY_RATIO = 1.1
# With so many requests in flight, what they are expected to need says what the next ones will.
ENOUGH_REQUESTS = 16
# How often unchanged readings are looked through for stale ones: far more often than `stale_after_s`.
SWEEP_S = 0.05
# How often the active sets are thought over while demand does not jump: about as often as a step ends.
RESIZE_S = 0.005
# How fast the mean size of a request follows: it is a mean of about the last 50.
MEAN_BLEND = 0.02


class GpuGroup:
    """The replicas of one GPU: which are ready, how many are active, and whether its memory allows more work."""

    def __init__(self, knobs: Knobs) -> None:
        self.active_set = ActiveSet(knobs)
        self.ready: list[View] = []
        self.active: list[View] = []
        self.requests = 0
        self.short_of_memory = False
        self.sequence_s = self.active_set.model.sequence_s
        self.prompt_s = self.active_set.model.prompt_s
        self.mean_tokens = float(knobs.default_output_tokens)

    def sample(self, now_s: float, gpu: GpuReading | None) -> None:
        """Let the active set see the replicas' counters, when it is time."""
        if self.active_set.due(now_s):
            self.active_set.sample(now_s, [v.reading for v in self.ready], gpu)
            self.sequence_s, self.prompt_s = self.active_set.model.sequence_s, self.active_set.model.prompt_s

    def check_memory(self, gpu: GpuReading | None, now_s: float, stale_after_s: float) -> bool:
        """Follow a fresh reading, and let in where there is none; True when the gate moved."""
        before = self.short_of_memory
        self.short_of_memory = False
        if gpu is not None and now_s - gpu.taken_at_s <= stale_after_s:
            needed = gpu.memory_reserve_bytes * (RECOVERY_RATIO if before else 1.0)
            self.short_of_memory = gpu.memory_free_bytes < needed
        return self.short_of_memory is not before

    def resize(self, now_s: float, waiting: float, arriving: float) -> bool:
        """Follow the demand; True when other replicas are active than before."""
        size = 0
        if self.ready:
            demand = Demand(self.requests + waiting + arriving, waiting, *self._room())
            size = self.active_set.resize(now_s, demand, len(self.ready))
        if size == len(self.active):
            return False
        self.active = self.ready[:size]
        return True

    def _room(self) -> tuple[float, float]:
        """The most requests that an active replica has, and how many of the present kind one could have."""
        first = self.ready[0]
        requests, tokens = sum([v.requests for v in self.active]), sum([v.tokens for v in self.active])
        each = tokens / requests if requests >= ENOUGH_REQUESTS else self.mean_tokens
        room = min(first.max_requests, first.max_tokens / max(1.0, each))
        return max([v.requests for v in self.active], default=0), room

    def count(self, cost: RequestCost) -> None:
        each = cost.tokens / max(1, cost.sequences)
        self.mean_tokens = max(1.0, self.mean_tokens + MEAN_BLEND * (each - self.mean_tokens))


class View:
    """One replica as the policy sees it. `requests` and `tokens` include what was assigned on this snapshot."""

    __slots__ = (
        "group", "kv_ratio", "leaving_tokens", "max_requests", "max_tokens", "prompts", "reading", "requests", "slot",
        "tokens", "wait_s",
    )  # fmt: skip

    def __init__(self, reading: ReplicaReading, group: GpuGroup, reserve_ratio: float) -> None:
        self.slot = reading.slot
        self.group = group
        self.kv_ratio = 1.0 - reserve_ratio
        self.requests = 0
        self.load(reading)

    def load(self, reading: ReplicaReading) -> None:
        self.reading = reading
        # A replica that is seen before its engine has started does not know them yet.
        self.max_requests = reading.max_running_requests or 1 << 30
        total, block = reading.kv_tokens_total, reading.kv_block_tokens
        scatter = rounding_scatter_tokens(total, block, self.group.mean_tokens)
        self.max_tokens = int(total * self.kv_ratio - scatter) or 1 << 60
        requests = reading.engine_requests
        self.group.requests += requests - self.requests
        self.requests = requests
        self.tokens = kv_tokens_committed(reading)
        # A mean share: right for what a step takes. What is promised stays promised until the answers' ends are told.
        self.leaving_tokens = self.tokens * reading.ending_requests / max(1, reading.assigned_requests)
        self.prompts = reading.waiting_requests + reading.on_the_way_requests
        self._predict()

    def take(self, cost: RequestCost) -> None:
        self.requests += cost.sequences
        self.group.requests += cost.sequences
        self.tokens += cost.tokens
        self.prompts += cost.sequences
        self._predict()

    def _predict(self) -> None:
        """Seconds until a first token: prompts ahead of this one, then a step as long as batch and KV make it."""
        group = self.group
        mean = group.mean_tokens
        read = (self.tokens - self.leaving_tokens) / mean
        self.wait_s = (self.requests + read) * group.sequence_s + self.prompts * mean * group.prompt_s


@dataclass(frozen=True, slots=True)
class Home:
    """Where a prefix or a session was last sent, and how many tokens its cache there may still hold."""

    slot: int
    replica_id: str
    tokens: int


class GpuAware:
    """Deterministic but for ties. `refresh` shows it the world, `place` assigns and accounts for what it assigned."""

    name = "gpu_aware"

    def __init__(self, knobs: Knobs, rng: random.Random) -> None:
        self.knobs = knobs
        self._rng = rng
        self._views: dict[int, View] = {}
        self._in_order: list[View] = []
        self._groups: dict[int, GpuGroup] = {}
        self._homes: OrderedDict[int | str, Home] = OrderedDict()
        self._snapshot: Snapshot | None = None
        self._swept_s = -math.inf
        self._resized_s = -math.inf
        self._requests = 0
        self._gpus: dict[int, GpuReading] = {}
        self._gpus_seen: tuple[GpuReading, ...] = ()
        self._touched: list[View] = []
        self.candidates: list[View] = []

    def reconfigure(self, knobs: Knobs) -> None:
        """Take new knobs; what was learned of step times, prefixes and sessions stays."""
        self.knobs = knobs
        self._views.clear()
        self._snapshot = None
        for group in self._groups.values():
            group.active_set.knobs = knobs
            group.requests = 0

    @property
    def active(self) -> tuple[int, ...]:
        """Slots that receive new work now, in order."""
        return tuple(sorted(v.slot for v in self.candidates))

    @property
    def any_ready(self) -> bool:
        return any(group.ready for group in self._groups.values())

    def refresh(self, snapshot: Snapshot, waiting: int = 0, arriving: int = 0) -> None:
        """Take in a snapshot; `waiting` requests found no place, `arriving` ones were not yet looked at.

        The same snapshot again changes nothing.
        """
        before = self._snapshot
        if snapshot is before:
            return
        self._snapshot = snapshot
        for view in self._touched:
            view.load(view.reading)
        self._touched.clear()
        if before is None or snapshot.now_s - self._swept_s >= SWEEP_S or not self._update(before, snapshot):
            self._rebuild(snapshot)
            changed = True
        else:
            changed = False
        if changed or snapshot.gpus is not self._gpus_seen:
            changed |= self._check_memory(snapshot)
        self._resize(snapshot, waiting, arriving, changed)

    def _check_memory(self, snapshot: Snapshot) -> bool:
        """Take in new GPU readings; True when a GPU's gate moved."""
        self._gpus_seen = snapshot.gpus
        self._gpus = {gpu.index: gpu for gpu in snapshot.gpus}
        stale_after_s = self.knobs.stale_after_s
        moved = [g.check_memory(self._gpus.get(i), snapshot.now_s, stale_after_s) for i, g in self._groups.items()]
        return any(moved)

    def _update(self, before: Snapshot, snapshot: Snapshot) -> bool:
        """Load the readings that changed; False when it takes more than that (replicas came, went or changed state)."""
        if len(before.replicas) != len(snapshot.replicas):
            return False
        for old, new, view in zip(before.replicas, snapshot.replicas, self._in_order, strict=True):
            if new is not old:
                if new.slot != old.slot or new.state is not old.state or new.replica_id != old.replica_id:
                    return False
                view.load(new)
        return True

    def _rebuild(self, snapshot: Snapshot) -> None:
        self._swept_s = snapshot.now_s
        oldest = snapshot.now_s - self.knobs.stale_after_s
        for group in self._groups.values():
            group.ready = []
            group.active = []
            group.requests = 0
        self._in_order = [self._view(reading) for reading in snapshot.replicas]
        for view in self._in_order:
            if view.reading.state is ReplicaState.READY and view.reading.written_at_s >= oldest:
                view.group.ready.append(view)

    def _view(self, reading: ReplicaReading) -> View:
        view = self._views.get(reading.slot)
        if view is None or view.reading.replica_id != reading.replica_id or view.reading.gpu != reading.gpu:
            group = self._groups.get(reading.gpu) or self._groups.setdefault(reading.gpu, GpuGroup(self.knobs))
            view = self._views[reading.slot] = View(reading, group, self.knobs.kv_reserve_ratio)
        else:
            view.requests = 0
            view.load(reading)
        return view

    def _resize(self, snapshot: Snapshot, waiting: int, arriving: int, changed: bool) -> None:
        now_s, requests = snapshot.now_s, waiting + arriving + sum([g.requests for g in self._groups.values()])
        if not changed and now_s - self._resized_s < RESIZE_S and not is_news(requests, self._requests):
            return
        self._resized_s, self._requests = now_s, requests
        groups = max(1, sum(bool(g.ready) for g in self._groups.values()))
        for index, group in self._groups.items():
            group.sample(now_s, self._gpus.get(index))
            changed |= group.resize(now_s, waiting / groups, arriving / groups)
        if changed:
            self.candidates = [v for g in self._groups.values() if not g.short_of_memory for v in g.active]

    def largest_room(self) -> int:
        """Tokens of KV cache on the emptiest active replica that has room in its batch; 0 when none has."""
        return max((v.max_tokens - v.tokens for v in self.candidates if v.requests < v.max_requests), default=0)

    def place(self, cost: RequestCost) -> Decision | None:
        """ASSIGN to the best active replica that has room, accounted for at once; None when none has."""
        tokens, sequences = cost.tokens, cost.sequences
        best, shortest = self._shortest(tokens, sequences)
        if best is None:
            return None
        reason = "shortest_wait"
        home = self._home(cost)
        if home is not None and fits(home, tokens, sequences) and self._worth(home, shortest, cost):
            best, reason = home, "affinity"
        inputs = {
            "active": float(len(self.candidates)), "requests": float(best.requests), "tokens": float(best.tokens),
            "max_tokens": float(best.max_tokens), "wait_s": best.wait_s,
        }  # fmt: skip
        self._settle(best, cost)
        return assign(best.slot, reason, inputs)

    def choose(self, cost: RequestCost, replicas: Sequence[ReplicaReading], snapshot: Snapshot) -> Decision:
        """For callers that cannot queue: when nothing fits, the replica with the most room takes the request."""
        self.refresh(snapshot)
        decision = self.place(cost)
        if decision is not None:
            return decision
        views = self.candidates or [self._views[r.slot] for r in replicas]
        best = max(views, key=lambda v: v.max_tokens - v.tokens)
        self._settle(best, cost)
        return assign(best.slot, "most_room")

    def _shortest(self, tokens: int, sequences: int) -> tuple[View | None, float]:
        shortest, best, equals = math.inf, None, 0
        for v in self.candidates:
            if v.wait_s <= shortest and fits(v, tokens, sequences):
                equals = equals + 1 if v.wait_s == shortest else 1
                # Keeping the n-th of n equals with chance 1/n draws each with the same.
                if equals == 1 or self._rng.random() * equals < 1.0:
                    shortest, best = v.wait_s, v
        return best, shortest

    def _home(self, cost: RequestCost) -> View | None:
        """The active replica where this session, or else this prefix, was last sent."""
        home = self._remembered(cost)
        view = self._views.get(home.slot) if home else None
        if home is None or view is None or view.reading.replica_id != home.replica_id or view not in self.candidates:
            return None
        return view

    def _remembered(self, cost: RequestCost) -> Home | None:
        by_session = self._homes.get(cost.session) if cost.session else None
        return by_session or (self._homes.get(cost.prefix) if self._cacheable(cost) else None)

    def _cacheable(self, cost: RequestCost) -> bool:
        """vLLM caches whole blocks: a prompt shorter than one saves nothing anywhere."""
        block_tokens = max((v.reading.kv_block_tokens for v in self.candidates), default=0)
        return cost.prefix != 0 and cost.prompt_tokens >= block_tokens

    def _worth(self, view: View, shortest_s: float, cost: RequestCost) -> bool:
        """Whether the cached tokens save more seconds than this replica's longer wait costs, within the load bound."""
        total = sum(v.requests for v in self.candidates) + cost.sequences
        bound = self.knobs.affinity_load_bound * total / len(self.candidates)
        if view.requests + cost.sequences > max(bound, cost.sequences):
            return False
        home = self._remembered(cost)
        cached = min(home.tokens, cost.prompt_tokens) if home else 0
        return view.wait_s - shortest_s <= cached * view.group.prompt_s

    def _settle(self, view: View, cost: RequestCost) -> None:
        view.group.count(cost)
        view.take(cost)
        self._touched.append(view)
        replica_id = view.reading.replica_id
        if cost.session:
            self._remember(cost.session, Home(view.slot, replica_id, cost.prompt_tokens))
        if cost.prefix:
            self._remember(cost.prefix, Home(view.slot, replica_id, FINGERPRINT_TOKENS))

    def _remember(self, key: int | str, home: Home) -> None:
        self._homes[key] = home
        self._homes.move_to_end(key)
        if len(self._homes) > MEMORY_ENTRIES:
            self._homes.popitem(last=False)


def fits(view: View, tokens: int, sequences: int) -> bool:
    """Room in the batch and in the KV cache. What no replica could ever hold is for an empty one, which will say so."""
    if view.requests == 0:
        return True
    return view.requests + sequences <= view.max_requests and view.tokens + tokens <= view.max_tokens
