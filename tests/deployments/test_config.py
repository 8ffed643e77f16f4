"""The configuration: every mistake is refused before anything starts, in one sentence that names the key."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from balancer.knobs import Knobs
from deployments.config import (
    APPLICATION_KEYS,
    DOCUMENT_KEYS,
    OWNED_ENGINE_ARGUMENTS,
    BalancerConfig,
    ConfigError,
    EngineBounds,
    HttpBounds,
    KnobBounds,
    load,
    parse_args,
)
from deployments.engine import argument_names

ROOT = Path(__file__).parents[2]
NAN, INFINITE = float("nan"), float("inf")
NO_REPLICAS: tuple[Any, ...] = (0, -1, 65, 10**9, 1.5, NAN, "two", "2", True, None, [])

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"replica": 2}, "unknown key `replica`; known here are .*replicas"),
    ({"monitoring": {"hz": 2}}, "unknown key `monitoring.hz`; known here are .*port, memory_reserve_gib, sample_hz"),
    ({"balancer": {"polcy": "x"}}, "unknown key `balancer.polcy`; known here are .*policy"),
    ({"engine": {"max_model_length": 5}}, "unknown engine argument `engine.max_model_length`"),
    ({"engine": {"max-model-len": 5}}, "unknown engine argument `engine.max-model-len`.*underscores"),
    ({"balancer": {"policy": "best"}}, "`balancer.policy` is 'best', but it must be one of gpu_aware, least_queue"),
    ({"device": "tpu"}, "`device` is 'tpu', but it should be 'auto', 'gpu' or 'cpu'"),
    ({"mps": "maybe"}, "`mps` is 'maybe', but it should be 'auto', 'on' or 'off'"),
    ({"model": ""}, "`model` is '', but it should have at least 1 character"),
    ({"model": 5}, "`model` is 5, but it should be a valid string"),
    ({"served_model_name": ""}, "`served_model_name` is ''"),
    ({"engine": []}, r"`engine` is \[\], but it should be a valid dictionary"),
    ({"balancer": 3}, "`balancer` is 3, but it should be a valid dictionary"),
    ({"monitoring": None}, "`monitoring` is None"),
    ({"access": {"keys": "x"}}, "unknown key `access.keys`; known here are .*api_keys_file"),
    ({"access": {"api_keys_file": "keys"}}, "`access.api_keys_file` is 'keys', but it must be an absolute path"),
    ({"access": {"api_keys_file": "/keys"}, "engine": {"api_key": "x"}}, "ask for two keys in one header"),
    ({"access": {"extra_routes": ["version"]}}, "`access.extra_routes` is .*must be paths such as /version"),
    ({"access": {"extra_routes": ["/a b' }"]}}, "`access.extra_routes` is "),
    *(
        ({"access": {key: value}}, f"`access.{key}` is ")
        for key, value in [
            ("requests_per_minute", 0), ("tokens_per_minute", -1), ("concurrent", 0), ("concurrent", "x"),
            ("body_bytes", 0), ("body_bytes", "many"), ("file_bytes", -1), ("header_bytes", 10), ("header_bytes", "1M"),
            ("header_s", 0), ("body_s", NAN), ("body_s", INFINITE), ("body_s", 0),
        ]
    ),
    ({"batches": {"threshhold": 2}}, "unknown key `batches.threshhold`; known here are concurrency, enabled, folder"),
    ({"batches": {"threshold": 1}}, "`batches.threshold` is 1"),
    ({"batches": {"concurrency": 0}}, "`batches.concurrency` is 0"),
    ({"batches": {"folder_gib": 0.0}}, "`batches.folder_gib` is 0.0"),
    *(({"replicas": n}, "`replicas` is ") for n in NO_REPLICAS),
    *(({"monitoring": {"sample_hz": hz}}, "`monitoring.sample_hz` is ") for hz in (0, -5, 101, NAN, INFINITE, "fast")),
    *(({"monitoring": {"memory_reserve_gib": g}}, "`monitoring.memory_reserve_gib` is ") for g in (-1, INFINITE, NAN)),
    *(
        ({"balancer": {key: value}}, f"`balancer.{key}` is ")
        for key, value in [
            ("stale_after_s", 0), ("stale_after_s", -1), ("stale_after_s", INFINITE), ("queue_limit", -1),
            ("queue_limit", 1.5), ("queue_deadline_s", -0.1), ("active_set", 0), ("kv_reserve_ratio", 1),
            ("kv_reserve_ratio", -0.1), ("overtake_limit", -1), ("overtake_patience_s", NAN),
            ("affinity_load_bound", 0),
            ("gain_ratio", -1), ("default_output_tokens", 0), ("seed", "x"), ("queue_limit", None),
        ]
    ),
    *(
        ({"engine": {key: value}}, f"`engine.{key}` is ")
        for key, value in [
            ("max_model_len", -5), ("max_model_len", 0), ("max_model_len", "long"), ("max_model_len", 10.5),
            ("max_num_seqs", 0), ("max_num_seqs", True), ("kv_cache_memory_bytes", -1), ("kv_cache_memory_bytes", 0),
            ("gpu_memory_utilization", 3), ("gpu_memory_utilization", 0), ("gpu_memory_utilization", NAN),
            ("max_num_batched_tokens", 0), ("block_size", 0), ("cpu_offload_gb", -1), ("max_logprobs", -2),
            ("num_gpu_blocks_override", 0), ("stream_interval", 0), ("max_loras", 0), ("watermark", 1),
        ]
    ),
    *(({"engine": {key: 1}}, f"`engine.{key}` belongs to the system: ") for key in OWNED_ENGINE_ARGUMENTS),
]  # fmt: skip


def is_one_sentence(text: str) -> bool:
    return "\n" not in text and not re.search(r"[.!?]\s+[A-Z]", text) and len(text) < 400


@pytest.mark.parametrize(("raw", "says"), REFUSED, ids=[str(raw)[:60] for raw, _ in REFUSED])
def test_a_mistake_is_one_sentence_that_names_its_key(raw: dict[str, Any], says: str) -> None:
    """Unknown keys at each level, impossible numbers and what the system owns are refused by name."""
    with pytest.raises(ConfigError, match=says) as refusal:
        parse_args(raw)
    assert is_one_sentence(str(refusal.value))


@pytest.mark.parametrize("raw", [[], "demo", 5, [{"model": "demo"}]])
def test_arguments_that_are_no_mapping_are_refused(raw: Any) -> None:
    """`args` itself is named when it is something else than keys and values."""
    with pytest.raises(ConfigError, match="`args` is "):
        parse_args(raw)


def test_every_default_stands() -> None:
    """No argument at all is a working configuration, and its balancer has the knobs' own defaults."""
    args = parse_args({})
    assert (args.model, args.public_name, args.replicas, args.device, args.mps) == ("demo", "demo", 2, "auto", "auto")
    assert args.engine == {}
    assert args.balancer.knobs() == Knobs()


