"""Exact attention over sequences too long for one GPU."""

from pathlib import Path as _Path

_checkout = _Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file() and (_checkout / "kernels").is_dir():
    # In a checkout the sibling folders are this package's subpackages; an installed wheel holds them inside.
    __path__.append(str(_checkout))
