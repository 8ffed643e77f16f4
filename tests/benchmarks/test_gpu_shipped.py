"""The shipped file's start: what stands for a model that is not downloaded."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import snapshot_download

from benchmarks.gpu_shipped import stand_for
from deployments.demo_model import DEMO


def test_a_models_name_finds_the_checkpoint_that_stands_for_it(tmp_path: Path) -> None:
    """As vLLM looks it up: in the cache, by the name in the file, without a network; laid out twice it is the same."""
    for _ in range(2):
        stand_for("facebook/opt-125m", tmp_path, DEMO)
        found = Path(snapshot_download("facebook/opt-125m", cache_dir=tmp_path / "hub", local_files_only=True))
        assert json.loads((found / "config.json").read_text())["hidden_size"] == DEMO.hidden_size
        assert list(found.glob("*.safetensors"))


def test_a_folder_or_the_demo_model_needs_no_cache(tmp_path: Path) -> None:
    """Only a name of the hub is looked up there."""
    stand_for("demo", tmp_path, DEMO)
    assert list(tmp_path.iterdir()) == []
