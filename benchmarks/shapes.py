"""Model folders of known shapes without weights: configuration and tokenizer only, for `load_format: dummy`.

Every id of the tokenizer is a word of plain text. Where ids do not decode to text, vLLM's incremental detokenizer reads
the whole answer again at every step, and the front end is measured instead of the engine (an error of 3x was seen).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers

from deployments.demo_model import DemoSpec

# A checkpoint of this shape with random weights, where one is needed as a file.
OPT_125M = DemoSpec(hidden_size=768, layers=12, heads=12, ffn_size=3072, padded_vocab_size=50272)
PLAN = Path(__file__).with_name("gpu_engines_plan.json")


def shapes() -> dict[str, dict[str, Any]]:
    """The `config.json` of each known shape, by name."""
    return {name: model["config"] for name, model in json.loads(PLAN.read_text())["models"].items()}


def make_folder(shape: str, parent: Path) -> Path:
    """`parent`/`shape`, made if it is not there. Raises KeyError for a shape that is not known."""
    config = shapes()[shape]
    folder = parent / shape
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"dtype": "bfloat16", **config}))
    words = {f"w{i}": i for i in range(config["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    ends = {"bos_token": f"w{config['bos_token_id']}", "eos_token": f"w{config['eos_token_id']}"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **ends}))
    return folder
