"""What is sent: radiology-like reports made on the spot, random token ids, and the requests of a workload."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tokenizers import Tokenizer

from benchmarks.bench.plan import Kind, Workload
from benchmarks.client import Wish
from benchmarks.workloads import Arrival, Lengths

_EXAMS = ("chest radiograph, two views", "CT of the abdomen and pelvis with contrast", "MRI of the lumbar spine")
_CAUSES = ("cough and fever for three days", "chest pain on exertion", "follow-up of a known nodule", "a fall at home")
_PLACES = ("right upper lobe", "left lower lobe", "mediastinum", "right pleural space", "liver", "L4-L5 disc space")
_FINDINGS = (
    "There is no focal consolidation in the {place}.",
    "A {size} mm nodule in the {place} is unchanged since the prior study.",
    "Mild atelectasis is seen in the {place}, without effusion or pneumothorax.",
    "The {place} shows a new opacity of {size} mm, which may represent early pneumonia.",
    "No acute abnormality of the {place} is identified.",
    "The cardiac silhouette is at the upper limit of normal; the {place} is otherwise unremarkable.",
)
LENGTHS_SPREAD = 0.5


def report(rng: random.Random, sentences: int) -> str:
    """A report of made-up findings that asks for its impression, as radiology summarization data sets do."""
    findings = (
        rng.choice(_FINDINGS).format(place=rng.choice(_PLACES), size=rng.randrange(3, 24)) for _ in range(sentences)
    )
    head = f"Examination: {rng.choice(_EXAMS)}. Indication: {rng.choice(_CAUSES)}."
    return f"{head} Findings: {' '.join(findings)} Impression:"


def radiology_prompts(tokenizer: Tokenizer, count: int, tokens: int, seed: int) -> list[tuple[int, ...]]:
    """`count` prompts of exactly `tokens` token ids: each report's last ones, so that it ends by asking."""
    rng = random.Random(seed)
    prompts = []
    for _ in range(count):
        ids = tokenizer.encode(report(rng, 1 + tokens // 8)).ids
        while len(ids) < tokens:
            ids = tokenizer.encode(report(rng, 1 + tokens // 4)).ids + ids
        prompts.append(tuple(ids[-tokens:]))
    return prompts


class Source:
    """Makes the requests of a workload for one model. `shaped` are the trace's arrivals, fitted to the model."""

    def __init__(self, model: Path, shaped: list[Arrival]) -> None:
        file = model / "tokenizer.json"
        self.tokenizer = Tokenizer.from_file(str(file)) if file.exists() else None
        # Ids of ordinary tokens: the first are special, the last may be padding of the embedding.
        size = self.tokenizer.get_vocab_size() if self.tokenizer else vocabulary(model)
        self._ids = range(10, size)
        self._shaped = shaped

    def wishes(self, workload: Workload, seed: int) -> list[Wish]:
        """The same for the same seed, whatever system they are for."""
        rng = random.Random(seed)
        if workload.radiology and self.tokenizer is not None:
            prompts = radiology_prompts(self.tokenizer, workload.requests, workload.prompt_tokens, seed)
            return [Wish(0.0, prompt, workload.output_tokens) for prompt in prompts]
        return [Wish(at_s, self._random(rng, prompt), output) for at_s, prompt, output in self._arrivals(workload, rng)]

    def _arrivals(self, workload: Workload, rng: random.Random) -> list[Arrival]:
        match workload.kind:
            case Kind.TRACE:
                return self._shaped
            case Kind.CLOSED:
                lengths = Lengths(((1.0, workload.prompt_tokens, workload.output_tokens),), LENGTHS_SPREAD)
                return [(0.0, *lengths.draw(rng)) for _ in range(workload.requests)]
            case Kind.BATCH:
                return [(0.0, workload.prompt_tokens, workload.output_tokens)] * workload.requests

    def _random(self, rng: random.Random, tokens: int) -> tuple[int, ...]:
        return tuple(rng.choices(self._ids, k=tokens))


def vocabulary(model: Path) -> int:
    return int(json.loads((model / "config.json").read_text())["vocab_size"])


def kv_bytes_per_token(model: Path) -> int:
    """Keys and values of all layers in 2-byte numbers."""
    config = json.loads((model / "config.json").read_text())
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_size = config.get("head_dim") or config["hidden_size"] // heads
    return int(2 * 2 * config["num_hidden_layers"] * kv_heads * head_size)
