"""Stands between Ray Serve and HAProxy's binary: edits the configuration that Serve wrote, then becomes the binary.

Run as a script, without site-packages, at every start and reload: `haproxy_edit.py PLAN BINARY ARGUMENT...`. The plan
is made by `deployments.ingress`. A configuration that it does not know is refused: an ingress that does not start is
noticed, one with a hole is not.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence

_MARK = "# edited by splitwiser\n"

# A pattern that must be found as often as the number says (at least once for -1, perhaps for 0), and what replaces it.
Edit = tuple[str, str, int]


class UnknownConfigurationError(ValueError):
    """A line that should be edited is not there."""


def edited(config: str, plan: Sequence[Edit]) -> str:
    """`config` with every edit made; a configuration that was edited before comes back as it is.

    Raises UnknownConfigurationError.
    """
    if config.startswith(_MARK):
        return config
    for pattern, replacement, times in plan:
        config, found = re.subn(pattern, replacement, config, flags=re.MULTILINE)
        if (times == -1 and found == 0) or (times > 0 and found != times):
            raise UnknownConfigurationError(
                f"Ray Serve's HAProxy configuration has {found} lines like {pattern!r}; install ray==2.60.0"
            )
    return _MARK + config


def main(plan_path: str, binary: str, arguments: Sequence[str]) -> None:
    """Edit the file after `-f`, then run `binary` with `arguments` in this process's place."""
    path = arguments[arguments.index("-f") + 1] if "-f" in arguments else None
    if path is not None:
        with open(plan_path, encoding="utf-8") as file:
            plan = json.load(file)
        with open(path, encoding="utf-8") as file:
            config = file.read()
        with open(path, "w", encoding="utf-8") as file:
            file.write(edited(config, plan))
    os.execv(binary, [binary, *arguments])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