def test_what_is_set_is_kept() -> None:
    """Values arrive where they belong; engine arguments are passed through untouched."""
    engine = {"enforce_eager": True, "dtype": "bfloat16", "max_num_seqs": 8, "compilation_config": {"mode": 0}}
    args = parse_args(
        {
            "model": "org/name", "served_model_name": "mine", "replicas": 64, "engine": engine,
            "balancer": {"policy": "least_queue", "stale_after_s": 1, "active_set": 3},
            "monitoring": {"sample_hz": 10, "memory_reserve_gib": 0},
        }
    )  # fmt: skip
    assert (args.public_name, args.replicas, args.engine) == ("mine", 64, engine)
    assert args.balancer.knobs() == Knobs(policy="least_queue", stale_after_s=1, active_set=3)
    assert args.monitoring.sample_hz == 10


@pytest.mark.parametrize(
    ("written", "meant"),
    [("8k", 8000), ("8K", 8192), ("25.6k", 25600), ("4096", 4096), ("auto", -1), (-1, -1), (512, 512)],
)
def test_numbers_may_be_written_as_vllm_writes_them(written: Any, meant: int) -> None:
    """vLLM's short forms of large numbers become numbers, for the memory plan reckons with them."""
    assert parse_args({"engine": {"max_model_len": written}}).engine == {"max_model_len": meant}


