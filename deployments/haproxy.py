"""What HAProxy does differently from the configuration that Ray Serve writes, by way of a stand-in for its binary.

Serve offers no hook for HAProxy's configuration. It lets one name the binary, though, and starts that with the file: a
script changes the file and then becomes HAProxy.
"""

from __future__ import annotations

from pathlib import Path

from balancer import hint
from deployments.middleware import REQUEST_ID_PATTERN
from deployments.passage import error_body

# Serve turns each of these into a bare 500. What HAProxy has to say itself, it says as the rest of the system does.
_ERRORS = {
    502: ("Bad Gateway", "replica_died", "the replica broke off before it answered; send the request again"),
    503: ("Service Unavailable", "replica_unreachable", "no replica can be reached now; try again later"),
    504: ("Gateway Timeout", "replica_silent", "the replica did not answer within the server's limit"),
}
_NO_ROUTER = (503, "router_unreachable", "the router cannot be asked now; try again later")
_RETRY_AFTER_S = 1

# In front of Serve's own rules of the public address. `/metrics` would show some replica's; an id that is no id would
# reach logs; and every answer carries its request's id, whoever gives it.
_FRONTEND = (
    "http-request return status 404 if { path_beg -i /metrics }",
    "http-request del-header x-request-id if { req.fhdr_cnt(x-request-id) gt 1 }",
    f"http-request del-header x-request-id if !{{ req.fhdr(x-request-id) -m reg {REQUEST_ID_PATTERN} }}",
    "http-request set-header x-request-id %[uuid()] if !{ req.hdr(x-request-id) -m found }",
    "http-request set-var(txn.request_id) req.fhdr(x-request-id)",
    "http-after-response set-header x-request-id %[var(txn.request_id)] if { var(txn.request_id) -m found }",
    hint.haproxy_rule(),
)


def write(script: Path, binary: str, metrics_port: int, stats_port: int) -> None:
    """Write the stand-in for `binary`, and beside it what it needs.

    Serve binds HAProxy's metrics and statistics to every interface: they are narrowed to loopback.
    """
    folder = script.parent
    for status, (reason, code, message) in _ERRORS.items():
        (folder / f"{status}.http").write_bytes(_response(status, reason, error_body(status, code, message)))
    (folder / "no-router.json").write_bytes(error_body(*_NO_ROUTER))
    edits = [
        rf"s/^( *bind) [*]?:({metrics_port}|{stats_port})$/\1 127.0.0.1:\2/",
        rf"s#^( *errorfile) (502|503|504) .*#\1 \2 {folder}/\2.http#",
        r's#(http-request return status 503) content-type text/plain lf-string "Ingress request router[^"]*"'
        rf"#\1 content-type application/json file {folder}/no-router.json hdr Retry-After {_RETRY_AFTER_S}#",
        *(f"/^frontend http_frontend/a {rule}" for rule in _FRONTEND),
    ]
    script.write_text(_SCRIPT.format(edits=" \\\n        ".join(f"-e '{edit}'" for edit in edits), binary=binary))
    script.chmod(0o700)


_SCRIPT = """#!/bin/sh
for argument; do
    [ "$before" = -f ] && sed -i -E \\
        {edits} "$argument"
    before=$argument
done
exec {binary} "$@"
"""


def _response(status: int, reason: str, body: bytes) -> bytes:
    lines = (
        f"HTTP/1.1 {status} {reason}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        f"Retry-After: {_RETRY_AFTER_S}",
    )
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body
