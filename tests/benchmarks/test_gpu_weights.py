"""The arithmetic of the shared-weights proof: what counts as the same answer, as a gain, and what a log says."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks import gpu_weights
from benchmarks.gpu_weights import (
    CPU_SHAPES,
    LLAMA,
    Host,
    Proof,
    compare,
    llama_files,
    loading_in,
    same_as,
    saving,
)
from deployments.memory import model_shape
from deployments.weight_house import WeightHouse


def answers(tokens: list[list[int]], logprobs: list[list[float]]) -> dict[str, Any]:
    return {"tokens": tokens, "logprobs": logprobs}


def test_an_answer_is_the_same_only_token_for_token() -> None:
    """One other token is counted, and the largest difference of log probabilities is kept."""
    first = answers([[1, 2], [3, 4]], [[-1.0, -2.0], [-3.0, -4.0]])
    assert same_as(first, first) == {"identical": True, "tokens": 4, "agree": 4, "logprob_difference": 0.0}
    other = same_as(first, answers([[1, 2], [3, 5]], [[-1.0, -2.0], [-3.0, -4.5]]))
    assert other == {"identical": False, "tokens": 4, "agree": 3, "logprob_difference": 0.5}


def test_a_saving_is_told_from_totals_and_from_each() -> None:
    """Three engines of 100 bytes and weights of 40 each; shared: one copy, a host of 5 more, 2 more a follower."""
    private = {"added_bytes": 420, "of_each_bytes": [140, 140, 140], "engines": 3}
    shared = {"added_bytes": 351, "of_each_bytes": [102, 102, 102], "engines": 3, "shared_weights_bytes": 40}
    found = saving(private, shared, replace(CPU_SHAPES["opt"], kv_bytes=23))
    assert found == {
        "saved_bytes": 69, "saved_ratio": 69 / 80, "follower_extra_bytes": 2.0, "total_extra_bytes": 11 / 3,
        "kv_cache_gain_ratio": 1.0,
    }  # fmt: skip


def test_rounds_are_compared_by_their_medians() -> None:
    """An odd round out moves the spread, not the ratio."""
    rounds = [
        ("private", 100.0),
        ("shared", 99.0),
        ("shared", 50.0),
        ("private", 100.0),
        ("private", 104.0),
        ("shared", 101.0),
    ]
    found = compare(rounds)
    assert found["shared_to_private_ratio"] == pytest.approx(0.99)
    assert (found["rounds_each"], found["private_spread_ratio"]) == (3, pytest.approx(0.02))


def test_a_log_says_how_loading_went() -> None:
    """vLLM's lines of a private load, this project's of a shared one, and the reason of a fallback."""
    private = "INFO Loading weights took 1.25 seconds\nINFO Model loading took 14.99 GiB memory and 2.50 seconds\n"
    assert loading_in(private) | {
        "read_checkpoint_s": 1.25,
        "model_load_s": 2.5,
        "model_load_gib": 14.99,
    } == loading_in(private)
    shared = loading_in(
        "Mapped 14.96 GiB of shared weights in 0.30 s (0.75 s to build the model, 1.50 s of waiting for the host)."
    )
    assert (shared["attach_s"], shared["build_s"], shared["waited_for_host_s"]) == (0.3, 0.75, 1.5)
    assert "private_because" in shared
    fallback = loading_in("WARNING Weights are loaded privately, not shared: no.")
    assert fallback["private_because"] == "WARNING Weights are loaded privately, not shared: no."


def test_the_llama_checkpoint_has_the_parameters_that_its_configuration_means() -> None:
    """All files together hold exactly as many numbers as the memory plan counts for this shape."""
    sizes = [shape for names in llama_files(LLAMA) for shape in names.values()]
    numbers = sum(shape[0] * (shape[1] if len(shape) == 2 else 1) for shape in sizes)
    assert 2 * numbers == model_shape({**LLAMA, "torch_dtype": "bfloat16"}).weights_bytes


STAND_IN = (sys.executable, str(Path(__file__).with_name("gpu_weights_stand_in.py")))


def test_all_parts_of_a_proof_run_and_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for engines and host every part writes its rows, none fails, and no process is left."""
    monkeypatch.setattr(gpu_weights, "WORKER", (*STAND_IN, "worker"))
    monkeypatch.setattr(gpu_weights, "WeightHouse", partial(WeightHouse, command=(*STAND_IN, "host")))
    monkeypatch.setattr(Proof, "_throughput", partialmethod(Proof._throughput, most=2))
    rows: list[tuple[str, dict[str, Any]]] = []
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    proof = Proof(CPU_SHAPES["opt"], "cpu", lambda kind, row: rows.append((kind, row)), Host(), time.monotonic() + 120)
    proof.run(str(tmp_path))
    assert not [row for kind, row in rows if kind == "failure"]
    of = {kind: [row for k, row in rows if k == kind] for kind, _ in rows}
    assert [row["weights"] for row in of["start"]] == ["private", "shared"]
    assert all(row["identical"] for row in of["identity"])
    assert [row["weights"] for row in of["restart"]] == ["shared", "private"]
    assert all(row["others_failed"] == 0 < row["others_requests"] for row in of["restart"])
    assert of["restart"][0]["attach_s"] == 0.25
    assert of["verify"] == [{"intact": True}]
    assert [(row["alive"], row["said_why"]) for row in of["host_death"]] == [(0, 2)]
    assert of["host_death"][0]["private_tokens_after"] == 2 * 4 * 16
    assert (len(of["round"]), len(of["throughput"]), len(of["saving"])) == (8, 2, 1)
    assert {process.pid for process in psutil.Process().children(recursive=True)} <= before


def test_a_part_that_breaks_is_a_row_and_the_next_still_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines that do not start are written down with the end of their log."""
    monkeypatch.setattr(gpu_weights, "WORKER", (sys.executable, "-S", "-c", "raise SystemExit('no such GPU')"))
    monkeypatch.setattr(gpu_weights, "WeightHouse", partial(WeightHouse, command=(*STAND_IN, "host")))
    rows: list[tuple[str, dict[str, Any]]] = []
    proof = Proof(CPU_SHAPES["opt"], "cpu", lambda kind, row: rows.append((kind, row)), Host(), time.monotonic() + 60)
    proof.run(str(tmp_path))
    failed = {row["part"]: row["error"] for kind, row in rows if kind == "failure"}
    assert "no such GPU" in failed["private start"]
    assert "shared start" in failed
    assert ("verify", {"intact": True}) in rows