def test_an_engine_argument_set_to_nothing_is_not_set() -> None:
    """`max_num_seqs:` without a value in the file means vLLM's own."""
    assert parse_args({"engine": {"max_num_seqs": None, "kv_cache_memory_bytes": None}}).replicas == 2


@pytest.mark.parametrize(("yaml_text", "meant"), [("on", "on"), ("off", "off"), ("auto", "auto"), ("'on'", "on")])
def test_mps_on_is_not_yamls_true(yaml_text: str, meant: str) -> None:
    """YAML reads a bare `on` as true; it means on."""
    assert parse_args(yaml.safe_load(f"mps: {yaml_text}")).mps == meant


def test_the_bounds_are_those_of_keys_that_exist() -> None:
    """Each bound belongs to a knob or to an engine argument of the installed vLLM, and every numeric knob has one."""
    names = argument_names()
    assert set(EngineBounds.model_fields) <= names
    of_the_command_alone = {"api_server_count", "headless"}
    assert set(OWNED_ENGINE_ARGUMENTS) - of_the_command_alone <= names
    assert set(KnobBounds.model_fields) == {field.name for field in dataclasses.fields(Knobs)} - {"policy"}
    for knob, value in dataclasses.asdict(Knobs()).items():
        assert parse_args({"balancer": {knob: value}} if value is not None else {}).balancer.knobs() == Knobs()


def test_the_knobs_defaults_lie_within_their_bounds() -> None:
    """What is the default may also be written into the file."""
    defaults = {key: value for key, value in dataclasses.asdict(Knobs()).items() if value is not None}
    assert parse_args({"balancer": defaults}).balancer.knobs() == Knobs()
    assert BalancerConfig().policy == Knobs().policy


# --- the file ---


def document(**changes: Any) -> dict[str, Any]:
    application = {"name": "default", "import_path": "deployments.app:build", "args": {"replicas": 3}}
    return {"applications": [{**application, **changes}]}


def write(folder: Path, content: Any) -> Path:
    path = folder / "serve_config.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def test_a_file_is_read(tmp_path: Path) -> None:
    """The one application's arguments and the whole document come back."""
    args, whole = load(write(tmp_path, {**document(), "http_options": {"port": 8123}}))
    assert args.replicas == 3
    assert whole["http_options"] == {"port": 8123}


def test_an_application_without_arguments_takes_the_defaults(tmp_path: Path) -> None:
    """`args:` may be left empty."""
    assert load(write(tmp_path, document(args=None)))[0].replicas == 2


