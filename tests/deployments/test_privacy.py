"""A run's files and ports are its user's alone, in the folders that the project makes and in those that Ray makes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from deployments import privacy
from deployments.config import ConfigError


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.fixture
def ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home" / ".ray").mkdir(parents=True)
    (tmp_path / "ray").mkdir()
    return tmp_path / "ray"


def test_the_session_of_our_driver_is_closed_and_no_other(ray: Path) -> None:
    """Ray opens its session's folder, with logs and sockets in it, to everybody; others' sessions are not ours."""
    ours, others = ray / "session_2026-01-01_00-00-00_000001_77", ray / "session_2026-01-01_00-00-00_000001_177"
    for folder in (ours, others):
        folder.mkdir()
        folder.chmod(0o777)
    privacy.close_session(77)
    privacy.close_session(77)
    assert (mode(ours), mode(others)) == (0o700, 0o777)


def test_rays_token_is_closed(ray: Path) -> None:
    """Whoever reads it may run code in the cluster; Ray writes it readable for everybody."""
    token = Path(os.environ["HOME"]) / ".ray" / "auth_token"
    privacy.close_session(77)
    token.write_text("secret")
    token.chmod(0o644)
    privacy.close_session(77)
    assert mode(token) == 0o600


def test_a_folder_of_ours_is_closed_before_it_is_used(tmp_path: Path) -> None:
    """It may have been made by an older release, or with another umask."""
    folder = tmp_path / "runs"
    folder.mkdir()
    folder.chmod(0o755)
    privacy.require_own(folder)
    assert mode(folder) == 0o700


def test_a_link_or_a_file_in_our_place_is_refused(tmp_path: Path) -> None:
    """The place under /tmp is known to everybody, who may have put something there before us."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "file").touch()
    for name in ("link", "file"):
        with pytest.raises(ConfigError, match="is not a folder of yours"):
            privacy.require_own(tmp_path / name)


def test_serve_is_told_loopback_where_haproxy_has_the_public_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the replicas' own ports would be as open as it; in a cluster, and where nothing is said, it stays."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = tmp_path / "config.yaml"
    config.write_text("http_options: {host: 0.0.0.0, port: 8001}\nproxy_location: HeadOnly\n")
    served = yaml.safe_load(privacy.behind_haproxy(config, tmp_path).read_text())
    assert served == {"http_options": {"host": "127.0.0.1", "port": 8001}, "proxy_location": "HeadOnly"}
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert privacy.behind_haproxy(config, tmp_path) == config


def test_serves_port_for_handles_moves_to_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Ray stays on loopback; a cluster's nodes need it on every interface."""
    from ray.serve._private import replica

    bound: list[str] = []

    def bind(server: object, address: str) -> int:
        bound.append(address)
        return 1

    for value in ("0", "1"):
        monkeypatch.setattr(replica, "add_port_to_grpc_server", bind)
        monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", value)
        privacy.keep_grpc_on_loopback()
        replica.add_port_to_grpc_server(None, "[::]:0")
    assert bound == ["127.0.0.1:0", "[::]:0"]
