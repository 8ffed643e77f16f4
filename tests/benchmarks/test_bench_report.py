"""The bench's report, made from recorded rows."""

import builtins
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.bench import summary
from benchmarks.bench.__main__ import main
from benchmarks.bench.progress import line
from benchmarks.bench.report import html, write_report
from benchmarks.bench.rows import rounded


def a_round(
    system: str, processes: int, wall_s: float, workload: str = "radiology 512/20", **more: Any
) -> dict[str, Any]:
    phases = {"prompt_s": wall_s / 4, "token_s": wall_s * 3 / 4}
    rates = {"output_tokens_per_s": 100 / wall_s, "steady_tokens_per_s": 120 / wall_s, "goodput_per_s": 2.0}
    times = dict.fromkeys(("ttft_s_p50", "ttft_s_p99", "tpot_s_p50", "tpot_s_p99"), 0.25)
    device = {"sm_ratio": 0.4, "sm_occupancy_ratio": None, "dram_bandwidth_ratio": 0.1}
    row = {"kind": "round", "system": system, "processes": processes, "workload": workload, "workload_kind": "batch",
           "repeat": 0, "wall_s": wall_s, "requests": 5, "failed": 0, "device": device}  # fmt: skip
    return {**row, **phases, **rates, **times, **more}


def skip(system: str, workload: str, reason: str, **more: Any) -> dict[str, Any]:
    return {"kind": "skip", "system": system, "processes": 2, "workload": workload, "reason": reason, **more}


ROWS = [
    {"kind": "run", "run": "r", "gpu": "a <card>"},
    {"kind": "start", "run": "r", "stage": "apart", "start_s": 33.3},
    *(a_round("vllm-single", 1, wall_s) for wall_s in (10.0, 9.0, 12.0)),
    *(a_round("vllm-mp", 2, wall_s) for wall_s in (12.5, 12.0, 13.0)),
    *(a_round("vllm-mps", 2, wall_s) for wall_s in (5.0, 4.0, 6.0)),
    a_round("hf-sequential", 1, 40.0),
    a_round("hf-split", 2, 30.0),
    a_round("splitwiser-serve", 2, 8.0, "closed loop", workload_kind="closed loop", failed=2),
    skip("hf-split-mps", "radiology 512/20", "no GPU"),
    skip("hf-split-mps", "closed loop", "no GPU"),
    skip("vllm-mp", "closed loop", "3 s were left", repeat=1),
    skip("vllm-mp", "closed loop", "3 s were left", repeat=2),
    {"kind": "failure", "stage": "mps", "error": "the <daemon> died"},
]
CELLS = summary.summaries(ROWS)


def test_a_cell_is_the_median_of_its_runs_with_least_and_greatest() -> None:
    cell = CELLS["radiology 512/20", "vllm-single", 1]
    assert summary.spread_text(cell.spread("wall_s")) == "10 (9 to 12)"
    assert cell.median("device.sm_ratio") == 0.4
    assert cell.spread("device.sm_occupancy_ratio") is None


def test_time_is_saved_against_one_process_of_the_same_software() -> None:
    """vLLM against one engine, Hugging Face against the sequential one: by phase and in all, below 0 where lost."""

    def of(system: str) -> dict[str, float]:
        cell = CELLS["radiology 512/20", system, 2]
        return summary.time_saved(cell, summary.baseline(cell, CELLS))

    assert of("vllm-mps") == {"prompt": 0.5, "token": 0.5, "prompt + token": 0.5}
    assert of("vllm-mp")["prompt + token"] == pytest.approx(-0.25)
    assert of("hf-split") == {"prompt": 0.25, "token": 0.25, "prompt + token": 0.25}


def test_throughput_is_compared_with_the_same_baseline() -> None:
    cell = CELLS["radiology 512/20", "vllm-mps", 2]
    assert summary.gain(cell, summary.baseline(cell, CELLS)) == pytest.approx(2.0)
    assert summary.gain(cell, None) is None


def test_steady_state_lines_start_at_one_process() -> None:
    lines = summary.steady_by_processes("radiology 512/20", CELLS)
    assert {system: [n for n, _ in points] for system, points in lines.items()} == {
        "vllm-mp": [1, 2],
        "vllm-mps": [1, 2],
        "hf-split": [1, 2],
    }
    served = summary.steady_by_processes("closed loop", CELLS)
    assert [n for n, _ in served["splitwiser-serve"]] == [2]
    assert lines["vllm-mps"][0][1].median == pytest.approx(12.0)


def test_what_was_skipped_is_listed_with_its_reason() -> None:
    """Cells that were never planned as "all", rounds that the time cut with their number; alike reasons in one line."""
    assert summary.skip_table(ROWS) == [
        ["hf-split-mps x2", "radiology 512/20; closed loop", "all", "no GPU"],
        ["vllm-mp x2", "closed loop", "2", "3 s were left"],
    ]


def test_the_page_shows_every_table_and_escapes_what_it_quotes() -> None:
    page = html(ROWS, [])
    for text in ("10 (9 to 12)", "2.00x", "-25%", "3 s were left", "2 of 5", "the &lt;daemon&gt; died", "&lt;card&gt;"):
        assert text in page
    assert page.count("<table") == 4  # starts, radiology, closed loop, skipped


def test_a_report_is_written_from_a_file_of_rows(tmp_path: Path) -> None:
    """`--report-only` measures nothing; plots are PNG files beside the page, each named in it."""
    pytest.importorskip("matplotlib")
    rows, out = tmp_path / "rows.jsonl", tmp_path / "report"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert main(["--report-only", str(rows), "--out", str(out)]) == 0
    page = (out / "report.html").read_text()
    plots = sorted(file.name for file in out.glob("*.png"))
    assert plots == ["saved.png", "steady.png", "throughput.png", "utilization.png"]
    assert all(name in page for name in plots)
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in plots)


def test_without_matplotlib_the_report_has_its_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    page = write_report(ROWS, tmp_path).read_text()
    assert "matplotlib is not installed" in page
    assert "10 (9 to 12)" in page
    assert list(tmp_path.glob("*.png")) == []


def test_a_run_of_which_nothing_was_measured_still_has_a_report(tmp_path: Path) -> None:
    page = write_report([row for row in ROWS if row["kind"] != "round"], tmp_path).read_text()
    assert "no GPU" in page


def test_rows_are_told_in_one_line_each() -> None:
    assert line(ROWS[2]) == "vllm-single x1, radiology 512/20 #1: 10.00 s, 10 tokens/s, steady 12"
    assert line(ROWS[-2]) == "skipped vllm-mp x2, closed loop: 3 s were left"
    assert "2 failed" in line(next(row for row in ROWS if row.get("failed")))


def test_figures_are_written_with_six_digits() -> None:
    assert rounded({"a": [1.23456789, (2.0, "x")], "n": 12345678}) == {"a": [1.23457, [2.0, "x"]], "n": 12345678}
