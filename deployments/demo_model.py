"""A small OPT model with random weights, made on the spot, so that the first run needs no download.

It is a real checkpoint: vLLM and transformers load it through their ordinary loaders, and every request runs
prefill, decode, KV cache and detokenization like any other model's. Only its text is noise.

Two properties make it fit for measuring. Every token that it can emit is printable ASCII, because a special token or
half of a UTF-8 character makes an incremental detokenizer decode the whole answer again at every step. And it never
ends an answer by itself: every answer is as long as its `max_tokens`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

logger = logging.getLogger(__name__)

DEMO_NAME = "demo"
RECIPE_VERSION = 1
TEXT_PATH = Path(__file__).with_name("demo_text.txt")
MANIFEST_NAME = "manifest.json"

BOS, PAD, EOS, UNK = SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")
PRINTABLE = frozenset(map(chr, range(0x20, 0x7F)))
READABLE = PRINTABLE | {"\t", "\n", "\r"}

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ message['role'] | capitalize }}: {{ (message['content'] or '') | trim }}
{% endfor -%}
{%- if add_generation_prompt -%}
Assistant:
{%- endif -%}
"""


@dataclass(frozen=True, slots=True)
class DemoSpec:
    """The demo model's shape and the spread of its random weights.

    `vocab_size` is an upper bound: a short text can hold fewer merges. `padded_vocab_size` widens the embedding and the
    head with ids that are never emitted, to give a benchmark's model the cost of a real vocabulary. `logit_std` spreads
    the logits of the tokens that may be emitted; `refusal` is the logit, negated, of those that must not be.
    """

    seed: int = 20
    hidden_size: int = 256
    layers: int = 4
    heads: int = 4
    ffn_size: int = 1024
    max_positions: int = 2048
    vocab_size: int = 2048
    padded_vocab_size: int = 0
    logit_std: float = 3.0
    refusal: float = 1024.0

    @property
    def config(self) -> dict[str, object]:
        """OPT's config.json, but for the vocabulary's true size."""
        return {
            "architectures": ["OPTForCausalLM"],
            "model_type": "opt",
            "dtype": "bfloat16",
            "hidden_size": self.hidden_size,
            "word_embed_proj_dim": self.hidden_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "ffn_dim": self.ffn_size,
            "max_position_embeddings": self.max_positions,
            "activation_function": "relu",
            "do_layer_norm_before": True,
            "tie_word_embeddings": False,
            **SPECIAL_IDS,
        }


SPECIAL_IDS = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
DEMO = DemoSpec()


def is_demo(name: str) -> bool:
    """Whether a model's name in the configuration asks for the demo model (`./demo` names a folder instead)."""
    return name == DEMO_NAME


def ensure_demo_model(cache_dir: Path | None = None, spec: DemoSpec = DEMO) -> Path:
    """The folder of the demo model's checkpoint, built (about a second) if it is missing or damaged.

    It lies under `cache_dir`, or else `$XDG_CACHE_HOME/splitwiser-serve`, and is named after its recipe, so a changed
    recipe never meets an old checkpoint. Any number of processes may call this at once. Raises OSError when the
    folder cannot be written.
    """
    target = (cache_dir or default_cache_dir()) / f"demo-{fingerprint(spec)}"
    if not is_intact(target):
        _build(target, spec)
    logger.info("Using the demo model at %s: its weights are random and its text is noise.", target)
    return target


def default_cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "splitwiser-serve"


def demo_text() -> str:
    """The text that the tokenizer is trained on."""
    return TEXT_PATH.read_text(encoding="ascii")


def fingerprint(spec: DemoSpec) -> str:
    """Sixteen hex digits that change with the recipe, the text and the spec."""
    recipe = json.dumps([RECIPE_VERSION, asdict(spec), CHAT_TEMPLATE, demo_text()], sort_keys=True)
    return hashlib.sha256(recipe.encode()).hexdigest()[:16]


# The folder


