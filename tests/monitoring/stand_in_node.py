"""A node with nothing behind it: a board written by hand, the real exporter, and recorded text of everybody else."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from balancer.board import Board, SlotWriter
from balancer.counters import RouterCounters
from balancer.readings import GpuReading, GpuSource, ReplicaState
from monitoring.exporter import Exporter
from monitoring.exposition import MpsView

RECORDED = Path(__file__).with_name("recorded")
# The tags of the replicas in recorded/haproxy.txt.
TAGS = ("ab12cd34", "ef56ab78")
GIB = 1 << 30
_COUNTER = re.compile(r"^(\S+(?:_total|_bucket|_sum|_count)(?:\{.*\})?) (\S+)$", re.MULTILINE)


def replica_id(tag: str) -> str:
    return f"SERVE_REPLICA::default#Replica#{tag}"


def gpu_reading(index: int = 0, **changes: float | GpuSource | None) -> GpuReading:
    values = {
        "source": GpuSource.GPM, "sm_ratio": 0.75, "sm_occupancy_ratio": 0.5, "dram_bandwidth_ratio": 0.25,
        "memory_used_bytes": 60 * GIB, "memory_total_bytes": 140 * GIB, "memory_reserve_bytes": GIB, "power_w": 500.0,
        "temperature_c": 61.0, "sm_clock_hz": 1.98e9, "taken_at_s": time.monotonic(),
    }  # fmt: skip
    return GpuReading(index=index, **{**values, **changes})  # type: ignore[arg-type]


@dataclass
class Node:
    """The board, the pens that write on it, and the router's counters. `step` lets work go on."""

    path: Path
    board: Board
    slots: list[SlotWriter]
    counters: RouterCounters
    turn: threading.Lock = field(default_factory=threading.Lock)

    def step(self) -> None:
        """Ten requests come and go at each replica, and every other counter moves too."""
        with self.turn:
            now_s = time.monotonic()
            self.board.gpu_writer(0).publish(gpu_reading())
            for writer in self.slots:
                fields = writer.fields
                fields.received_total += 10
                fields.finished_total += 10
                fields.output_tokens_total += 1000
                fields.prompt_tokens_total += 500
                fields.preemptions_total += 1
                fields.predicted_tokens_total += 1200
                fields.answered_tokens_total += 1000
                fields.estimate_error_tokens_total += 300
                writer.publish(now_s)
                for _ in range(10):
                    self.counters.count_decision(writer.index, "gpu_aware", "shortest_wait", 40e-6)
                self.counters.count_decision(writer.index, "gpu_aware", "affinity", 60e-6)
            self.counters.count_rejection("queue_full")
            self.counters.observe_wait(0.02)
            self.counters.publish(now_s)


@contextmanager
def node(path: Path) -> Iterator[Node]:
    """Two ready replicas and a router."""
    board = Board.open(path)
    slots = [board.claim_slot(replica_id(tag)) for tag in TAGS]
    counters = RouterCounters.open(path, board.claim_row().index)
    counters.set_active(writer.index for writer in slots)
    for writer in slots:
        fields = writer.fields
        fields.state = ReplicaState.READY
        fields.in_flight_requests, fields.running_requests, fields.max_running_requests = 6, 5, 64
        fields.kv_blocks_used, fields.kv_blocks_total, fields.kv_block_tokens = 250, 1000, 16
        fields.step_time_s, fields.gpu_memory_bytes = 0.0125 + writer.index / 1000, 20 * GIB
    made = Node(path, board, slots, counters)
    made.step()
    try:
        yield made
    finally:
        counters.leave()
        for writer in slots:
            writer.release()
        board.close()
        path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Addresses:
    exporter: str
    replicas: tuple[str, ...]
    haproxy: str
    ray: str


@contextmanager
def served(made: Node) -> Iterator[Addresses]:
    """Every endpoint of the node on loopback ports; each scrape finds its counters moved on."""

    def mps() -> MpsView:
        made.step()
        return MpsView(wanted=True, up=True, clients=2, faults=0)

    exporter = Exporter(made.path, desired=2, slots=4, mps=mps)
    with ExitStack() as stack:
        stack.callback(exporter.close)
        ours = f"127.0.0.1:{exporter.start(port=0)}"
        replicas = tuple(stack.enter_context(text_server("vllm.txt")) for _ in made.slots)
        haproxy = stack.enter_context(text_server("haproxy.txt"))
        yield Addresses(ours, replicas, haproxy, stack.enter_context(text_server("ray.txt")))


@contextmanager
def text_server(name: str) -> Iterator[str]:
    """Serves recorded text whose counters grow with every scrape."""
    text = (RECORDED / name).read_text()
    scrapes = 0

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            nonlocal scrapes
            scrapes += 1
            body = _COUNTER.sub(lambda m: f"{m[1]} {float(m[2]) * scrapes}", text).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
