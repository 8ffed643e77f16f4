"""The service-discovery file: its content, and that it is always whole."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from monitoring import discovery
from monitoring.discovery import ReplicaTarget

REPLICAS = [
    ReplicaTarget("127.0.0.1:30002", 1, "SERVE_REPLICA::default#Replica#ef56ab78"),
    ReplicaTarget("127.0.0.1:30001", 0, "SERVE_REPLICA::default#Replica#ab12cd34"),
]


def test_it_lists_exporter_replicas_and_haproxy_with_their_labels(tmp_path: Path) -> None:
    """Replicas in slot order, each with its slot and the id that Ray's metrics carry."""
    path = tmp_path / "folder" / "run.json"
    discovery.write(path, discovery.groups("gpu-1", "127.0.0.1:9410", REPLICAS, "127.0.0.1:9101"))
    node = {"node": "gpu-1"}
    assert json.loads(path.read_text()) == [
        {"targets": ["127.0.0.1:9410"], "labels": {"role": "exporter", **node}},
        {"targets": ["127.0.0.1:30001"], "labels": {"role": "replica", **node, "slot": "0", "replica": "ab12cd34"}},
        {"targets": ["127.0.0.1:30002"], "labels": {"role": "replica", **node, "slot": "1", "replica": "ef56ab78"}},
        {"targets": ["127.0.0.1:9101"], "labels": {"role": "haproxy", **node}},
    ]


def test_without_haproxy_there_is_no_such_target() -> None:
    """Serve's own proxy has no exporter; a target that is always down would be an alert for nothing."""
    assert [g["labels"]["role"] for g in discovery.groups("n", "e:1", [])] == ["exporter"]


def test_a_reader_meets_the_old_file_or_the_new_one_and_never_a_part(tmp_path: Path) -> None:
    """Prometheus reads while it is being replaced; it would drop every target of a broken file."""
    path = tmp_path / "run.json"
    sizes = {1, 200}
    versions = [discovery.groups("n", "e:1", REPLICAS[:1] * (size - 1)) for size in sorted(sizes)]
    discovery.write(path, versions[0])
    stop = threading.Event()

    def rewrite() -> None:
        while not stop.is_set():
            for version in versions:
                discovery.write(path, version)

    writer = threading.Thread(target=rewrite)
    writer.start()
    try:
        lengths = {len(json.loads(path.read_text())) for _ in range(300)}
    finally:
        stop.set()
        writer.join()
    assert lengths <= sizes
    assert list(tmp_path.iterdir()) == [path]


def test_everybody_may_read_it_and_only_its_owner_write(tmp_path: Path) -> None:
    """Prometheus runs as a user of its own, in its container as nobody."""
    path = tmp_path / "folder" / "run.json"
    discovery.write(path, [])
    assert path.stat().st_mode & 0o777 == 0o644
    assert path.parent.stat().st_mode & 0o777 == 0o755


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    """What cannot be written as JSON is an error, not an empty list of targets."""
    path = tmp_path / "run.json"
    discovery.write(path, [])
    with pytest.raises(TypeError):
        discovery.write(path, [{"targets": [object()], "labels": {}}])  # type: ignore[list-item]
    assert json.loads(path.read_text()) == []
    assert list(tmp_path.iterdir()) == [path]


def test_removing_it_ends_the_scraping_and_twice_is_no_error(tmp_path: Path) -> None:
    """The end of a run, however it ended."""
    path = discovery.targets_file("run", tmp_path)
    discovery.write(path, [])
    discovery.remove(path)
    discovery.remove(path)
    assert list(tmp_path.iterdir()) == []
