"""A replica's slot on the board, kept true: at every request, at every engine step, and ten times a second anyway."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from balancer import stopping
from balancer.board import Board, SlotFields, SlotWriter
from balancer.kv_peak import expected_remaining, peak_tokens
from balancer.ledger import End, Page
from balancer.readings import NO_SLOT, ReplicaState, Snapshot
from balancer.ticket import Ticket

HEARTBEAT_S = 0.1
# How old the expected peak of the KV cache may be when an answer has ended, seen at the next step; otherwise as old as
# a heartbeat. Working it out takes about 0.1 ms with a full batch.
PEAK_EVERY_S = 0.02
# One step in eight moves the published step time: steady enough to compare replicas, quick enough to see a change.
_STEP_SMOOTHING = 0.125


class Slot:
    """Everything the balancer knows of this replica passes through here; used from one event loop only.

    `cpu_clock` tells the CPU seconds of the thread that calls it.
    """

    def __init__(
        self, path: Path, replica_id: str, gpu: int, clock: Callable[[], float],
        cpu_clock: Callable[[], float] = time.thread_time,
    ) -> None:  # fmt: skip
        self._path = path
        self._replica_id = replica_id
        self._clock = clock
        self._cpu_clock = cpu_clock
        self._board = Board.open(path)
        self._writer: SlotWriter = self._board.claim_slot(replica_id)
        self._page = Page.of_replica(path)
        self._step_began_s: float | None = None
        self._overdue: list[Callable[[], None]] = []
        self._ends_at_s: float | None = None
        self._peak_at_s = clock()
        self._peak_is_old = False
        self.last_step_s = clock()
        self._requests: dict[int, tuple[Ticket, int]] = {}
        self._numbers = itertools.count()
        self.fields.gpu = gpu
        self.publish()

    @property
    def index(self) -> int:
        return self._writer.index

    @property
    def fields(self) -> SlotFields:
        return self._writer.fields

    def neighbours(self) -> Snapshot:
        """The board as it is now: this replica and all others."""
        return self._board.snapshot(self._clock())

    def publish(self) -> None:
        self.fields.front_end_cpu_s_total = self._cpu_clock()
        self._writer.publish(self._clock())

    def set_state(self, state: ReplicaState) -> None:
        self.fields.state = state
        self.publish()

    def received(self, ticket: Ticket) -> int:
        """A request has come in; the number it goes by until it is finished.

        One that the router turned away is counted in the ledger alone: taken for an answer, it would teach that answers
        are short, and that the queue drains fast.
        """
        self.fields.received_total += ticket.served
        self.fields.in_flight_requests += ticket.sequences
        self.fields.in_flight_tokens += ticket.tokens
        self.fields.kv_tokens_peak += ticket.tokens + ticket.sequences * self._rounding
        number = next(self._numbers)
        self._requests[number] = ticket, self.fields.engine_steps_total
        if self.is_foreign(ticket):
            self._page.redirected()
        elif ticket.row >= 0:
            self._writer.received_by_router[ticket.row] += 1
        if not ticket.probe:
            self._page.enter(direct=not ticket.routed)
        self.publish()
        return number

    def finished(self, number: int, end: End = End.COMPLETED, engine_failed: bool = False) -> None:
        """A request has been answered, refused or abandoned: every `received` is followed by exactly one of these.

        A client error says nothing about the engine; neither does what a probe was told.
        """
        ticket, _ = self._requests.pop(number)
        fields = self.fields
        fields.finished_total += ticket.served
        fields.in_flight_requests -= ticket.sequences
        if end is End.COMPLETED:
            fields.ending_requests = max(0, fields.ending_requests - ticket.sequences)
        fields.ending_requests = min(fields.ending_requests, fields.in_flight_requests)
        fields.in_flight_tokens -= ticket.tokens
        self._peak_is_old = True
        if engine_failed:
            fields.server_errors_total += 1
            fields.server_errors_in_a_row += 1
        elif end is End.COMPLETED and not ticket.probe:
            fields.server_errors_in_a_row = 0
        if not ticket.probe:
            self._page.end(end)
        if not self._requests:
            self._engine_is_empty()
        self.publish()

    def answered(self, ticket: Ticket, output_tokens: int) -> None:
        """An answer came to its end with these tokens; the next publication tells how well that was predicted."""
        self.fields.predicted_tokens_total += ticket.output_tokens
        self.fields.answered_tokens_total += output_tokens
        self.fields.estimate_error_tokens_total += abs(ticket.output_tokens - output_tokens)

    def turned_away(self) -> None:
        """A request without a ticket was refused."""
        self._page.enter(direct=True)
        self._page.end(End.REJECTED)

    def is_foreign(self, ticket: Ticket) -> bool:
        """Whether the router chose another replica, to which HAProxy could not connect."""
        return ticket.slot not in (NO_SLOT, self.index)

    def await_engine(self, requests: int) -> None:
        """So many more (or fewer) requests wait for the engine's next word; the next heartbeat tells."""
        self.fields.awaiting_requests += requests

    @property
    def stopping(self) -> bool:
        """Whether the whole system is about to stop (at most a heartbeat old)."""
        return self._ends_at_s is not None

    def on_overdue(self, call: Callable[[], None]) -> None:
        """Have `call` called when the system stops and the grace period is over."""
        self._overdue.append(call)

    def engine_ready(self, blocks: int, block_tokens: int, max_running_requests: int) -> None:
        """What the engine found room for."""
        self.fields.kv_blocks_total = blocks
        self.fields.kv_block_tokens = block_tokens
        self.fields.max_running_requests = max_running_requests
        self.publish()

    def forget_warm_up(self) -> None:
        """Start counting at the first real request."""
        fields = self.fields
        fields.step_time_s, self._step_began_s = 0.0, None
        fields.prompt_tokens_total = fields.output_tokens_total = fields.preemptions_total = 0

    def step(
        self, running: int, waiting: int, kv_ratio: float, prompt: int, output: int, preempted: int, ended: int
    ) -> None:
        """One engine step, as vLLM's statistics tell it; `ended` sequences came to their end in it.

        Of steps with more than 128 outputs vLLM sends the first before it tells of the step; then `ending_requests` may
        for a moment count as many that have yet to reach the engine.
        """
        fields = self.fields
        fields.running_requests = running
        fields.waiting_requests = waiting
        fields.kv_blocks_used = round(kv_ratio * fields.kv_blocks_total)
        fields.prompt_tokens_total += prompt
        fields.output_tokens_total += output
        fields.preemptions_total += preempted
        # No more than the engine does not have: some were given up by their clients, and some have yet to reach it.
        gone = fields.in_flight_requests - running - waiting
        fields.ending_requests = max(0, min(fields.ending_requests + ended, gone))
        self._measure_step(busy=running > 0)
        fields.engine_steps_total += 1
        if self._peak_is_old and self.last_step_s - self._peak_at_s >= PEAK_EVERY_S:
            self._expect_peak()
        self.publish()

    async def beat(self) -> None:
        """Publish ten times a second, so that silence means a dead or stuck replica; follow a board made anew."""
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            if self._board.replaced():
                self._move()
            self._expect_peak()
            self.publish()
            self._look_for_the_end()

    def _expect_peak(self) -> None:
        growths = itertools.chain.from_iterable(map(self._growth, self._requests.values()))
        self.fields.kv_tokens_peak = peak_tokens(growths)
        self._peak_at_s, self._peak_is_old = self._clock(), False

    def _look_for_the_end(self) -> None:
        self._ends_at_s = stopping.asked(self._path)
        if self._ends_at_s is not None and self._clock() >= self._ends_at_s:
            for call in self._overdue:
                call()

    def _engine_is_empty(self) -> None:
        """An engine whose last request was aborted makes no further step that would tell."""
        fields = self.fields
        fields.running_requests = fields.waiting_requests = fields.ending_requests = 0
        fields.kv_blocks_used = fields.kv_tokens_peak = 0

    def _growth(self, request: tuple[Ticket, int]) -> list[tuple[int, int]]:
        """Tokens that each sequence of a request will still make, and holds now: it makes one at each engine step since
        it came. Sequences share the prompt, or have one each: either way each holds its part of `tokens`."""
        ticket, came = request
        made, sequences = self.fields.engine_steps_total - came, max(1, ticket.sequences)
        output, prompt = ticket.output_tokens // sequences, (ticket.tokens - ticket.output_tokens) // sequences
        return [(expected_remaining(output, made), prompt + made + self._rounding)] * sequences

    @property
    def _rounding(self) -> int:
        """Tokens lost to a sequence's last block, half of one on average: 8 on a GPU, but 64 on vLLM's CPU backend."""
        return self.fields.kv_block_tokens // 2

    def close(self) -> None:
        self._writer.release()
        self._board.leave()
        self._page.leave()

    def _measure_step(self, busy: bool) -> None:
        now_s = self.last_step_s = self._clock()
        if self._step_began_s is not None:
            taken_s = now_s - self._step_began_s
            old_s = self.fields.step_time_s or taken_s
            self.fields.step_time_s = old_s + _STEP_SMOOTHING * (taken_s - old_s)
        self._step_began_s = now_s if busy else None

    def _move(self) -> None:
        board = Board.open(self._path)
        writer = board.claim_slot(self._replica_id)
        writer.fields, writer.received_by_router = self._writer.fields, self._writer.received_by_router
        self._board.close()
        self._board, self._writer = board, writer


def stat_logger(slot: Slot) -> Any:
    """A vLLM stat logger factory whose loggers write engine steps into `slot`."""
    from vllm.v1.metrics.loggers import StatLoggerBase

    class SlotLogger(StatLoggerBase):  # type: ignore[misc]  # vLLM's are not followed
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            self._config = vllm_config

        def record(
            self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
        ) -> None:
            if scheduler_stats is None:
                return
            done = iteration_stats
            slot.step(
                running=scheduler_stats.num_running_reqs,
                waiting=scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs,
                kv_ratio=scheduler_stats.kv_cache_usage,
                prompt=done.num_prompt_tokens if done else 0,
                output=done.num_generation_tokens if done else 0,
                preempted=done.num_preempted_reqs if done else 0,
                ended=len(done.finished_requests) if done else 0,
            )

        def log_engine_initialized(self) -> None:
            cache, scheduler = self._config.cache_config, self._config.scheduler_config
            # vLLM keeps the first block for itself.
            slot.engine_ready(max(0, (cache.num_gpu_blocks or 0) - 1), cache.block_size, scheduler.max_num_seqs)

    return SlotLogger
