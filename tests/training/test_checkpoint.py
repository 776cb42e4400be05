"""Checkpoints: whole or not there, found damaged before use, and good under every engine and number of ranks."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import resource
import signal
from pathlib import Path

import pytest
import recipe
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_engine import assert_same

from ringflash.errors import CheckpointError
from ringflash.training.checkpoint import folders, writing
from ringflash.training.checkpoint.files import MANIFEST, STATE, file_of, newest, partial_of, place
from ringflash.training.checkpoint.files import OPTIMIZER as MOMENTS_FILES
from ringflash.training.checkpoint.files import WEIGHTS as WEIGHTS_FILES
from ringflash.training.checkpoint.reading import Checkpoint
from ringflash.training.checkpoint.saving import Saver
from ringflash.training.engines.base import Piece
from ringflash.training.engines.optimizer import MOMENTS

SHAPES = {"embed.weight": (7, 3), "norm.weight": (3,)}
SIZES = {f"{kind}/{name}": shape for name, shape in SHAPES.items() for kind in ("weight", *MOMENTS)}
WEIGHTS, OPTIMIZER = (file_of(kind, 0) for kind in (WEIGHTS_FILES, MOMENTS_FILES))
FILES = (WEIGHTS, OPTIMIZER, STATE)
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def _alone():
    """Saving is a collective; here of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def tensors(step):
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=generator) for name, shape in SIZES.items()}


def pieces(whole, start=lambda size: 0, stop=lambda size: size):
    """The same share of each tensor."""
    for name, tensor in whole.items():
        first, last = start(tensor.numel()), stop(tensor.numel())
        if first < last:
            yield Piece(name, first, last - first, lambda t=tensor, a=first, b=last: t.flatten()[a:b])


def save(root, step, keep=9):
    return Saver(root, CPU, keep).save(step, pieces(tensors(step)), SIZES, {"step": step, "text": "ß"})


def assert_holds(path, step):
    found = Checkpoint(path)
    assert found.state == {"step": step, "text": "ß"}
    for name, tensor in tensors(step).items():
        assert torch.equal(found.read(name), tensor)


def test_what_was_saved_is_read_back_and_is_plain_safetensors(tmp_path):
    path = save(tmp_path, 5)
    assert_holds(path, 5)
    weights = load_file(path / WEIGHTS)
    assert weights.keys() == SHAPES.keys()
    assert torch.equal(weights["norm.weight"], tensors(5)["weight/norm.weight"])
    assert (tmp_path / "latest").read_text() == path.name


@pytest.mark.parametrize("file", [*FILES, MANIFEST])
@given(data=st.data())
def test_a_flipped_bit_anywhere_is_found_and_its_file_named(tmp_path_factory, file, data):
    path = save(tmp_path_factory.mktemp("run"), 1)
    content = bytearray((path / file).read_bytes())
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << bit % 8
    (path / file).write_bytes(content)
    if file != MANIFEST:
        with pytest.raises(CheckpointError, match=f"{path / file} is damaged"):
            Checkpoint(path)
        return
    try:  # a manifest that still says the same, like one with other white space, does no harm
        assert_holds(path, 1)
    except CheckpointError as error:
        assert str(path) in str(error)  # noqa: PT017


@pytest.mark.parametrize("file", [*FILES, MANIFEST])
def test_a_short_or_absent_file_is_named(tmp_path, file):
    path = save(tmp_path, 1)
    content = (path / file).read_bytes()
    (path / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=f"{path / file}"):
        Checkpoint(path)
    (path / file).unlink()
    with pytest.raises(CheckpointError, match=f"{path / file}: No such file"):
        Checkpoint(path)


def test_the_newest_complete_checkpoint_wins(tmp_path):
    assert newest(tmp_path / "none") is None
    first, second = save(tmp_path, 90), save(tmp_path, 100)
    assert newest(tmp_path) == second
    (tmp_path / "step-00000200.partial").mkdir()
    (tmp_path / "step-00000300").mkdir()
    (tmp_path / "latest").unlink()
    assert newest(tmp_path) == second
    (second / MANIFEST).unlink()
    assert newest(tmp_path) == first