@pytest.mark.parametrize("name", sorted(path.name for path in ROOT.glob("serve_config*.yaml")))
def test_the_files_as_shipped_are_fine(name: str) -> None:
    """What this project ships as examples passes its own checks."""
    args, _ = load(ROOT / name)
    assert args.replicas >= 2


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("a: [1", "is not valid YAML"),
        ("a: b: c", "is not valid YAML"),
        ("\tx: 1", "is not valid YAML"),
        ("", "exactly one entry under `applications`"),
        ("just words", "exactly one entry under `applications`"),
        ({"applications": []}, "exactly one entry under `applications`"),
        ({"applications": {"name": "x"}}, "exactly one entry under `applications`"),
        ({"applications": ["x"]}, "exactly one entry under `applications`"),
        ({"applications": [*document()["applications"] * 2]}, "exactly one entry under `applications`"),
        (document(import_path="my.app:build"), "`import_path` in .* must be deployments.app:build"),
        ({"applications": [{"args": {}}]}, "`import_path` in .* must be"),
        (document(arg={}), "unknown key `applications.0.arg`; known here are args,"),
        ({**document(), "http_option": {}}, "unknown key `http_option`; known here are applications,"),
        ({**document(), "http_options": {"port": 0}}, "`http_options.port` is 0, but it should be"),
        ({**document(), "http_options": {"port": 65536}}, "`http_options.port` is 65536, but it should be"),
        ({**document(), "http_options": {"port": "web"}}, "`http_options.port` is 'web', but it should be"),
        ({**document(), "http_options": {"host": 5}}, "`http_options.host` is 5, but it should be"),
        ({**document(), "http_options": [8000]}, r"`http_options` is \[8000\], but it should be"),
        (document(args={"replicas": 0}), "`replicas` is 0"),
        (document(args=[1]), "`args` is "),
    ],
)
def test_a_file_that_cannot_be_used_is_one_sentence(tmp_path: Path, content: Any, says: str) -> None:
    """No YAML, no application of this project, unknown keys of the file itself, or impossible arguments."""
    with pytest.raises(ConfigError, match=says) as refusal:
        load(write(tmp_path, content))
    assert is_one_sentence(str(refusal.value).replace(str(tmp_path), ""))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    """A missing file, a folder, and a file that is not text are refused by name."""
    for path in (tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(ConfigError, match=f"cannot read {path}: .*; name an existing"):
            load(path)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ConfigError, match=r"binary\.yaml is not valid YAML"):
        load(binary)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_known_keys_of_a_file_are_rays() -> None:
    """Ray ignores keys it does not know, so they are checked here, against the names that this Ray has."""
    from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

    assert set(ServeDeploySchema.model_fields) == DOCUMENT_KEYS
    assert set(ServeApplicationSchema.model_fields) == APPLICATION_KEYS


def test_the_address_has_serves_defaults() -> None:
    """Without http_options the address is this machine's port 8000."""
    assert HttpBounds().model_dump() == {"host": "127.0.0.1", "port": 8000}


def test_replicas_on_all_gpus_are_counted_together() -> None:
    """So many on each; together they must fit the board."""
    assert parse_args({"replicas": 3, "gpus": 4}).total_replicas == 12
    with pytest.raises(ConfigError, match="replicas x gpus must be at most 64"):
        parse_args({"replicas": 20, "gpus": 4})


def test_off_may_be_written_as_yaml_reads_it() -> None:
    """YAML turns `off` into false, for pinning and for the memory cap as for MPS."""
    args = parse_args({"cpu_pinning": False, "mps_limits": {"memory": False}})
    assert (args.cpu_pinning, args.mps_limits.memory) == ("off", "off")


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({"mps_limits": {"thread_percent": 5}}, "unknown key `mps_limits.thread_percent`; known here are memory"),
        ({"mps_limits": {"thread_percentage": 101}}, "`mps_limits.thread_percentage` is 101, but it should be less"),
        ({"restarts": {"deaths": 0}}, "`restarts.deaths` is 0, but it should be greater"),
        ({"start": "slowly"}, "`start` is 'slowly', but it should be 'auto', 'together' or 'first_alone'"),
    ],
)
def test_a_mistake_in_the_gpus_settings_is_named(raw: dict[str, Any], says: str) -> None:
    """Also within their sections."""
    with pytest.raises(ConfigError) as caught:
        parse_args(raw)
    assert str(caught.value).startswith(says)


def test_batches_are_split_from_the_threshold_on_or_never() -> None:
    """On by default; switched off, no number of prompts is split."""
    assert parse_args({}).batches.split_from == 8
    assert parse_args({"batches": {"threshold": 100}}).batches.split_from == 100
    assert parse_args({"batches": {"enabled": False}}).batches.split_from == 0
