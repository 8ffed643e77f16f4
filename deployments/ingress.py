"""What is changed in Ray Serve's HAProxy: who may connect where, what is refused at once, what the router hears.

Serve lets everybody connect to HAProxy's metrics, statistics and administration, sets no limit to a request's size or a
sender's slowness, and answers in HTML. All of it is mended in the configuration, by `deployments.haproxy_edit`.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from balancer import hint
from deployments import errors, haproxy_edit, routes
from deployments.haproxy_edit import Edit

# The longest target that uvicorn's parser takes.
_TARGET_BYTES = 8192
_METHODS = ("GET", "HEAD", "POST", "DELETE", "OPTIONS")
# Serve answers these itself, for load balancers.
_SERVES_OWN = ("/-/healthz", "/-/routes")
_REQUEST_ID = "^[A-Za-z0-9._:-]{1,128}$"
# One entry for each key that was shown lately; the least used is forgotten first.
_KEYS_TABLE = "backend splitwiser_keys\n    stick-table type string len 64 size 64k expire 10m store http_req_cnt\n"
# A request waits for its replica in the HAProxy that took it. That one may have been replaced meanwhile, and then knows
# none of the replicas that came later; the router says where they are.
_BY_ADDRESS = """backend splitwiser_by_address
    http-reuse never
    http-request set-dst var(txn.splitwiser_host)
    http-request set-dst-port var(txn.splitwiser_port)
    server replica 0.0.0.0:0
"""
SCRIPT_EDITS: list[Edit] = [
    (
        r"^    if not server_name then\n",
        r"""    local host, port = response_body:match('"address"%s*:%s*"([%d.]+):(%d+)"')
    if not server_name and host then
        set_router_response_headers(txn, response_body)
        txn:set_var("txn.splitwiser_host", host)
        txn:set_var("txn.splitwiser_port", port)
        txn:set_var("txn.via_ingress_request_router", true)
        return
    end
    if not server_name then
""",
        1,
    )
]
# What Serve turns into a bare 500 each; said as the rest of the system says it.
_SERVER_ERRORS = {
    502: ("Bad Gateway", "replica_died", "the replica broke off before it answered; send the request again"),
    503: ("Service Unavailable", "replica_unreachable", "no replica can be reached now; try again later"),
    504: ("Gateway Timeout", "replica_silent", "the replica did not answer within the server's limit"),
}
_NO_ROUTER = (503, "the router cannot be asked now; try again later", "router_unreachable")
_RETRY_AFTER_S = 1
# What HAProxy says itself, instead of its pages; 2.8 uses its own nevertheless for what it cannot parse at all (#3032).
_OWN_ERRORS = {
    400: ("Bad Request", "bad_http", "this is not a valid HTTP request"),
    408: ("Request Timeout", "too_slow", "the request did not arrive in time"),
}


@dataclass(frozen=True, slots=True)
class Entrance:
    """The public side's limits: sizes in bytes, times in seconds, and routes opened beside the usual ones."""

    body_bytes: int
    file_bytes: int
    header_bytes: int
    header_s: float
    body_s: float
    extra_routes: tuple[str, ...] = ()


def write_stand_in(
    folder: Path, name: str, binary: str, entrance: Entrance, host: str, loopback_ports: Sequence[int]
) -> None:
    """The script that Serve starts instead of HAProxy's binary, and what it needs, in the run's private folder."""
    plan, script = folder / "haproxy.json", folder / name
    plan.write_text(
        json.dumps({"configuration": edits(folder, entrance, host, loopback_ports), "script": SCRIPT_EDITS})
    )
    for status, words in _OWN_ERRORS.items():
        (folder / f"{status}.http").write_text(_page(status, *words), newline="")
    for status, words in _SERVER_ERRORS.items():
        (folder / f"{status}.http").write_text(_page(status, *words, f"retry-after: {_RETRY_AFTER_S}\r\n"), newline="")
    (folder / "no-router.json").write_text(json.dumps(errors.body(*_NO_ROUTER)))
    command = [sys.executable, "-I", "-S", haproxy_edit.__file__, str(plan), binary]
    script.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
    script.chmod(0o700)


