"""docs/migrating.md: each program, as it stands, gives on two ranks what it gives on one."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from pool import Pools

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "migrating.md").read_text()
PROGRAMS = {
    section.splitlines()[0]: program
    for section in PAGE.split("\n## ")[1:]
    for program in re.findall(r"^```python\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)
}
"""By the heading of the section."""


def _printed(program: str) -> list[float]:
    """Numbers that a program prints in a process whose group is there already."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(dist, "init_process_group", lambda: None)
        if "import deepspeed" in program:
            from ringflash.deepspeed import import_deepspeed

            import_deepspeed(torch.device("cpu"))  # without an operator that takes minutes to compile
        exec(compile(program, "docs/migrating.md", "exec"), {"__name__": "__main__"})
    return [float(x) for x in printed.getvalue().split()]


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_gives_on_two_ranks_what_it_gives_on_one(pool: Pools, name: str) -> None:
    (expected,) = pool(1).run(_printed, PROGRAMS[name], timeout=200)
    assert len(expected) >= 3
    for found in pool(2).run(_printed, PROGRAMS[name], timeout=200):
        assert found == pytest.approx(expected, rel=2e-5)


def test_every_section_has_a_program() -> None:
    assert len(PROGRAMS) == PAGE.count("\n## ") == 5