def test_only_the_newest_are_kept_and_what_a_killed_run_left_is_removed(tmp_path):
    (tmp_path / "step-00000001.partial").mkdir()
    for step in (10, 9, 11, 100):
        save(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000011", "step-00000100"]


def _folder_with_half_a_file(path):
    path.mkdir()
    (path / WEIGHTS).write_bytes(b"half")


LEFT = {
    "folder": _folder_with_half_a_file,
    "file": lambda path: path.write_bytes(b"half"),
    "dangling_link": lambda path: path.symlink_to("nowhere"),
    "link_to_a_folder": lambda path: path.symlink_to(path.parent.parent),
}


@pytest.mark.parametrize("leave", LEFT.values(), ids=LEFT)
@pytest.mark.parametrize("name", ["step-00000100", "step-00000100.partial", "step-00000050.partial", "step-00000300"])
def test_whatever_a_killed_run_left_under_a_name_does_not_keep_a_step_from_being_saved(tmp_path, name, leave):
    root = tmp_path / "run"
    first = save(root, 90)
    leave(root / name)
    assert newest(root) == first
    for step in (100, 110):
        assert_holds(save(root, step, keep=2), step)
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step-00000100", "step-00000110"]
    assert tmp_path.exists()


def test_a_removal_that_was_killed_at_any_moment_does_not_keep_its_step_from_being_saved_again(tmp_path):
    for number in range(len(FILES) + 1):
        root = tmp_path / str(number)
        path = save(root, 100)
        for name in (MANIFEST, *FILES)[: number + 1]:
            (path / name).unlink()
        assert newest(root) is None
        assert_holds(save(root, 100), 100)


def test_what_is_left_of_checkpoints_does_not_count_as_kept(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step)
    (tmp_path / "step-00000030" / MANIFEST).unlink()
    assert_holds(save(tmp_path, 25, keep=2), 25)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000020", "step-00000025"]


def test_a_complete_checkpoint_is_not_replaced(tmp_path):
    path = save(tmp_path, 7)
    with pytest.raises(CheckpointError, match=f"{path}: not saved: .*the last good one is {path}"):
        save(tmp_path, 7)
    assert_holds(path, 7)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["latest", path.name]


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ({"embed.weight": (7, 4), "norm.weight": (3,)}, r"embed.weight is \(7, 3\) there and \(7, 4\) here"),
        ({"embed.weight": (7, 3)}, r"norm.weight is \(3,\) there and absent here"),
        ({**SHAPES, "head.weight": (7, 3)}, r"head.weight is absent there and \(7, 3\) here"),
    ],
    ids=["shape", "missing_here", "missing_there"],
)
def test_a_checkpoint_of_another_model_is_refused_by_parameter(tmp_path, shapes, said):
    with pytest.raises(CheckpointError, match=said):
        Checkpoint(save(tmp_path, 1)).check_shapes(shapes)


class _FailingWrites:
    """Lets so many writes, renames and syncs pass, then the disk is full."""

    def __init__(self, monkeypatch, passing):
        self.left = passing
        for owner, name in (
            (writing.HashedFile, "write"),
            (os, "fsync"),
            (os, "replace"),
            (Path, "rename"),
            (Path, "mkdir"),
        ):
            monkeypatch.setattr(owner, name, self._wrap(getattr(owner, name)))

    def _wrap(self, function):
        def limited(*args, **kwargs):
            self.left -= 1
            if self.left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*args, **kwargs)

        return limited


def test_a_disk_that_is_full_at_any_moment_leaves_a_good_checkpoint(tmp_path):
    failures = 0
    for passing in range(100):
        root = tmp_path / str(passing)
        first = save(root, 1)
        with pytest.MonkeyPatch.context() as patch:
            _FailingWrites(patch, passing)
            try:
                save(root, 2)
                break
            except CheckpointError as error:
                failures += 1
                assert "No space left on device" in str(error)  # noqa: PT017
                assert "the last good one is" in str(error)  # noqa: PT017
        found = newest(root)
        assert_holds(found, 1 if found == first else 2)
        assert_holds(save(root, 3), 3)
    assert failures > 15


def _save_beyond_the_limit(folder):
    """The kernel itself refuses to let a file of rank 1 grow, halfway through its weights."""
    recipe.steps("zero2", degree=2, last=1, folder=folder)
    save = recipe.save

    def limited(*args):
        if dist.get_rank() == 1:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        try:
            return save(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "save", limited)
        with pytest.raises(CheckpointError) as caught:
            recipe.steps("zero2", degree=2, last=2, folder=folder)
    return str(caught.value)


