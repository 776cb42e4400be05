"""`python launch/plan.py`: what it predicts, measures, keeps and draws."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

from ringflash.launch import plan
from ringflash.launch.plan_hosts import RANKS
from ringflash.parallel.planning.generators import NAMES
from ringflash.parallel.planning.machine import SEND_RECV, measured_machine

NUMBER = r"\d+\.\d{3}"


def run(*words: str) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        plan.main(words)
    return said.getvalue()


def test_key_value_words_are_options(tmp_path: Path) -> None:
    words = ("ranks=3", "length=100", "window=9", "partition=contiguous", f"svg={tmp_path / 'a.svg'}")
    options = ("--ranks", "3", "--length", "100", "--window", "9", "--partition", "contiguous")
    assert run(*words).rsplit("\n", 2)[0] == run(*options, "--svg", str(tmp_path / "b.svg")).rsplit("\n", 2)[0]
    assert (tmp_path / "a.svg").read_text() == (tmp_path / "b.svg").read_text()
    assert run("bidirectional=false") == run()


def test_the_plan_that_is_named_is_printed_and_why() -> None:
    said = run("ranks=8", "length=512", "plan=double-ring", "hosts=2", "machine=h100")
    assert "double-ring: keys go round the ranks of a host before they go on to the next host; as it was named" in said
    assert "to rank 4" in said.split("stage 3")[1].split("stage 4")[0]


def test_documents_are_balanced_where_no_partition_is_named() -> None:
    assert "balanced over 4 ranks" in run("documents=0,700,1500,4096")
    assert "zigzag over 4 ranks" in run("documents=0,700,1500,4096", "partition=zigzag")


def test_all_plans_are_compared_the_fastest_first() -> None:
    said = run("plan=all", "ranks=64", "hosts=8", "length=1048576", "machine=h100")
    found = re.findall(rf"^  ([\w-]+): ({NUMBER}) ms", said, re.MULTILINE)
    assert {name for name, _ in found} == set(NAMES)
    assert [float(x) for _, x in found] == sorted(float(x) for _, x in found)
    on_one_host = run("plan=all", "ranks=4", "length=131072", "machine=h100-copy-engine")
    assert re.search(rf"  heads: ({NUMBER}) ms.*; all ranks exchange heads for tokens", on_one_host)


def test_times_of_every_rank_and_stage_are_printed_and_drawn(tmp_path: Path) -> None:
    said = run("times=true", "length=131072", "machine=h100", f"picture={tmp_path / 'times.png'}")
    for name in ("forward", "backward"):
        of_pass = said.split(f"{name}: predicted ")[1]
        assert len(re.findall(rf"rank \d: {NUMBER} \+ {NUMBER}\n", of_pass.split("backward:")[0])) == 16
    assert (tmp_path / "times.png").read_bytes()[:4] == b"\x89PNG"


def test_hosts_that_are_not_there_are_simulated_and_drawn(tmp_path: Path) -> None:
    said = run("simulate=true", "machine=h100", f"picture={tmp_path / 'hosts.png'}")
    rows = [line.split("|")[1:-1] for line in said.splitlines() if line.startswith(("| causal", "| documents"))]
    assert {int(row[2]) for row in rows} == set(RANKS)
    shares = [float(x) for row in rows for x in row[3:]]
    assert len(shares) == 4 * len(RANKS) * len(NAMES)
    assert all(0 < x <= 1 for x in shares)
    assert (tmp_path / "hosts.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("plan=rings", "plan='rings'; allowed are ring"),
        ("hosts=3", "hosts=3; allowed are numbers from 1 that divide the 4 ranks"),
        ("heads=32,7,128", "--heads 32,7,128; allowed are"),
        ("machine=nowhere", "--machine nowhere; allowed are h100"),
        ("measure=true", "--measure with --ranks None in 1 processes"),
        ("ranks=0", "--ranks 0"),
    ],
)
def test_what_cannot_be_is_refused(word: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        plan.main([word])
    assert said in capsys.readouterr().err


def _calibrate_and_measure(folder: str) -> tuple[str, str]:
    machine = f"machine={folder}/machine.json"
    kept = run("calibrate=true", machine)
    return kept, run(
        "measure=true",
        machine,
        "length=1024",
        "heads=4,2,32",
        "plan=ring",
        f"picture={folder}/measured.png",
    )


def test_ranks_calibrate_together_and_measure_beside_what_is_predicted(pool, tmp_path: Path) -> None:
    """The same figures on all ranks; times of each rank and stage, which make up what the pass took."""
    (kept, said), (nothing, none) = pool(2).run(_calibrate_and_measure, str(tmp_path))
    assert nothing == none == ""
    machine = measured_machine(tmp_path / "machine.json")
    assert machine.text() in kept
    assert machine.name.startswith("2 x ")
    assert machine.inside != SEND_RECV.inside  # was measured
    assert machine.outside == SEND_RECV.outside  # one host has none
    for name in ("forward", "backward"):
        of_pass = said.split(f"{name}: predicted ")[1].split("backward:")[0]
        total = float(re.search(rf"measured ({NUMBER}) ms", of_pass)[1])
        lines = re.findall(rf"rank (\d): {NUMBER} \+ {NUMBER}; measured ({NUMBER}) \+ ({NUMBER})", of_pass)
        assert len(lines) == 4
        sums = [sum(float(a) + float(b) for rank, a, b in lines if rank == str(which)) for which in (0, 1)]
        assert max(sums) == pytest.approx(total, abs=0.01)
        assert all(float(a) > 0 for _, a, _ in lines)
    assert (tmp_path / "measured.png").read_bytes()[:4] == b"\x89PNG"
