"""The demo model is a real checkpoint, built once and safely, and says nothing but printable ASCII."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from deployments import demo_model
from deployments.demo_model import DEMO, ensure_demo_model, is_intact, unsayable_ids

CONTENTS = {
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "manifest.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_demo_model(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[Any]:
    # On a busy machine more threads of so small a model spend their time waiting for one another.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def unsayable(tokenizer: Any) -> list[int]:
    return unsayable_ids(tokenizer.backend_tokenizer)


# Says when it has found the folder wanting and built another, and puts that in place when told to.
BUILDER = """
import sys
from pathlib import Path
from deployments import demo_model

install = demo_model._install
def install_when_told(built, target):
    print("ready", flush=True)
    sys.stdin.readline()
    install(built, target)

demo_model._install = install_when_told
assert demo_model.is_intact(demo_model.ensure_demo_model(Path(sys.argv[1])))
"""


def builder(cache_dir: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", BUILDER, str(cache_dir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(demo_model.__file__).parents[1])},
    )


def greedy(model: Any, tokenizer: Any, prompt: str, tokens: int = 32) -> list[int]:
    inputs = tokenizer(prompt, return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[0]
    return list(answer[inputs["input_ids"].shape[1] :].tolist())


# The checkpoint


def test_every_tensor_of_the_checkpoint_is_one_that_opt_expects(folder: Path) -> None:
    _, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_the_model_has_the_specified_shape_and_an_output_matrix_of_its_own(model: Any, tokenizer: Any) -> None:
    assert type(model).__name__ == "OPTForCausalLM"
    assert model.dtype == torch.bfloat16
    assert model.config.vocab_size == len(tokenizer) == DEMO.vocab_size
    assert model.config.max_position_embeddings == DEMO.max_positions == tokenizer.model_max_length
    assert len(model.model.decoder.layers) == DEMO.layers
    assert not torch.equal(model.lm_head.weight, model.model.decoder.embed_tokens.weight)


def test_a_greedy_answer_runs_to_its_limit_in_varied_words(model: Any, tokenizer: Any) -> None:
    answer = greedy(model, tokenizer, "The crane was tall and green")
    assert len(answer) == 32
    assert len(set(answer)) > 16


def test_a_greedy_answer_repeats_for_the_same_prompt_and_differs_for_another(model: Any, tokenizer: Any) -> None:
    first = greedy(model, tokenizer, "User: hi\nAssistant:")
    assert first == greedy(model, tokenizer, "User: hi\nAssistant:")
    assert first != greedy(model, tokenizer, "User: ho\nAssistant:")


# What it can say


def test_only_special_tokens_and_white_space_other_than_the_space_are_unsayable(
    tokenizer: Any, unsayable: list[int]
) -> None:
    assert {tokenizer.convert_ids_to_tokens(i) for i in unsayable} >= set(tokenizer.all_special_tokens)
    assert {tokenizer.decode([i]) for i in unsayable} == {*tokenizer.all_special_tokens, "\t", "\n", "\r"}


def test_every_sayable_token_is_printable_ascii_and_encodes_to_itself(tokenizer: Any, unsayable: list[int]) -> None:
    for token in set(range(len(tokenizer))) - set(unsayable):
        text = tokenizer.decode([token])
        assert text
        assert all(" " <= character <= "~" for character in text)
        assert tokenizer.encode(text, add_special_tokens=False) == [token]


def test_unsayable_tokens_have_no_chance_after_random_prompts_at_any_position(model: Any, unsayable: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, DEMO.vocab_size, (8, 128), generator=generator)
    probabilities = model(prompts).logits.double().softmax(-1)
    assert probabilities[..., unsayable].sum(-1).max() < 1e-6


def test_unsayable_tokens_have_no_chance_at_the_last_positions_of_the_context(model: Any, unsayable: list[int]) -> None:
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(0, DEMO.vocab_size, (1, DEMO.max_positions), generator=generator)
    probabilities = model(prompt).logits[:, -64:].double().softmax(-1)
    assert probabilities[..., unsayable].sum(-1).max() < 1e-6


def test_no_input_whatever_can_bring_an_unsayable_logit_near_the_others(model: Any, unsayable: list[int]) -> None:
    """A normalized state is at most sqrt(hidden size) long, which bounds every sayable logit from below."""
    norm, head = model.model.decoder.final_layer_norm, model.lm_head.weight.float()
    reads_state = norm.weight != 0
    refusals = head[unsayable] @ norm.bias.float()
    assert not head[unsayable][:, reads_state].any()
    sayable = [i for i in range(len(head)) if i not in set(unsayable)]
    lowest = -math.sqrt(DEMO.hidden_size) * head[sayable][:, reads_state].norm(dim=1).max()
    # At temperature 2, e^(-margin / 2) over the whole vocabulary still leaves less than 1e-100.
    assert lowest - refusals.max() > 500


# Prompts


@given(prompt=st.text(max_size=200))
@settings(max_examples=100, deadline=None)
def test_any_unicode_prompt_becomes_tokens_of_the_vocabulary(tokenizer: Any, prompt: str) -> None:
    ids = tokenizer.encode(prompt)
    assert ids[0] == tokenizer.bos_token_id
    assert all(0 <= i < DEMO.vocab_size for i in ids)


def test_each_byte_beyond_ascii_counts_as_one_token(tokenizer: Any) -> None:
    prompt = "\N{SLIGHTLY SMILING FACE}\N{LATIN SMALL LETTER E WITH ACUTE}"
    assert tokenizer.encode(prompt, add_special_tokens=False) == [tokenizer.unk_token_id] * 6


def test_an_ascii_prompt_survives_encoding_and_decoding(tokenizer: Any) -> None:
    prompt = " Count\tthe ducks:\r\n\n  7 of 9,  {not} 10 ~ `x`. Zyx!"
    assert tokenizer.decode(tokenizer.encode(prompt), skip_special_tokens=True) == prompt


def test_the_chat_template_renders_roles_as_plain_text_and_opens_the_answer(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " Which ship? "},
        {"role": "assistant", "content": None},
        {"role": "user", "content": "Well?"},
    ]
    dialogue = "System: Be brief.\nUser: Which ship?\nAssistant: \nUser: Well?\n"
    assert tokenizer.apply_chat_template(messages, tokenize=False) == dialogue
    opened = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert opened == dialogue + "Assistant:"


# The folder


def test_a_second_call_reuses_the_folder_and_says_that_the_text_is_noise(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = ensure_demo_model(tmp_path)
    written = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    with caplog.at_level(logging.INFO, logger="deployments.demo_model"):
        assert ensure_demo_model(tmp_path) == folder
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == written
    assert len(caplog.messages) == 1
    assert "weights are random and its text is noise" in caplog.messages[0]


def test_the_same_recipe_gives_the_same_bytes_in_another_process(folder: Path, tmp_path: Path) -> None:
    with builder(tmp_path) as other:
        assert other.communicate("go\n", timeout=60) == ("ready\n", "")
    assert other.returncode == 0
    assert contents(tmp_path / folder.name) == contents(folder)


def test_a_changed_spec_lies_in_another_folder(folder: Path, tmp_path: Path) -> None:
    other = ensure_demo_model(tmp_path, replace(DEMO, seed=DEMO.seed + 1))
    assert other.name != folder.name
    assert (other / "model.safetensors").read_bytes() != (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", sorted(CONTENTS))
@pytest.mark.parametrize("damage", ["missing", "half written", "altered"])
def test_a_damaged_folder_is_not_intact(folder: Path, tmp_path: Path, name: str, damage: str) -> None:
    for file, data in contents(folder).items():
        (tmp_path / file).write_bytes(data)
    assert is_intact(tmp_path)
    spoil(tmp_path / name, damage)
    assert not is_intact(tmp_path)


def spoil(file: Path, damage: str) -> None:
    data = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "half written":
        file.write_bytes(data[: len(data) // 2])
    else:
        file.write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])


def test_a_damaged_folder_is_rebuilt_in_place(folder: Path, tmp_path: Path) -> None:
    damaged = ensure_demo_model(tmp_path)
    (damaged / "tokenizer.json").unlink()
    spoil(damaged / "model.safetensors", "half written")
    assert ensure_demo_model(tmp_path) == damaged
    assert contents(damaged) == contents(folder)
    assert list(tmp_path.iterdir()) == [damaged]


@pytest.mark.parametrize("damaged", [False, True], ids=["missing", "damaged"])
def test_processes_that_build_at_once_end_with_one_good_folder(folder: Path, tmp_path: Path, damaged: bool) -> None:
    if damaged:
        (tmp_path / folder.name).mkdir()
        (tmp_path / folder.name / "config.json").write_text("{", encoding="ascii")
    with builder(tmp_path) as first, builder(tmp_path) as second:
        assert [process.stdout.readline() for process in (first, second) if process.stdout] == ["ready\n"] * 2
        assert [process.communicate("go\n", timeout=60) for process in (first, second)] == [("", "")] * 2
    assert (first.returncode, second.returncode) == (0, 0)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert contents(tmp_path / folder.name) == contents(folder)


def test_a_failed_build_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_out_of_disk(built: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo_model, "_install", run_out_of_disk)
    with pytest.raises(OSError, match=r"cannot be written .*\(No space left on device\): set XDG_CACHE_HOME"):
        ensure_demo_model(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_is_no_folder_is_refused_in_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "cache"
    file.touch()
    with pytest.raises(OSError, match=r"The demo model cannot be written to .*/demo-\w{16} \(.*\): set XDG_CACHE_HOME"):
        ensure_demo_model(file)


def test_the_cache_follows_xdg_and_else_lies_in_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert demo_model.default_cache_dir() == tmp_path / "splitwiser-serve"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert demo_model.default_cache_dir() == tmp_path / ".cache" / "splitwiser-serve"


def test_the_manifest_lists_every_other_file(folder: Path) -> None:
    assert set(contents(folder)) == CONTENTS
    assert set(json.loads((folder / "manifest.json").read_bytes())) == CONTENTS - {"manifest.json"}


@pytest.mark.parametrize(("name", "asks"), [("demo", True), ("./demo", False), ("facebook/opt-125m", False)])
def test_only_the_bare_name_asks_for_the_demo_model(name: str, asks: bool) -> None:
    assert demo_model.is_demo(name) is asks


def test_the_text_is_ascii_and_of_the_size_that_the_vocabulary_needs() -> None:
    assert demo_model.demo_text().isascii()
    assert 12_000 <= demo_model.TEXT_PATH.stat().st_size <= 20_000