def test_every_rank_is_notified_that_one_could_not_write(pool, tmp_path):
    said = pool(2).run(_save_beyond_the_limit, str(tmp_path))
    assert said[0] == said[1]
    assert "step-00000002: not saved: [Errno 27] File too large" in said[0]
    assert f"the last good one is {tmp_path / 'step-00000001'}" in said[0]
    assert not list(tmp_path.glob("*.partial"))
    Checkpoint(tmp_path / "step-00000001")


def _open(path):
    try:
        Checkpoint(path)
    except CheckpointError as error:
        return str(error)


def test_every_rank_refuses_a_damaged_checkpoint(pool, tmp_path):
    path = save(tmp_path, 1)
    with open(path / OPTIMIZER, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 4]))
    assert pool(2).run(_open, path) == [f"{path / OPTIMIZER} is damaged: its SHA-256 is not the one in {MANIFEST}"] * 2


def test_an_unknown_format_is_refused(tmp_path):
    path = save(tmp_path, 1)
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(CheckpointError, match="format 99; this version reads formats 1 and 2"):
        Checkpoint(path)


def _cut(drawn, size, ranks):
    """Where ranks' parts of a tensor begin and end."""
    return [0, *sorted(drawn.draw(st.lists(st.integers(0, size), min_size=ranks - 1, max_size=ranks - 1))), size]


@given(drawn=st.data())
def test_elements_are_read_wherever_ranks_cut_when_they_wrote_them(tmp_path_factory, drawn):
    folder, whole, ranks = tmp_path_factory.mktemp("cut") / "step-00000003", tensors(3), drawn.draw(st.integers(1, 4))
    cuts = {name: _cut(drawn, tensor.numel(), ranks) for name, tensor in whole.items()}
    folders.begin(folder)
    files, elements = {}, {"weights": 24, "optimizer": 48}
    for rank in range(ranks):
        mine = [
            Piece(name, a, b - a, lambda t=whole[name], a=a, b=b: t.flatten()[a:b])
            for name, a, b in ((name, *cut[rank : rank + 2]) for name, cut in cuts.items())
            if a < b
        ]
        files |= writing.write_pieces(partial_of(folder), rank, mine, SIZES, writing.straight, lambda: False)
    folders.commit(folder, files, elements, b"{}")
    found = Checkpoint(folder)
    found.check_shapes(SHAPES)
    for name, tensor in whole.items():
        assert torch.equal(found.read(name), tensor)
        first, last = sorted(drawn.draw(st.tuples(*[st.integers(0, tensor.numel())] * 2)))
        assert torch.equal(found.read(name, first, last), tensor.flatten()[first:last])


@pytest.mark.parametrize("share", [1, 0.5], ids=["whole", "cut"])
def test_torchs_own_reader_reads_the_files(tmp_path, share):
    whole = tensors(1)
    folder = tmp_path / "step-00000001"
    folders.begin(folder)
    parts = (lambda n: 0, lambda n: int(share * n)), (lambda n: int(share * n), lambda n: n)
    for rank, part in enumerate(parts):
        mine = list(pieces(whole, *part))
        writing.write_pieces(partial_of(folder), rank, mine, SIZES, writing.straight, lambda: False)
    wanted = {place(name)[1]: torch.empty_like(x if share == 1 else x.flatten()) for name, x in whole.items()}
    dcp.load(wanted, storage_reader=dcp.HuggingFaceStorageReader(str(partial_of(folder))))
    for name, tensor in whole.items():
        assert torch.equal(wanted[place(name)[1]].view(tensor.shape), tensor)


