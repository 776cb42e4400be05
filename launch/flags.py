"""Options of a command line in both spellings: `--key value` and, as Hydra has them, `key=value`."""

from __future__ import annotations

from collections.abc import Sequence


def as_flags(words: Sequence[str]) -> list[str]:
    """key=value words as argparse takes them; key=true is a flag."""
    flags = []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key.startswith("-"):
            flags.append(word)
        elif value == "true":
            flags.append(f"--{key.replace('_', '-')}")
        elif value != "false":
            flags.append(f"--{key.replace('_', '-')}={value}")
    return flags
