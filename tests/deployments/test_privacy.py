"""A run's files and ports are its user's alone, in the folders that the project makes and in those that Ray makes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

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
