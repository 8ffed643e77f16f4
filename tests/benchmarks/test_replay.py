"""The trace replayer and the HTTP client under it, against a small server on loopback."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import load, replay
from benchmarks.bench.phases import Limits
from benchmarks.client import Answer, Target, Wish, run, share, token_events
from benchmarks.replay import ReplayError, Shape, timed_trace, vllm_row
from tests.benchmarks.stand_in_server import BUSY, CUT, ERROR_EVENT, FINE, NO_USAGE, StandIn, stand_in


@pytest.fixture
def server() -> Iterator[StandIn]:
    with stand_in() as server:
        yield server


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Five requests, a second apart, one of them longer than most models take."""
    path = tmp_path / "trace.csv"
    lengths = [(100, 10), (200, 20), (3000, 1500), (1, 1), (50, 5)]
    rows = [f"2023-11-16 18:15:{46 + n}.5000000,{p},{o}" for n, (p, o) in enumerate(lengths)]
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]) + "\n")
    return path


# The shape


def test_a_trace_is_played_from_its_first_request_on(trace: Path) -> None:
    assert Shape().arrivals(trace) == [(0, 100, 10), (1, 200, 20), (2, 3000, 1500), (3, 1, 1), (4, 50, 5)]


def test_speed_and_seconds_choose_the_part_that_is_played(trace: Path) -> None:
    """Twice as fast, the first second holds the first two requests."""
    assert Shape(speed=2.0, seconds=1.0).arrivals(trace) == [(0.0, 100, 10), (0.5, 200, 20)]


def test_limit_counts_requests(trace: Path) -> None:
    assert len(Shape(limit=3).arrivals(trace)) == 3


def test_lengths_are_scaled_then_capped_and_never_vanish(trace: Path) -> None:
    shaped = Shape(prompt_scale=0.1, output_scale=0.5, max_output=8).arrivals(trace)
    assert [(p, o) for _, p, o in shaped] == [(10, 5), (20, 8), (300, 8), (1, 1), (5, 2)]


def test_a_context_limit_takes_from_the_prompt_first(trace: Path) -> None:
    """Down to half of the context; what is still too long is taken from the answer."""
    third = Shape(max_total=2048).arrivals(trace)[2]
    assert third[1:] == (1024, 1024)
    assert Shape(max_total=4000).arrivals(trace)[2][1:] == (2500, 1500)


