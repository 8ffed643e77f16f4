"""`splitwiser top` and `splitwiser status`: what they make of a board."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import pytest
from rich.console import Console

from balancer.board import Board, BoardError
from balancer.readings import GpuSource, ReplicaState
from monitoring import top as module
from monitoring.top import draw, status, top, watching
from tests.monitoring.stand_in_node import GIB, TAGS, gpu_reading, node


def drawn(path: Path, later_s: float = 0.0) -> str:
    console = Console(file=io.StringIO(), width=160, force_terminal=False)
    with watching(path, time.monotonic) as look_before, watching(path, lambda: time.monotonic() + later_s) as look:
        console.print(draw(look(), look_before()))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_status_tells_gpus_replicas_and_router_as_json(tmp_path: Path) -> None:
    """Scripts get base units and the same names as the metrics."""
    with node(tmp_path / "board") as made:
        found = json.loads(json.dumps(status(made.path)))
    assert found["ready"] == 2
    assert found["gpus"][0]["sm_ratio"] == 0.75
    assert found["gpus"][0]["source"] == "gpm"
    assert [replica["slot"] for replica in found["replicas"]] == [0, 1]
    assert found["replicas"][0]["state"] == "ready"
    assert found["replicas"][0]["active"] is True
    assert found["replicas"][0]["kv_ratio"] == 0.25
    assert found["replicas"][1]["output_tokens_total"] == 1000
    assert found["router"]["decisions_total"] == 22
    assert found["router"]["decisions_by_reason"]["gpu_aware/affinity"] == 2
    assert found["router"]["rejections_total"]["queue_full"] == 1
    assert found["router"]["active_slots"] == [0, 1]


def test_what_a_gpu_cannot_tell_is_null(tmp_path: Path) -> None:
    """Not 0, and not NaN, which JSON does not know."""
    board = Board.open(tmp_path / "board")
    board.gpu_writer(0).publish(gpu_reading(source=GpuSource.HOST, power_w=None))
    found = status(board.path)
    board.close()
    assert found["gpus"][0]["power_watts"] is None
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("command", [status, top])
def test_without_a_board_one_sentence_says_what_to_do(tmp_path: Path, command: object) -> None:
    """And no board is made by asking for one."""
    with pytest.raises(BoardError, match="start the system with `splitwiser serve` first"):
        command(tmp_path / "none")  # type: ignore[operator]
    assert list(tmp_path.iterdir()) == []


def test_top_shows_each_replica_the_gpu_and_what_was_refused(tmp_path: Path) -> None:
    """The same questions as the overview's first tiles."""
    with node(tmp_path / "board") as made:
        text = drawn(made.path)
    assert "75%" in text
    assert "60.0 of 140.0 GiB, 79.0 GiB above the reserve" in text
    assert all(tag in text for tag in TAGS)
    assert text.count("ready") == 2
    assert "12.5 ms" in text
    assert "1 queue_full" in text


def test_top_marks_what_is_silent_stale_failed_or_over_its_limit(tmp_path: Path) -> None:
    """What needs a person stands out in words, not only in colour."""
    with node(tmp_path / "board") as made:
        made.slots[1].fields.state = ReplicaState.FAILED
        made.slots[1].publish(time.monotonic() + 100)
        made.board.gpu_writer(0).publish(gpu_reading(memory_used_bytes=int(139.5 * GIB)))
        text = drawn(made.path, later_s=100.0)
    assert "silent for 100 s" in text
    assert "stale: 100 s old" in text
    assert "failed" in text
    assert "reserve breached by 0.5 GiB" in text


def test_rates_are_taken_between_two_frames(tmp_path: Path) -> None:
    """1000 tokens and 22 requests in ten seconds of the clock."""
    now_s = time.monotonic()
    times = iter([now_s, now_s + 10.0])
    with node(tmp_path / "board") as made, watching(made.path, lambda: next(times)) as look:
        before = look()
        made.step()
        now = look()
        assert module._token_rate(now.snapshot.replicas[0], now, before) == "100"
        assert "2.2 requests/s" in str(module._router_line(now, before))


def test_top_redraws_every_interval_until_it_is_interrupted(tmp_path: Path) -> None:
    """Ctrl-C ends it quietly, whenever it comes."""
    sleeps: list[float] = []

    def sleep(seconds: float) -> None:
        sleeps.append(seconds)
        if len(sleeps) == 3:
            raise KeyboardInterrupt

    with node(tmp_path / "board") as made:
        top(made.path, 0.5, console=Console(file=io.StringIO()), sleep=sleep)
    assert sleeps == [0.5, 0.5, 0.5]


def test_top_ends_with_a_sentence_when_the_system_goes(tmp_path: Path) -> None:
    """The last picture of a dead system is not shown for ever."""
    with node(tmp_path / "board") as made, pytest.raises(BoardError, match="was stopped or started anew"):
        top(made.path, 0.5, console=Console(file=io.StringIO()), sleep=lambda _: made.path.unlink())
