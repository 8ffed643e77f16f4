"""The engine's arguments: known by name without importing vLLM, and written as vLLM's command line takes them."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deployments import engine
from deployments.config import ConfigError
from deployments.engine import argument_names, command_line, vllm_installed


def test_the_names_are_vllms_own() -> None:
    """Engine and server arguments of the installed vLLM are found, and nothing that is no argument."""
    names = argument_names()
    assert {"max_model_len", "max_num_seqs", "enforce_eager", "kv_cache_memory_bytes", "enable_log_requests"} <= names
    assert {"chat_template", "response_role", "enable_auto_tool_choice"} <= names
    assert len(names) > 200
    assert not any(name.startswith("_") or "-" in name for name in names)


def test_the_names_cost_no_import_of_vllm() -> None:
    """Checking a configuration takes moments, not the most of a minute for which vLLM is imported."""
    script = "import sys; from deployments.engine import argument_names; argument_names(); print('vllm' in sys.modules)"
    root = Path(engine.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=root)
    assert done.stdout.strip() == "False"


def test_vllms_environment_is_read_once() -> None:
    """A front end need not look a variable up for each token; what is set later is not seen."""
    script = """if True:
        import os
        from deployments import engine
        import vllm.envs
        engine.cache_environment()
        os.environ["VLLM_COMPUTE_NANS_IN_LOGITS"] = "1"
        print(vllm.envs.VLLM_COMPUTE_NANS_IN_LOGITS)
    """
    root = Path(engine.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, cwd=root)
    assert done.stdout.strip() == "False", done.stderr


def test_without_vllm_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without vLLM is told so, rather than that every argument is unknown."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not vllm_installed()
    with pytest.raises(ConfigError, match="vLLM is not installed here; run `make setup`"):
        argument_names()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (True, ["--an-argument"]),
        (False, ["--no-an-argument"]),
        (None, []),
        (1, ["--an-argument", "1"]),
        (0, ["--an-argument", "0"]),
        (-1, ["--an-argument", "-1"]),
        (0.5, ["--an-argument", "0.5"]),
        ("", ["--an-argument", ""]),
        ("two words", ["--an-argument", "two words"]),
        ([1, "b"], ["--an-argument", "1", "b"]),
        ([], ["--an-argument"]),
        ({"mode": 0, "x": None}, ["--an-argument", '{"mode": 0, "x": null}']),
        ([{"name": "a", "path": "/b"}], ["--an-argument", '{"name": "a", "path": "/b"}']),
    ],
)
def test_values_become_words(value: Any, words: list[str]) -> None:
    """Switches, numbers, text, lists and mappings are written as vLLM's parser reads them."""
    assert command_line({"an_argument": value}) == words


def test_arguments_keep_their_order() -> None:
    """Each argument follows the one before it."""
    assert command_line({"dtype": "half", "max_num_seqs": 4}) == ["--dtype", "half", "--max-num-seqs", "4"]
