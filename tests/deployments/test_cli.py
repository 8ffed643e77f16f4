"""The command line: `splitwiser validate` says what is wrong in one sentence and starts nothing."""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path

import pytest

from balancer.access import NO_LIMITS, digest, parse_keys
from balancer.board import BoardError
from deployments import cli, launch, processes
from deployments.cli import main
from deployments.config import ConfigError
from monitoring import top

FINE = """
applications:
  - import_path: deployments.app:build
    args: {replicas: 3, model: demo, served_model_name: mine, balancer: {policy: least_queue}}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "serve_config.yaml"
    path.write_text(FINE)
    return path


def test_a_good_file_is_called_so(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What would be served is said in a line, with status 0, and no process is started."""
    assert main(["validate", str(file)]) == 0
    assert capsys.readouterr().out == f"{file} is fine: 3 replicas of mine, policy least_queue\n"
    assert processes.engines_of(os.getpid()) == []


@pytest.mark.parametrize("command", ["validate", "serve"])
def test_a_mistake_is_one_line_and_status_2(file: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    """A mistake in the file goes to standard error as one sentence, without a traceback, from either command."""
    file.write_text(FINE.replace("replicas: 3", "replicas: 0"))
    assert main([command, str(file)]) == 2
    captured = capsys.readouterr()
    assert captured.err == "splitwiser: `replicas` is 0, but it should be greater than or equal to 1\n"
    assert captured.out == ""


def test_the_file_may_be_left_out(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a name, serve_config.yaml of the current folder is meant."""
    monkeypatch.chdir(file.parent)
    assert main(["validate"]) == 0
    file.unlink()
    assert main(["validate"]) == 2
    assert "cannot read serve_config.yaml" in capsys.readouterr().err


def test_serve_passes_its_options_on(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`serve` gives the file and the way of serving to the launcher and returns its status."""
    calls: list[tuple[Path, bool]] = []

    def serve(path: Path, plain: bool) -> int:
        calls.append((path, plain))
        return 5

    monkeypatch.setattr(launch, "serve", serve)
    assert main(["serve", str(file), "--plain"]) == 5
    assert main(["serve", str(file)]) == 5
    assert calls == [(file, True), (file, False)]


@pytest.mark.parametrize("error", [ConfigError("this is wrong"), BoardError("no room")])
def test_what_a_person_can_mend_has_no_traceback(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    """Errors of the configuration and of the board are printed, others are not hidden."""

    def fail(*_: object) -> int:
        raise error

    monkeypatch.setattr(cli, "load", fail)
    assert main(["validate", str(file)]) == 2
    assert capsys.readouterr().err == f"splitwiser: {error}\n"


@pytest.mark.parametrize("words", [[], ["start"], ["serve", "a", "b"], ["validate", "--plain"]])
def test_unknown_words_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """No command, an unknown one, or too many files: usage on standard error and status 2."""
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert "usage: splitwiser" in capsys.readouterr().err


def test_status_is_json_whether_or_not_it_is_asked_to_be(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`splitwiser status` and `splitwiser status --json` print the same object."""
    monkeypatch.setattr(cli, "newest_board", lambda: Path("board"))
    monkeypatch.setattr(top, "status", lambda board: {"board": str(board)})
    for words in (["status"], ["status", "--json"]):
        assert main(words) == 0
        assert json.loads(capsys.readouterr().out) == {"board": "board"}


def test_bench_becomes_the_benchmarks_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every word after `bench`, options and --help too, is the bench's own; nothing of it is imported here."""
    became: list[list[str]] = []
    monkeypatch.setattr(cli.os, "execv", lambda file, words: became.append([file, *words]))
    main(["bench", "--quick", "--out", "x", "--help"])
    python = cli.sys.executable
    assert became == [[python, python, "-m", "benchmarks.bench", "--quick", "--out", "x", "--help"]]


def test_no_room_of_the_product_imports_benchmarks() -> None:
    """Neither when a module is imported nor later, inside a function."""
    root = Path(cli.__file__).parents[1]
    sources = [file for room in ("balancer", "deployments", "monitoring") for file in (root / room).rglob("*.py")]
    assert len(sources) > 20
    imports = [
        node
        for file in sources
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    names = {alias.name for node in imports for alias in node.names} | {getattr(n, "module", "") or "" for n in imports}
    assert {name for name in names if name.split(".")[0] == "benchmarks"} == set()


def test_a_key_is_made_whose_line_does_not_show_it(capsys: pytest.CaptureFixture[str]) -> None:
    """The line goes to standard output, for the file; the key, once, to the person."""
    assert main(["key", "alice"]) == 0
    out, err = capsys.readouterr()
    secret = err.split()[-1]
    (key,) = parse_keys(out, NO_LIMITS)
    assert (key.name, key.digest) == ("alice", digest(secret))
    assert secret not in out
    assert len(secret) > 40
    assert main(["key", "al ice"]) == 2


def test_validate_reads_the_file_of_keys_too(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What would keep everybody out, or let others read the keys, is said before anything starts."""
    keys = file.with_name("keys")
    file.write_text(FINE.replace("replicas: 3", f"replicas: 3, access: {{api_keys_file: {keys}}}"))
    assert main(["validate", str(file)]) == 2
    assert "cannot read the API keys" in capsys.readouterr().err
    keys.write_text("alice 0123456789abcdef")
    keys.chmod(0o644)
    assert main(["validate", str(file)]) == 2
    assert "chmod 600" in capsys.readouterr().err
    keys.chmod(0o600)
    assert main(["validate", str(file)]) == 0
