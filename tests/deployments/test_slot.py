"""A replica's slot: what requests and engine steps write there, and that it survives the board's replacement."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from balancer.board import Board
from balancer.ledger import End
from balancer.readings import ReplicaReading, ReplicaState
from balancer.ticket import Ticket
from deployments import slot as slot_module
from deployments.slot import Slot

TICKET = Ticket("gpu_aware", "most_room", row=4, tokens=30)


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """Afterwards no file is left."""
    folder = tmp_path / "shm"
    folder.mkdir()
    yield folder / "board"
    assert not list(folder.iterdir())


@pytest.fixture
def slot(path: Path, clock: Clock) -> Iterator[Slot]:
    slot = Slot(path, "app#Replica#x1", 3, clock)
    yield slot
    slot.close()


def seen(path: Path) -> ReplicaReading | None:
    board = Board.open(path)
    replicas = board.snapshot(0.0).replicas
    board.close()
    return replicas[0] if replicas else None


def reading(path: Path) -> ReplicaReading:
    found = seen(path)
    assert found is not None
    return found


def test_a_new_slot_says_that_it_starts(slot: Slot, path: Path) -> None:
    """From the first moment the board shows the replica, its GPU and that it is not ready."""
    r = reading(path)
    assert (r.slot, r.replica_id, r.gpu, r.state) == (slot.index, "app#Replica#x1", 3, ReplicaState.STARTING)
    assert r.written_at_s == 100.0


def test_its_state_is_published_at_once(slot: Slot, path: Path, clock: Clock) -> None:
    """A change of state is on the board, with its time, before set_state returns."""
    clock.now_s = 101.5
    slot.set_state(ReplicaState.READY)
    assert (reading(path).state, reading(path).written_at_s) == (ReplicaState.READY, 101.5)


def test_requests_are_counted_in_and_out(slot: Slot, path: Path) -> None:
    """What came in is in flight until it is finished; the router's row keeps its own count."""
    first = slot.received(TICKET)
    second = slot.received(Ticket("proxy", "proxy"))
    r = reading(path)
    assert (r.received_total, r.in_flight_requests, r.in_flight_tokens) == (2, 2, 30)
    assert (r.received_by_router[4], sum(r.received_by_router)) == (1, 1)
    slot.finished(first)
    slot.finished(second)
    r = reading(path)
    assert (r.finished_total, r.in_flight_requests, r.in_flight_tokens) == (2, 0, 0)


def test_predictions_are_compared_with_what_came_of_them(slot: Slot, path: Path) -> None:
    """Too many and too few predicted tokens cancel in the sums, not in the error."""
    ticket = Ticket("gpu_aware", "x", 4, tokens=110, output_tokens=100)
    slot.answered(ticket, 130)
    slot.answered(ticket, 60)
    slot.publish()
    r = reading(path)
    assert (r.predicted_tokens_total, r.answered_tokens_total, r.estimate_error_tokens_total) == (200, 190, 70)


def test_engine_steps_are_published(slot: Slot, path: Path) -> None:
    """A step's queue and KV use are shown as they are, its tokens and preemptions added up."""
    slot.engine_ready(blocks=200, block_tokens=16, max_running_requests=64)
    slot.step(running=3, waiting=1, kv_ratio=0.255, prompt=100, output=3, preempted=1, ended=0)
    slot.step(running=2, waiting=0, kv_ratio=0.5, prompt=0, output=2, preempted=0, ended=0)
    r = reading(path)
    assert (r.kv_blocks_total, r.kv_block_tokens, r.max_running_requests) == (200, 16, 64)
    assert (r.running_requests, r.waiting_requests, r.kv_blocks_used, r.kv_ratio) == (2, 0, 100, 0.5)
    assert (r.prompt_tokens_total, r.output_tokens_total, r.preemptions_total) == (100, 5, 1)


def test_every_publication_tells_what_the_thread_has_used_of_the_cpu(path: Path, clock: Clock) -> None:
    """Whoever compares two readings has the cost of what lies between them, with no start-up in it."""
    used = iter([7.0, 7.5, 7.75])
    slot = Slot(path, "app#Replica#x1", 3, clock, lambda: next(used))
    assert reading(path).front_end_cpu_s_total == 7.0
    slot.step(running=1, waiting=0, kv_ratio=0.1, prompt=4, output=1, preempted=0, ended=0)
    assert reading(path).front_end_cpu_s_total == 7.5
    slot.publish()
    assert reading(path).front_end_cpu_s_total == 7.75
    slot.close()


