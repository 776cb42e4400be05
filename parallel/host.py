"""Which host this is."""

from __future__ import annotations

import socket
from functools import cache
from pathlib import Path


@cache
def host() -> str:
    """The same text in all processes of this host, and another one elsewhere."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''}"