def is_intact(folder: Path) -> bool:
    """Whether every file of the folder's manifest is there with the size and SHA-256 that were recorded."""
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_bytes())
        return bool(manifest) and bool(manifest == _manifest(folder, manifest))
    except (OSError, ValueError, TypeError):
        return False


def _manifest(folder: Path, names: Iterable[str]) -> dict[str, dict[str, object]]:
    contents = {name: (folder / name).read_bytes() for name in names}
    return {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in contents.items()}


def _build(target: Path, spec: DemoSpec) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
            built = Path(scratch) / target.name
            built.mkdir()
            write_checkpoint(built, spec)
            _install(built, target)
    except OSError as error:
        raise OSError(
            f"The demo model cannot be written to {target} ({error.strerror}): "
            "set XDG_CACHE_HOME to a folder that can be written and has 20 MB free."
        ) from error


def _install(built: Path, target: Path) -> None:
    """Move a finished folder to its place. A folder already there is damaged, or another process was faster.

    The recipe always gives the same bytes, so replacing file by file is safe at any moment, even while another process
    does the same or an engine has the old files mapped.
    """
    try:
        built.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        for file in built.iterdir():
            file.replace(target / file.name)


def write_checkpoint(folder: Path, spec: DemoSpec) -> None:
    """Write the checkpoint, its tokenizer and the manifest into an empty folder."""
    tokenizer = train_tokenizer(demo_text(), spec.vocab_size)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="ascii")
    _write_json(folder / "tokenizer_config.json", tokenizer_config(spec))
    sayable_size = tokenizer.get_vocab_size()
    size = max(sayable_size, spec.padded_vocab_size)
    _write_json(folder / "config.json", {**spec.config, "vocab_size": size})
    _write_json(folder / "generation_config.json", SPECIAL_IDS)
    weights = dict(make_weights(spec, size, [*unsayable_ids(tokenizer), *range(sayable_size, size)]))
    (folder / "model.safetensors").write_bytes(to_safetensors(weights))
    names = sorted(file.name for file in folder.iterdir())
    _write_json(folder / MANIFEST_NAME, _manifest(folder, names))


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="ascii")


# The tokenizer


def train_tokenizer(text: str, vocab_size: int) -> Tokenizer:
    """A byte-level BPE over the readable ASCII bytes alone; any other byte of a prompt becomes one `<unk>`.

    Without the other 160 bytes no token is part of a UTF-8 character, whatever a request's logit bias asks for.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=UNK, fuse_unk=False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=_byte_level_alphabet(READABLE),
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, SPECIAL_IDS["bos_token_id"])]
    )
    return tokenizer


def _byte_level_alphabet(characters: frozenset[str]) -> list[str]:
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("".join(characters))
    return sorted({character for piece, _ in pieces for character in piece})


def unsayable_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids that no answer may hold: the special tokens and all that is not printable ASCII, as line breaks."""
    texts = ((i, tokenizer.decode([i], skip_special_tokens=True)) for i in range(tokenizer.get_vocab_size()))
    return [i for i, text in texts if not text or not PRINTABLE.issuperset(text)]


def tokenizer_config(spec: DemoSpec) -> dict[str, object]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": spec.max_positions,
        "clean_up_tokenization_spaces": False,
        "bos_token": BOS,
        "pad_token": PAD,
        "eos_token": EOS,
        "unk_token": UNK,
    }


# The weights

Array = NDArray[np.float32]