def test_step_time_is_smoothed_over_busy_steps(slot: Slot, clock: Clock) -> None:
    """The published step time follows steps slowly, and leaves out the time in which the engine was idle."""

    def step(after_s: float, running: int = 1) -> float:
        clock.now_s += after_s
        slot.step(running, 0, 0.0, 0, 0, 0, 0)
        return slot.fields.step_time_s

    assert step(9.0) == 0.0
    assert step(0.010) == pytest.approx(0.010)
    assert step(0.018) == pytest.approx(0.011)
    assert step(0.011, running=0) == pytest.approx(0.011)
    assert step(60.0) == pytest.approx(0.011)
    assert step(0.011) == pytest.approx(0.011)


def test_the_warm_up_is_forgotten(slot: Slot, clock: Clock) -> None:
    """Counters and step time start at the first real request."""
    for _ in range(3):
        clock.now_s += 5.0
        slot.step(1, 0, 0.1, 4, 1, 1, 0)
    slot.forget_warm_up()
    fields = slot.fields
    assert (fields.prompt_tokens_total, fields.output_tokens_total, fields.preemptions_total) == (0, 0, 0)
    assert fields.step_time_s == 0.0
    clock.now_s += 60.0
    slot.step(1, 0, 0.1, 4, 1, 0, 0)
    assert slot.fields.step_time_s == 0.0


def test_closing_gives_the_slot_back(slot: Slot, path: Path) -> None:
    """A closed replica is off the board at once; its slot is the next one's."""
    second = Slot(path, "second", 0, Clock())
    index = slot.index
    second_reading = second.index
    second.close()
    assert seen(path) is not None
    third = Slot(path, "third", 0, Clock())
    assert (third.index, index) == (second_reading, 0)
    third.close()


