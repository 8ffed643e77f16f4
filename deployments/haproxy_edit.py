"""Stands between Ray Serve and HAProxy's binary: edits what Serve wrote, then becomes the binary.

Run as a script, without site-packages, at every start and reload: `haproxy_edit.py PLAN BINARY ARGUMENT...`. The plan,
with edits for the configuration and for the Lua script that it loads, is made by `deployments.ingress`. What it does
not know is refused: an ingress that does not start is noticed, one with a hole is not.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence

_MARK = " edited by splitwiser\n"

# A pattern that must be found as often as the number says (at least once for -1, perhaps for 0), and what replaces it.
Edit = tuple[str, str, int]


class UnknownConfigurationError(ValueError):
    """A line that should be edited is not there."""


def edited(text: str, plan: Sequence[Edit], comment: str = "#") -> str:
    """`text` with every edit made; what was edited before comes back as it is. `comment` begins one in its language.

    Raises UnknownConfigurationError.
    """
    if text.startswith(comment + _MARK):
        return text
    for pattern, replacement, times in plan:
        text, found = re.subn(pattern, replacement, text, flags=re.MULTILINE)
        if (times == -1 and found == 0) or (times > 0 and found != times):
            raise UnknownConfigurationError(
                f"Ray Serve's HAProxy configuration has {found} lines like {pattern!r}; install ray==2.60.0"
            )
    return comment + _MARK + text


def _edit(path: str, plan: Sequence[Edit], comment: str = "#") -> str:
    with open(path, encoding="utf-8") as file:
        text = edited(file.read(), plan, comment)
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
    return text


def main(plan_path: str, binary: str, arguments: Sequence[str]) -> None:
    """Edit the file after `-f` and the scripts it loads, then run `binary` with `arguments` in this process's place."""
    if "-f" in arguments:
        with open(plan_path, encoding="utf-8") as file:
            plan = json.load(file)
        config = _edit(arguments[arguments.index("-f") + 1], plan["configuration"])
        for script in re.findall(r"^ *lua-load-per-thread (\S+)", config, re.MULTILINE):
            _edit(script, plan["script"], "--")
    os.execv(binary, [binary, *arguments])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