def make_weights(spec: DemoSpec, vocab_size: int, unsayable: list[int]) -> Iterator[tuple[str, Array]]:
    """OPT's tensors under their Hugging Face names, from the spec's seed.

    Token, position and sublayers have about equal parts in the residual stream, so that greedy answers wander too.
    """
    # RandomState's stream is frozen by NumPy's compatibility policy; default_rng's may change with a release.
    random = np.random.RandomState(spec.seed)
    hidden = spec.hidden_size
    yield "model.decoder.embed_tokens.weight", _normal(random, vocab_size, hidden)
    # OPT keeps two unused rows before its first position.
    yield "model.decoder.embed_positions.weight", _normal(random, spec.max_positions + 2, hidden)
    for layer in range(spec.layers):
        for name, weight in _layer_weights(random, spec):
            yield f"model.decoder.layers.{layer}.{name}", weight
    norm_weight, norm_bias, head = _refusing_head(random, spec, vocab_size, unsayable)
    yield "model.decoder.final_layer_norm.weight", norm_weight
    yield "model.decoder.final_layer_norm.bias", norm_bias
    yield "lm_head.weight", head


def _refusing_head(random: np.random.RandomState, spec: DemoSpec, vocab_size: int, unsayable: list[int]) -> list[Array]:
    """The last layer norm and the output matrix, which give every unsayable id the logit `-refusal`, whatever came in.

    The norm's channel 0 is the constant 1, and only the unsayable ids' rows read it. A sayable id's logit is at least
    -sqrt(hidden_size) times its row's length, far above.
    """
    norm_weight, norm_bias = np.ones(spec.hidden_size, np.float32), np.zeros(spec.hidden_size, np.float32)
    norm_weight[0], norm_bias[0] = 0, 1
    head = _normal(random, vocab_size, spec.hidden_size, spec.logit_std / math.sqrt(spec.hidden_size))
    head[:, 0] = 0
    head[unsayable] = 0
    head[unsayable, 0] = -spec.refusal
    return [norm_weight, norm_bias, head]


def _layer_weights(random: np.random.RandomState, spec: DemoSpec) -> Iterator[tuple[str, Array]]:
    hidden, ffn = spec.hidden_size, spec.ffn_size
    yield from _norm("self_attn_layer_norm", hidden)
    # Sharp attention: near-uniform averaging would hide one prompt's difference from another.
    yield from _linear(random, "self_attn.q_proj", hidden, hidden, gain=1.5)
    yield from _linear(random, "self_attn.k_proj", hidden, hidden, gain=1.5)
    yield from _linear(random, "self_attn.v_proj", hidden, hidden, gain=1.0)
    yield from _linear(random, "self_attn.out_proj", hidden, hidden, gain=1.0)
    yield from _norm("final_layer_norm", hidden)
    yield from _linear(random, "fc1", ffn, hidden, gain=1.0)
    yield from _linear(random, "fc2", hidden, ffn, gain=1.0)


def _linear(
    random: np.random.RandomState, name: str, outputs: int, inputs: int, gain: float
) -> Iterator[tuple[str, Array]]:
    yield f"{name}.weight", _normal(random, outputs, inputs, gain / math.sqrt(inputs))
    yield f"{name}.bias", np.zeros(outputs, np.float32)


def _norm(name: str, size: int) -> Iterator[tuple[str, Array]]:
    yield f"{name}.weight", np.ones(size, np.float32)
    yield f"{name}.bias", np.zeros(size, np.float32)


def _normal(random: np.random.RandomState, rows: int, columns: int, std: float = 1.0) -> Array:
    return (random.standard_normal((rows, columns)) * std).astype(np.float32)


def to_safetensors(weights: dict[str, Array]) -> bytes:
    """The tensors in bfloat16 as one safetensors file: a header's size in 8 bytes, the header in JSON, the data.

    Written here because the library saves bfloat16 only through torch, whose import takes seconds.
    The format: https://github.com/huggingface/safetensors#format
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    data = bytearray()
    for name, weight in weights.items():
        start = len(data)
        data += _bfloat16_bytes(weight)
        header[name] = {"dtype": "BF16", "shape": weight.shape, "data_offsets": [start, len(data)]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded + bytes(data)


def _bfloat16_bytes(values: Array) -> bytes:
    """Little-endian bfloat16, rounded half to even; NumPy has no such type."""
    bits = values.astype("<f4").view("<u4")
    rounded: bytes = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()
    return rounded
