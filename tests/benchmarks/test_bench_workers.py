"""What the bench's workers are asked and say, without torch, vLLM or a model."""

import json
import os
import queue
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.bench import hf_worker
from benchmarks.bench.members import hf_orders, merge, vllm_orders
from benchmarks.bench.plan import Cell, Kind, Workload
from benchmarks.bench.protocol import Ranges
from benchmarks.bench.vllm_worker import Loop
from benchmarks.client import Wish

ROOT = Path(hf_worker.__file__).parents[2]


def order(count: int, batch: int = 20, processes: int = 2, mode: str = "split") -> dict[str, Any]:
    prompts = [[n] * 3 for n in range(count)]
    return {"prompts": prompts, "output_tokens": [5] * count, "batch": batch, "processes": processes, "mode": mode}


def test_a_sequential_round_is_one_process_with_every_batch() -> None:
    (plan,) = hf_worker.shares(order(50, mode="sequential", processes=1))
    assert plan["role"] == "both"
    assert [len(batch["numbers"]) for batch in plan["batches"]] == [20, 20, 10]


@pytest.mark.parametrize(("count", "processes"), [(160, 2), (160, 8), (10, 4), (10, 8), (3, 2)])
def test_a_split_round_pairs_prompt_and_token_processes(count: int, processes: int) -> None:
    """Half of the processes compute prompts; each names its token process, which awaits as many batches; together they
    hold every request once."""
    plans = hf_worker.shares(order(count, processes=processes))
    prompts, tokens = plans[: processes // 2], plans[processes // 2 :]
    assert [plan["role"] for plan in plans] == ["prompt"] * (processes // 2) + ["token"] * (processes // 2)
    for k, plan in enumerate(prompts):
        assert plan["to"] == processes // 2 + k
        assert tokens[k]["batches"] == len(plan["batches"])
    numbers = [n for plan in prompts for batch in plan["batches"] for n in batch["numbers"]]
    assert sorted(numbers) == list(range(count))
    assert max(len(batch["numbers"]) for plan in prompts for batch in plan["batches"]) <= 20


def test_a_small_batch_is_cut_so_that_every_pair_works() -> None:
    plans = hf_worker.shares(order(10, processes=8))
    assert [len(plan["batches"]) for plan in plans[:4]] == [1, 1, 1, 1]


def test_two_processes_times_of_a_request_become_one_report() -> None:
    """The prompt process knows when it was due, begun and had its first token, the token process when it ended."""
    prompt, token = hf_worker.Notes(1.0), hf_worker.Notes(0.0)
    prompt.step(2.5, 1)
    prompt.request([7], 2.0, 2.5, 0.0, 0)
    token.step(2.75, 1)
    token.request([7], 0.0, 0.0, 3.0, 2)
    for parts in ([prompt.report(), token.report()], [token.report(), prompt.report()]):
        merged = hf_worker.merged(parts)
        assert merged["requests"] == [[1.0, 2.0, 2.5, 3.0, 2]]
        assert merged["made"] == [(2.5, 1), (2.75, 1)]


class FakeModel:
    """Makes tokens without a device; `begun` lists the token counts it was asked for."""

    def __init__(self) -> None:
        self.marks = Ranges()
        self.begun: list[int] = []

    def now_s(self) -> float:
        return time.monotonic()

    def tensor(self, prompts: list[list[int]]) -> list[list[int]]:
        return prompts

    def prompt(self, prompts: list[list[int]]) -> tuple[Any, Any]:
        return [[*prompt, 1] for prompt in prompts], f"cache of {len(prompts)}"

    def generate(self, ids: Any, tokens: int, cache: Any, each_step: Any) -> None:
        self.begun.append(tokens)
        for _ in range(tokens):
            each_step(self.now_s(), len(ids))


@pytest.mark.parametrize("mode", ["sequential", "split"])
@pytest.mark.parametrize("count", [3, 45])
def test_both_modes_make_every_token_once_and_time_every_request(mode: str, count: int) -> None:
    """Each role played in turn by its process, with plain queues between them."""
    caches: list[queue.Queue[Any]] = [queue.Queue() for _ in range(4)]
    plans = hf_worker.shares(order(count, mode=mode, processes=4))
    played = [hf_worker._PLAYED[plan["role"]](FakeModel(), plan, caches, rank) for rank, plan in enumerate(plans)]
    report = hf_worker.merged(played)
    assert sum(made for _, made in report["made"]) == 5 * count
    assert [request[4] for request in report["requests"]] == [5] * count
    for due_s, begun_s, first_s, ended_s, _ in report["requests"]:
        assert 0 < due_s <= begun_s <= first_s <= ended_s


def test_the_token_process_makes_all_but_the_first_token() -> None:
    model = FakeModel()
    caches: list[queue.Queue[Any]] = [queue.Queue()]
    caches[0].put(([0], 5, [[1, 2]], "cache"))
    hf_worker._token(model, {"batches": 1}, caches, 0)  # type: ignore[arg-type]
    assert model.begun == [4]


def test_a_failed_process_fails_the_round_at_once() -> None:
    """Its partner would otherwise wait for ever."""
    answers = iter([{"requests": {}, "made": []}, {"error": "out of memory"}])
    with pytest.raises(RuntimeError, match="out of memory"):
        hf_worker._answers(SimpleNamespace(get=lambda: next(answers)), 4)


CELL = Cell("vllm-mps", 3, Workload("closed", Kind.CLOSED, 8, 4, 2, limit=7))
WISHES = [Wish(0.0, (n,), 2) for n in range(8)]


def test_engines_get_their_requests_one_by_one_and_share_the_limit() -> None:
    orders = vllm_orders(CELL, WISHES)
    assert [o["prompts"] for o in orders] == [[(0,), (3,), (6,)], [(1,), (4,), (7,)], [(2,), (5,)]]
    assert [o["limit"] for o in orders] == [3, 2, 2]


def test_the_hugging_face_worker_gets_one_order() -> None:
    cell = Cell("hf-split", 4, Workload("batch", Kind.BATCH, 8, 4, 2))
    (single,) = hf_orders(cell, WISHES, 20)
    assert (single["mode"], single["processes"], single["batch"], len(single["prompts"])) == ("split", 4, 20, 8)


def test_reports_of_all_engines_are_one() -> None:
    report = merge(5.0, [{"requests": [[5, 5, 6, 7, 3]], "made": [[6, 1]]}, {"requests": [], "made": [[7, 2]]}])
    assert (report.go_s, report.requests[0].tokens, report.made) == (5.0, 3, [(6, 1), (7, 2)])


class FakeEngine:
    """Gives every running request one token a step, at whole seconds."""

    def __init__(self) -> None:
        self.left: dict[str, int] = {}
        self.most = 0
        self.step = 0
        self.engine_core, self.output_processor = self, self

    def add_request(self, request_id: str, request: Any, params: Any) -> str:
        self.left[f"{request_id}-renamed"] = request.tokens
        self.most = max(self.most, len(self.left))
        return f"{request_id}-renamed"

    def get_output(self) -> Any:
        self.step += 1
        outputs = []
        for request_id in list(self.left):
            self.left[request_id] -= 1
            finished = not self.left[request_id]
            outputs.append(SimpleNamespace(request_id=request_id, new_token_ids=[1], finished=finished))
            if finished:
                del self.left[request_id]
        return SimpleNamespace(timestamp=float(self.step), outputs=outputs)

    def process_outputs(self, outputs: Any, engine_core_timestamp: float) -> Any:
        return SimpleNamespace(reqs_to_abort=[])

    def abort_requests(self, requests: Any) -> None:
        assert requests == []


def engine_round(
    limit: int | None, tokens: list[int], marks: Ranges | None = None
) -> tuple[FakeEngine, dict[str, Any]]:
    engine = FakeEngine()
    requests = [SimpleNamespace(request_id=str(n), params=None, tokens=count) for n, count in enumerate(tokens)]
    loop = Loop(engine, requests, {"at_s": [0.0] * len(tokens), "limit": limit}, marks or Ranges())
    return engine, loop.run()


def test_a_batch_enters_the_engine_at_once_and_its_tokens_are_timed() -> None:
    engine, report = engine_round(None, [2, 3])
    assert engine.most == 2
    assert report["made"] == [(1.0, 2), (2.0, 2), (3.0, 1)]
    assert [request[2:] for request in report["requests"]] == [[1.0, 2.0, 2], [1.0, 3.0, 3]]


def test_a_closed_loop_never_has_more_than_its_limit_under_way() -> None:
    engine, report = engine_round(2, [1, 2, 3, 1, 2])
    assert engine.most == 2
    assert [request[4] for request in report["requests"]] == [1, 2, 3, 1, 2]


class Recorder:
    """torch.cuda.nvtx's two calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def range_push(self, name: str) -> None:
        self.calls.append(f"+{name}")

    def range_pop(self) -> None:
        self.calls.append("-")


def test_nvtx_ranges_follow_the_phases_and_are_all_closed() -> None:
    """Three steps: both requests wait for their first token, then both decode."""
    recorder = Recorder()
    engine_round(None, [3, 3], Ranges(recorder))
    assert recorder.calls == ["+prompt", "-", "+token", "-"]


def test_a_worker_keeps_what_libraries_print_out_of_its_answers(tmp_path: Path) -> None:
    """The whole protocol once, with a worker that prints at every call: each line of its answers is JSON."""
    worker = tmp_path / "worker.py"
    worker.write_text(
        "from benchmarks.bench.protocol import work\n"
        "def serve(order):\n    print('noise')\n    return lambda: {'doubled': 2 * order['n']}\n"
        "def build(spec):\n    print('more noise')\n    return {'hello': spec['name']}, serve\n"
        "work(build)\n"
    )
    lines = [{"name": "w"}, {"n": 1}, {"go": True}, {"n": 4}, {"go": True}]
    done = subprocess.run(
        [sys.executable, str(worker)],
        input="".join(json.dumps(line) + "\n" for line in lines),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert answers == [{"hello": "w"}, {"ready": True}, {"doubled": 2}, {"ready": True}, {"doubled": 8}]
    assert "noise" in done.stderr