def edits(folder: Path, entrance: Entrance, host: str, loopback_ports: Sequence[int]) -> list[Edit]:
    """Everything that is changed in Serve's configuration. `host` is where the public address is, and nothing else."""
    ports = "|".join(map(str, loopback_ports))
    errorfiles = "".join(f"    errorfile {status} {folder}/{status}.http\n" for status in _OWN_ERRORS)
    timeouts = f"    timeout http-request {_ms(entrance.header_s)}\n"
    rules = "".join(f"    {rule}\n" for rule in frontend_rules(entrance))
    return [
        (r"^( *stats socket \S+ mode) 666 ", r"\1 600 ", 1),
        (rf"^( *bind) [*]?:({ports})$", r"\1 127.0.0.1:\2", len(loopback_ports)),
        (r"^defaults\n", _literal("defaults\n" + timeouts + errorfiles), 1),
        (
            r"^(frontend http_frontend\n *bind) \S*:(\d+)\n",
            rf"\1 {host}:\2" + _literal("\n" + rules),
            1,
        ),
        (r"^( *errorfile) (502|503|504) .*", rf"\1 \2 {folder}/\2.http", 0),
        # Serve's line is for what its script says failed. Where the client leaves meanwhile, HAProxy ends the script
        # without a word, and the request would go to any replica.
        (
            r'^( *http-request return status 503) content-type text/plain lf-string "Ingress request router.*',
            rf"\1 content-type application/json file {folder}/no-router.json hdr Retry-After {_RETRY_AFTER_S}"
            " if METH_POST has_ingress_request_router_app !{ var(txn.via_ingress_request_router) -m found }"
            "\n    use_backend splitwiser_by_address if { var(txn.splitwiser_host) -m found }",
            0,
        ),
        # Behind the replicas Serve puts its own proxy, which keeps requests for as long as none is there.
        (r"^( *server \S+ .*\bbackup)$", r"\1 weight 0", 0),
        (r"wait-for-body time \d+s ", f"wait-for-body time {_ms(entrance.body_s)} ", 0),
        (r"\Z", _literal(_KEYS_TABLE + _BY_ADDRESS), 1),
    ]


def frontend_rules(entrance: Entrance) -> list[str]:
    """The public address's rules, before all of Serve's."""
    paths = " ".join(sorted(routes.public(entrance.extra_routes).exact.union(_SERVES_OWN)))
    return [
        _refuse(431, "headers_too_large", f"headers may have {entrance.header_bytes} bytes",
                f"{{ req.hdrs,length gt {entrance.header_bytes} }}"),
        _refuse(414, "target_too_long", "the address is too long", f"{{ url,length gt {_TARGET_BYTES} }}"),
        f"acl splitwiser_public path -m str {paths}",
        f"acl splitwiser_public path_beg {' '.join(routes.PREFIXES)}",
        _refuse(404, None, "there is no such route here", "!splitwiser_public"),
        _refuse(405, None, "this method is not served here", f"!{{ method {' '.join(_METHODS)} }}"),
        f"acl splitwiser_file path -m str {routes.FILES}",
        _refuse(413, "body_too_large", f"a body may have {entrance.body_bytes} bytes",
                f"!splitwiser_file {{ req.body_size gt {entrance.body_bytes} }}"),
        _refuse(413, "body_too_large", f"a file may have {entrance.file_bytes} bytes",
                f"splitwiser_file {{ req.body_size gt {entrance.file_bytes} }}"),
        "http-request del-header x-request-id if { req.hdr_cnt(x-request-id) gt 1 }",
        f"http-request del-header x-request-id if !{{ req.fhdr(x-request-id) -m reg {_REQUEST_ID} }}",
        "http-request set-header x-request-id %[uuid()] if !{ req.hdr(x-request-id) -m found }",
        # Every answer carries its request's id, whoever gives it.
        "http-request set-var(txn.request_id) req.fhdr(x-request-id)",
        "http-after-response set-header x-request-id %[var(txn.request_id)] if { var(txn.request_id) -m found }",
        "http-request track-sc0 req.fhdr(authorization),sha2(256),hex table splitwiser_keys",
        "http-request track-sc0 req.fhdr(x-api-key),sha2(256),hex table splitwiser_keys"
        " if !{ req.hdr(authorization) -m found }",
        hint.haproxy_rule(),
    ]  # fmt: skip


def _refuse(status: int, code: str | None, message: str, condition: str) -> str:
    text = json.dumps(errors.body(status, message, code))
    return f"http-request return status {status} content-type application/json string '{text}' if {condition}"


def _page(status: int, phrase: str, code: str, message: str, more: str = "") -> str:
    text = json.dumps(errors.body(status, message, code))
    head = f"HTTP/1.1 {status} {phrase}\r\ncontent-type: application/json\r\ncontent-length: {len(text)}\r\n{more}"
    return f"{head}connection: close\r\n\r\n{text}"


def _ms(seconds: float) -> str:
    return f"{round(seconds * 1000)}ms"


def _literal(text: str) -> str:
    """As a replacement in which nothing is special."""
    return re.sub(r"\\", r"\\\\", text)