def test_what_the_first_format_wrote_is_still_read(tmp_path):
    whole, sums = tensors(2), {}
    files = {"weights.safetensors": {}, "optimizer.safetensors": {}}
    for name, tensor in whole.items():
        kind, key = place(name)
        files[f"{kind}.safetensors"][key] = tensor
    for name, contents in files.items():
        save_file(contents, tmp_path / name)
    (tmp_path / STATE).write_text(json.dumps({"step": 2, "text": "ß"}))
    for name in (*files, STATE):
        data = (tmp_path / name).read_bytes()
        sums[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (tmp_path / MANIFEST).write_text(json.dumps({"format": 1, "files": sums}))
    assert_holds(tmp_path, 2)
    assert not Checkpoint(tmp_path).only_weights
    assert torch.equal(
        Checkpoint(tmp_path).read("weight/embed.weight", 4, 11), whole["weight/embed.weight"].flatten()[4:11]
    )


def test_what_lacks_elements_is_neither_saved_nor_read(tmp_path):
    few = pieces(tensors(1), stop=lambda size: size - 1)
    with pytest.raises(
        CheckpointError, match=r"not saved: the ranks have written .*'weights': 22.* numbers, there are"
    ):
        Saver(tmp_path, CPU, 9).save(1, few, SIZES, {})
    assert not list(tmp_path.iterdir())
    path = save(tmp_path, 2)
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["elements"]["optimizer"] += 1
    (path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"is damaged: its optimizer are 48 numbers, manifest.json says 49"):
        Checkpoint(path)


def test_weights_are_read_where_the_optimizers_state_is_damaged_or_was_not_saved(tmp_path):
    weights = {name: shape for name, shape in SIZES.items() if name.startswith("weight/")}
    mine = (piece for piece in pieces(tensors(1)) if piece.name in weights)
    alone = Saver(tmp_path, CPU, 9).save(1, mine, weights, {})
    assert Checkpoint(alone).only_weights
    assert sorted(path.name for path in alone.iterdir()) == sorted([WEIGHTS, STATE, MANIFEST])
    whole = save(tmp_path, 2)
    (whole / OPTIMIZER).write_bytes(b"")
    with pytest.raises(CheckpointError):
        Checkpoint(whole)
    for path, step in ((alone, 1), (whole, 2)):
        found = Checkpoint(path, weights_alone=True)
        for name in weights:
            assert torch.equal(found.read(name), tensors(step)[name])


def _read_and_written(engine, folder):
    """Shares of all numbers that this rank reads to go on, and of all bytes in the largest file."""
    path, counted = Path(folder) / "step-00000002", 0
    read = Checkpoint.read

    def counting(*arguments):
        nonlocal counted
        found = read(*arguments)
        counted += found.numel()
        return found

    with pytest.MonkeyPatch.context() as patch:
        recipe.steps(engine, degree=dist.get_world_size(), folder=folder)
        patch.setattr(Checkpoint, "read", counting)
        recipe.steps(engine, degree=dist.get_world_size(), first=2, last=2, resume=path)
    whole = sum(math.prod(shape) for shape in Checkpoint(path).sizes.values())
    return counted / whole, max(file.stat().st_size for file in path.iterdir()) / (4 * whole)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2", "zero3"])
def test_ranks_write_equal_parts_and_read_no_more_than_they_hold(pool, tmp_path, engine):
    for read, written in pool(3).run(_read_and_written, engine, str(tmp_path)):
        assert written < 0.3  # two thirds of a third are moments; beside it there is a header
        whole = {"ddp": 1, "zero2": 1 / 3 + 1 / 3}.get(engine, 1 / 3)  # zero2 computes with whole weights
        assert 0.8 * whole < read < 1.1 * whole


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("ddp", 2), ("ddp", 1)),
        (("zero2", 2), ("ddp", 1)),
        (("zero1", 2), ("zero2", 2)),
        (("zero3", 2), ("zero1", 4)),
        (("ddp", 2), ("zero3", 4)),
        (("zero3", 3), ("zero3", 2)),
        (("fsdp2", 2), ("zero3", 3)),
        (("zero3", 3), ("fsdp2", 1)),
        (("ddp", 2), ("fsdp2", 3)),
        (("fsdp2", 3), ("ddp", 1)),
    ],
    ids=lambda side: f"{side[0]}x{side[1]}",
)
def test_a_run_goes_on_under_another_engine_and_number_of_ranks(pool, tmp_path, before, after):
    expected = recipe.plain(last=4)
    (name, ranks), (next_name, next_ranks) = before, after
    pool(ranks).run(recipe.steps, name, degree=ranks, folder=str(tmp_path))
    path = str(tmp_path / "step-00000002")
    degree = 2 if next_ranks == 4 else next_ranks
    for curve, state in pool(next_ranks).run(
        recipe.steps, next_name, degree=degree, micro_batch=1, first=2, last=4, resume=path
    ):
        assert_same((curve, state), (expected[0][2:], expected[1]))


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero1", "zero2", "zero3"])
def test_a_resumed_bf16_run_equals_one_that_never_stopped(pool, tmp_path, name):
    options = {"degree": 2, "dtype": torch.bfloat16}
    curve, state = pool(2).run(recipe.steps, name, last=4, **options)[0]
    pool(2).run(recipe.steps, name, folder=str(tmp_path), **options)
    resumed = pool(2).run(recipe.steps, name, first=2, last=4, resume=str(tmp_path / "step-00000002"), **options)[0]
    assert resumed[0] == curve[2:]
    assert all(torch.equal(resumed[1][key], state[key]) for key in state)
