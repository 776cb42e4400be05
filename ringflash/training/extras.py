"""Optional libraries: a key that asks for one that is not installed is refused with what to install."""

from __future__ import annotations

from importlib.util import find_spec

from ringflash.errors import ArgumentError


def require(key: str, *libraries: str, extra: str | None = "huggingface") -> None:
    """Raise ArgumentError unless libraries are installed.

    Args:
        key: of the configuration, with its value, that asks for them.
        libraries: names to import.
        extra: of ringflash, which installs them; None for those that none does.
    """
    absent = [library for library in libraries if find_spec(library) is None]
    if absent:
        wanted = " ".join(absent) if extra is None else f"'ringflash[{extra}]'"
        raise ArgumentError(f"{key} needs {' and '.join(absent)}: pip install {wanted}")
