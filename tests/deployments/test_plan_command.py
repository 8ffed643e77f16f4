"""`splitwiser plan`: on a machine without a GPU, for cards named by hand, and on the cards that are there."""

from __future__ import annotations

import json
from pathlib import Path

import pynvml
import pytest
import yaml

from deployments import gpu_setup
from deployments.cli import main
from deployments.config import ConfigError
from deployments.memory import GIB, KNOWN_CARDS, Card
from deployments.plan_command import card_named

OPT = {
    "model_type": "opt", "hidden_size": 768, "ffn_dim": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "vocab_size": 50272, "max_position_embeddings": 2048, "torch_dtype": "float16",
}  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(OPT))
    args = {"model": str(tmp_path), "replicas": 4}
    document = {"applications": [{"import_path": "deployments.app:build", "args": args}]}
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def test_a_card_is_named_or_measured_by_hand() -> None:
    """Names are taken as people write them; a size may stand in GiB, GB or MiB."""
    assert card_named("a10") == KNOWN_CARDS["A10"]
    assert card_named("rtx4090") == card_named("RTX 4090") == KNOWN_CARDS["RTX 4090"]
    assert card_named("24GiB").total_bytes == 24 * GIB
    assert card_named("80GB").total_bytes == 80 * 10**9
    for wrong in ("A11", "24", "0GiB", "-3GiB", ""):
        with pytest.raises(ConfigError, match="is unknown; give a size such as 24GiB, or T4, L4, A10"):
            card_named(wrong)


def test_a_plan_that_holds_is_a_table_with_status_0(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a GPU: the table, the replicas that would fit at most, and MPS counted although it is not here."""
    assert main(["plan", str(file), "--card", "A10"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("A10: 22.05 GiB, 4 replica(s)")
    assert "MPS server" in out
    assert out.rstrip().splitlines()[-1] == (
        "at most 8 such replicas would fit, each with a KV cache for one sequence of 2048 tokens"
    )


def test_a_plan_that_cannot_hold_is_one_sentence_with_status_1(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The sentence names the largest number that would fit."""
    assert main(["plan", str(file), "--card", "8GiB"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("splitwiser: 4 replica(s) of ")
    assert "at most 2 would" in captured.err
    assert captured.err.count("\n") == 1


def test_without_a_gpu_a_card_is_asked_for(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is nothing to plan for: status 2 and the option that helps."""

    def absent() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(gpu_setup.pynvml, "nvmlInit", absent)
    assert main(["plan", str(file)]) == 2
    assert "name a card, as in `splitwiser plan --card A10`" in capsys.readouterr().err


def test_the_gpus_here_are_planned_for(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What others hold on the card is in the table."""
    monkeypatch.setattr(gpu_setup, "chosen_gpus", lambda count: (0,))
    monkeypatch.setattr(gpu_setup, "this_card", lambda gpu: Card("NVIDIA X", 40 * GIB, 10 * GIB))
    assert main(["plan", str(file)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("NVIDIA X: 40.00 GiB")
    assert "in use before" in out


def test_a_model_that_cannot_be_read_is_one_sentence(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a folder nor a model of the hub that can be reached."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    file.write_text(file.read_text().replace(f"model: {file.parent}", "model: nobody/nothing-like-this"))
    assert main(["plan", str(file), "--card", "A10"]) == 2
    captured = capsys.readouterr()
    assert "the model nobody/nothing-like-this cannot be read" in captured.err