def test_what_cannot_be_played_is_said_in_a_sentence(
    trace: Path, tmp_path: Path, server: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that is missing, one without its columns, and a window without requests: status 2 and one line each."""
    bad = tmp_path / "bad.csv"
    bad.write_text("TIMESTAMP,Tokens\n1,2\n")
    for file, more in ((tmp_path / "none.csv", []), (bad, []), (trace, ["--seconds", "0"])):
        assert replay.main(["--trace", str(file), "--base-url", server.url, *more]) == 2
        said = capsys.readouterr().err
        assert said.startswith("benchmarks.replay: ")
        assert said.count("\n") == 1
    with pytest.raises(ReplayError, match="names no model"):
        replay.first_model("http://127.0.0.1:9")


# The client


def target(server: StandIn, stream: bool = True) -> Target:
    return Target(server.url, "stand-in", stream, limit_s=20.0)


def wish(behaviour: int, tokens: int = 3, at_s: float = 0.0) -> Wish:
    return Wish(at_s, (behaviour, 7), tokens)


@pytest.mark.parametrize(
    ("behaviour", "ok", "status"),
    [(FINE, True, 200), (NO_USAGE, True, 200), (BUSY, False, 503), (CUT, False, 200), (ERROR_EVENT, False, 200)],
)
def test_only_a_whole_answer_counts_as_one(server: StandIn, behaviour: int, ok: bool, status: int) -> None:
    """A refusal, a stream without its end and a stream with an error event are failures, and give no tokens."""
    (answer,) = run(target(server), [wish(behaviour)])
    assert (answer.ok, answer.status, answer.output_tokens) == (ok, status, 3 if ok else 0)
    assert answer.replica == ("" if behaviour == BUSY else "r0")


def test_a_server_that_is_gone_is_a_failed_answer() -> None:
    (answer,) = run(Target("http://127.0.0.1:9", "m"), [wish(FINE)])
    assert (answer.ok, answer.status) == (False, 0)


def test_every_token_has_the_time_of_its_chunk(server: StandIn) -> None:
    (answer,) = run(target(server), [wish(FINE, tokens=5)])
    assert [count for _, count in token_events([answer])] == [1] * 5
    assert answer.started_s <= answer.first_token_s == answer.token_times_s[0] <= answer.ended_s


def test_tokens_that_share_a_chunk_are_counted_in_full() -> None:
    answer = Answer(200, 0.0, 3.0, 1.0, 7, token_times_s=(1.0, 2.0, 3.0))
    assert sum(count for _, count in token_events([answer])) == 7


def test_a_request_is_not_sent_before_its_time(server: StandIn) -> None:
    answers = run(target(server), [wish(FINE, at_s=0.3), wish(FINE)])
    first, second = sorted(answers, key=lambda a: a.due_s)
    assert second.due_s - first.due_s == pytest.approx(0.3)
    assert all(a.started_s >= a.due_s for a in answers)


def test_a_closed_loop_keeps_to_its_concurrency(server: StandIn) -> None:
    answers = run(target(server), [wish(FINE) for _ in range(12)], concurrency=3)
    assert (len(answers), all(a.ok for a in answers)) == (12, True)
    assert server.most <= 3


TWO_CLIENTS = """
import sys
from benchmarks.client import Clients, Target, Wish
with Clients(2) as clients:
    for _ in range(2):
        answers = clients.run(Target(sys.argv[1], "stand-in", limit_s=20.0), [Wish(0.0, (0, 7), 3)] * 5)
        print(sum(answer.ok for answer in answers))
"""


def test_client_processes_share_the_requests(server: StandIn) -> None:
    """Two processes, used twice: every request is sent once each time. Run apart: multiprocessing keeps a helper."""
    command = [sys.executable, "-c", TWO_CLIENTS, server.url]
    environment = {**os.environ, "PYTHONPATH": str(Path(load.__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["5", "5"], done.stderr
    assert len(server.asked) == 10


def test_shares_of_a_concurrency_add_up() -> None:
    assert [share(7, 3, k) for k in range(3)] == [3, 2, 2]
    assert share(None, 3, 0) is None


def test_the_closed_loop_command_counts_failures_too(
    server: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`benchmarks.load` uses the same client; here without streaming."""
    out = tmp_path / "rows.jsonl"
    words = ["--url", server.url, "--concurrency", "2", "--requests", "6", "--output-tokens", "4", "--out", str(out)]
    assert load.main(words) == 0
    row = json.loads(capsys.readouterr().out)
    assert row == json.loads(out.read_text())
    assert (row["requests"], row["failed"], row["statuses"]) == (6, 0, {"200": 6})
    assert [body["max_tokens"] for body in server.asked] == [4] * 6


# The command


def test_a_replay_prints_and_writes_its_row(
    trace: Path, server: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every request of the trace is sent with its lengths; the row is printed as JSON and appended to the file."""
    out = tmp_path / "rows.jsonl"
    words = ["--trace", str(trace), "--base-url", server.url, "--speed", "20", "--max-total", "64", "--out", str(out)]
    assert replay.main(words) == 0
    row = json.loads(capsys.readouterr().out)
    assert row == json.loads(out.read_text())
    assert (row["requests"], row["failed"], row["statuses"], row["replicas"]) == (5, 0, {"200": 5}, {"r0": 5})
    asked = [(len(body["prompt"]), body["max_tokens"]) for body in server.asked]
    assert sorted(asked) == sorted([(54, 10), (44, 20), (32, 32), (1, 1), (50, 5)])
    assert all(body["ignore_eos"] and body["model"] == "stand-in" for body in server.asked)


def test_failed_requests_are_counted_and_kept_out_of_the_latencies() -> None:
    fine = Answer(200, 1.0, 3.0, 2.0, 3, "r0", 1.0, True, (2.0, 2.5, 3.0))
    failed = Answer(503, 1.0, 1.1, 0.0, 0, "", 1.0, False)
    row = replay.summary([fine, failed], Limits(ttft_s=2.0, tpot_s=1.0))
    assert (row["requests"], row["failed"], row["statuses"]) == (2, 1, {"200": 1, "503": 1})
    assert (row["ttft_s_p99"], row["tpot_s_p50"], row["goodput_per_s"]) == (1.0, 0.5, 0.5)


# Through vLLM's own benchmark


def test_vllms_trace_file_holds_one_prompt_of_its_own_for_each_request() -> None:
    """Its prompts come from hash ids alone; equal ids would be a shared prefix."""
    lines = [json.loads(line) for line in timed_trace([(0.0, 100, 10), (1.5, 20, 2)]).splitlines()]
    assert lines[1] == {"timestamp": 1.5, "input_length": 20, "output_length": 2, "hash_ids": [1]}
    assert lines[0]["hash_ids"] != lines[1]["hash_ids"]


def test_vllms_result_becomes_the_same_row() -> None:
    """In seconds, with what did not complete counted as failed."""
    times = {f"{q}_{name}_ms": 500.0 for q in ("median", "p99") for name in ("ttft", "tpot")}
    result = {"completed": 3, "duration": 2.0, "total_output_tokens": 60, "request_throughput": 1.5,
              "output_throughput": 30.0, "request_goodput": 1.0, **times}  # fmt: skip
    row = vllm_row(result, requests=4)
    assert (row["failed"], row["ttft_s_p50"], row["tpot_s_p99"], row["goodput_per_s"]) == (1, 0.5, 0.5, 1.0)