def test_the_expected_kv_peak_falls_as_answers_are_made(
    slot: Slot, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new request counts with all of its tokens; what remains is worked out anew at the next heartbeat."""
    monkeypatch.setattr(slot_module, "HEARTBEAT_S", 0.001)
    numbers = [slot.received(Ticket("gpu_aware", "x", 4, tokens=110, output_tokens=100)) for _ in range(2)]
    assert slot.fields.kv_tokens_peak == 220
    for _ in range(60):
        slot.step(running=2, waiting=0, kv_ratio=0.0, prompt=0, output=2, preempted=0, ended=0)
    slot.finished(numbers[0])

    async def one_beat() -> None:
        task = asyncio.create_task(slot.beat())
        async with asyncio.timeout(10):
            while slot.fields.kv_tokens_peak == 220:
                await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(one_beat())
    assert slot.fields.kv_tokens_peak == 110
    slot.finished(numbers[1])


def test_an_ended_answer_gives_back_what_was_promised_to_it_within_steps(slot: Slot, clock: Clock) -> None:
    """The next step that is late enough works the peak out anew: exactly, for those that are left may be long ones."""
    short = [slot.received(Ticket("gpu_aware", "x", 4, tokens=20, output_tokens=10)) for _ in range(9)]
    long = slot.received(Ticket("gpu_aware", "x", 4, tokens=1010, output_tokens=1000))
    for number in short:
        slot.finished(number)
    assert slot.fields.kv_tokens_peak == 9 * 20 + 1010
    slot.step(running=1, waiting=0, kv_ratio=0.0, prompt=0, output=1, preempted=0, ended=0)
    assert slot.fields.kv_tokens_peak == 9 * 20 + 1010, "too early: it costs"
    clock.now_s += slot_module.PEAK_EVERY_S * 1.5
    slot.step(running=1, waiting=0, kv_ratio=0.0, prompt=0, output=1, preempted=0, ended=0)
    assert slot.fields.kv_tokens_peak == 1010
    slot.finished(long)


def test_what_the_engine_has_finished_is_ending_until_it_is_answered(slot: Slot, path: Path) -> None:
    """The board says so with the step that ended them, for their clients return before the last was answered."""
    numbers = [slot.received(TICKET) for _ in range(5)]
    slot.step(running=5, waiting=0, kv_ratio=0.1, prompt=50, output=5, preempted=0, ended=0)
    assert reading(path).ending_requests == 0
    slot.step(running=2, waiting=0, kv_ratio=0.1, prompt=0, output=5, preempted=0, ended=3)
    r = reading(path)
    assert (r.in_flight_requests, r.ending_requests, r.engine_requests) == (5, 3, 2)
    slot.finished(numbers[0])
    assert (reading(path).ending_requests, reading(path).engine_requests) == (2, 2)
    for number in numbers[1:]:
        slot.finished(number)
    assert (reading(path).ending_requests, reading(path).engine_requests) == (0, 0)


def test_no_more_are_ending_than_the_engine_does_not_have(slot: Slot, path: Path) -> None:
    """One whose client leaves after its last token is not counted as ending for ever: a later step sets it right."""
    numbers = [slot.received(TICKET) for _ in range(3)]
    slot.step(running=2, waiting=0, kv_ratio=0.1, prompt=30, output=3, preempted=0, ended=1)
    slot.finished(numbers[0], End.CANCELLED)
    assert reading(path).engine_requests == 1
    slot.step(running=2, waiting=0, kv_ratio=0.1, prompt=0, output=2, preempted=0, ended=0)
    assert (reading(path).ending_requests, reading(path).engine_requests) == (0, 2)
    late = slot.received(TICKET)
    slot.step(running=2, waiting=0, kv_ratio=0.1, prompt=0, output=2, preempted=0, ended=0)
    assert reading(path).engine_requests == 3, "one that has not reached the engine is still to be worked on"
    for number in (*numbers[1:], late):
        slot.finished(number)


def test_no_more_are_ending_than_are_in_flight(slot: Slot, path: Path) -> None:
    """Clients that leave while they are answered take their places with them, though the engine makes no more steps."""
    numbers = [slot.received(TICKET) for _ in range(5)]
    slot.step(running=0, waiting=0, kv_ratio=0.0, prompt=50, output=5, preempted=0, ended=5)
    for number in numbers[:2]:
        slot.finished(number, End.CANCELLED)
    assert (reading(path).in_flight_requests, reading(path).engine_requests) == (3, 0)
    for number in numbers[2:]:
        slot.finished(number)


def test_it_beats_and_moves_to_a_board_made_anew(
    slot: Slot, path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the board was removed or made anew, the next heartbeat carries slot and counters over to the new one."""
    monkeypatch.setattr(slot_module, "HEARTBEAT_S", 0.001)
    slot.set_state(ReplicaState.READY)
    number = slot.received(TICKET)
    path.unlink()
    other = Board.open(path)
    taken = other.claim_slot("came first")
    taken.publish(1.0)

    async def beat() -> None:
        task = asyncio.create_task(slot.beat())
        async with asyncio.timeout(10):
            while len(other.snapshot(0.0).replicas) < 2:
                await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(beat())
    moved = other.snapshot(0.0).replicas[1]
    assert (slot.index, moved.replica_id, moved.gpu, moved.state) == (1, "app#Replica#x1", 3, ReplicaState.READY)
    assert (moved.received_total, moved.in_flight_tokens, moved.received_by_router[4]) == (1, 30, 1)
    slot.finished(number)
    assert other.snapshot(0.0).replicas[1].in_flight_requests == 0
    taken.release()
    other.close()


def test_heartbeats_publish_when_nothing_happens(
    slot: Slot, path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An idle replica's reading stays young."""
    monkeypatch.setattr(slot_module, "HEARTBEAT_S", 0.001)

    async def beat() -> None:
        task = asyncio.create_task(slot.beat())
        clock.now_s = 200.0
        async with asyncio.timeout(10):
            while reading(path).written_at_s != 200.0:
                await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(beat())
    assert reading(path).written_at_s == 200.0


def test_a_request_of_many_sequences_is_as_many_in_flight(slot: Slot, path: Path) -> None:
    """A part of a batch counts as what it takes in the engine's batch, and grows by a token each in every step."""
    slot.engine_ready(blocks=200, block_tokens=16, max_running_requests=64)
    number = slot.received(Ticket("gpu_aware", "x", 4, tokens=20 * 30, output_tokens=20 * 10, sequences=20))
    r = reading(path)
    assert (r.received_total, r.in_flight_requests, r.in_flight_tokens) == (1, 20, 600)
    assert r.kv_tokens_peak == 600 + 20 * 8
    growths = slot._growth(slot._requests[number])
    assert growths == [(10, 20 + 8)] * 20
    slot.step(20, 0, 0.1, 400, 20, 0, 0)
    assert slot._growth(slot._requests[number]) == [(9, 21 + 8)] * 20
    slot.finished(number)
    assert reading(path).in_flight_requests == 0
