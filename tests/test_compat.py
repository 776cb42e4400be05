"""Packages under the names of those that they stand in for: each check in a process that has imported nothing yet."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ringflash import ArgumentError
from ringflash.compat import PACKAGES, install

CHECKOUT = Path(__file__).resolve().parents[1]


def run(folder: Path, code: str) -> list[str]:
    """Lines that a file with this code prints."""
    script = folder / "script.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    command = [sys.executable, script]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.splitlines()


FLASH_ATTN = """
import ringflash.compat
ringflash.compat.install("flash_attn")

import importlib.util
import torch
from packaging import version

import flash_attn
import flash_attn.layers.rotary
from flash_attn import flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func, flash_attn_varlen_func
from flash_attn import flash_attn_varlen_kvpacked_func, flash_attn_varlen_qkvpacked_func, flash_attn_with_kvcache
from flash_attn.bert_padding import index_first_axis, index_put_first_axis, pad_input, unpad_input
from flash_attn.flash_attn_interface import flash_attn_func as of_the_interface
from flash_attn.flash_attn_interface import flash_attn_kvpacked_func, flash_attn_qkvpacked_func, flash_attn_varlen_func
from flash_attn.flash_attn_interface import flash_attn_varlen_kvpacked_func, flash_attn_varlen_qkvpacked_func
from flash_attn.flash_attn_interface import flash_attn_with_kvcache as cached_of_the_interface
from flash_attn.layers.rotary import RotaryEmbedding, apply_rotary_emb, apply_rotary_emb_func
from flash_attn.layers.rotary import apply_rotary_emb_kv_, apply_rotary_emb_qkv_

assert version.parse("2.7") < version.parse(flash_attn.__version__) < version.parse("3")
for name in ("flash_attn", "flash_attn.bert_padding", "flash_attn.layers.rotary"):
    assert importlib.util.find_spec(name) is not None, name
assert importlib.util.find_spec("flash_attn.ops") is None
assert flash_attn_func is of_the_interface is ringflash.flash_attn_func
assert flash_attn_with_kvcache is cached_of_the_interface
assert isinstance(flash_attn.layers.rotary.RotaryEmbedding(8), RotaryEmbedding)

x, mask = torch.randn(2, 5, 4, 8), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
packed, indices, cu_seqlens, longest, used = unpad_input(x, mask)
out = flash_attn_varlen_func(packed, packed, packed, cu_seqlens, cu_seqlens, longest, longest, causal=True)
found = pad_input(out, indices, 2, 5)
torch.testing.assert_close(found[:1, :3], flash_attn_func(x[:1, :3], x[:1, :3], x[:1, :3], causal=True))
torch.testing.assert_close(found[1:], flash_attn_func(x[1:], x[1:], x[1:], causal=True))
"""


def test_a_file_written_for_flash_attn_runs(tmp_path: Path) -> None:
    run(tmp_path, FLASH_ATTN)


RING_FLASH_ATTN = """
import ringflash.compat
ringflash.compat.install("ring_flash_attn")

import sys
import torch
from ring_flash_attn import llama3_flash_attn_prepare_cu_seqlens, llama3_flash_attn_varlen_func
from ring_flash_attn import llama3_flash_attn_varlen_kvpacked_func, llama3_flash_attn_varlen_qkvpacked_func
from ring_flash_attn import ring_flash_attn_func, ring_flash_attn_kvpacked_func, ring_flash_attn_qkvpacked_func
from ring_flash_attn import ring_flash_attn_varlen_func, ring_flash_attn_varlen_kvpacked_func
from ring_flash_attn import ring_flash_attn_varlen_qkvpacked_func, stripe_flash_attn_func
from ring_flash_attn import stripe_flash_attn_kvpacked_func, stripe_flash_attn_qkvpacked_func
from ring_flash_attn import substitute_hf_flash_attn, update_ring_flash_attn_params
from ring_flash_attn import zigzag_ring_flash_attn_func, zigzag_ring_flash_attn_kvpacked_func
from ring_flash_attn import zigzag_ring_flash_attn_qkvpacked_func, zigzag_ring_flash_attn_varlen_func
from ring_flash_attn import zigzag_ring_flash_attn_varlen_kvpacked_func, zigzag_ring_flash_attn_varlen_qkvpacked_func
from ring_flash_attn.adapters.hf_adapter import DATA_PARAMS, use_ring_attn
from ring_flash_attn.llama3_flash_attn_varlen import llama3_flash_attn_varlen_func as of_its_module
from ring_flash_attn.zigzag_ring_flash_attn import zigzag_ring_flash_attn_func as zigzag_of_its_module

assert llama3_flash_attn_varlen_func is of_its_module
assert zigzag_ring_flash_attn_func is zigzag_of_its_module
assert "transformers" not in sys.modules
x, cu_seqlens = torch.randn(8, 2, 8), torch.tensor([0, 2, 8], dtype=torch.int32)
update_ring_flash_attn_params(cu_seqlens, None)
out = llama3_flash_attn_varlen_func(x, x, x, **DATA_PARAMS, heads_k_stride=1, causal=True)
for function in (ring_flash_attn_varlen_func, zigzag_ring_flash_attn_varlen_func):
    torch.testing.assert_close(out, function(x, x, x, cu_seqlens, 6, causal=True))
torch.testing.assert_close(out[2:], stripe_flash_attn_func(*[x[None, 2:]] * 3, causal=True)[0])
"""
YUNCHANG = """
import ringflash.compat
ringflash.compat.install("yunchang")

import torch
from yunchang import EXTRACT_FUNC_DICT, AsyncLongContextAttention, LongContextAttention, LongContextAttentionQKVPacked
from yunchang import set_seq_parallel_pg
from yunchang.globals import set_seq_parallel_pg as of_its_module
from yunchang.hybrid import LongContextAttention as module_of_its_module
from yunchang.kernels import AttnType

assert (set_seq_parallel_pg, LongContextAttention) == (of_its_module, module_of_its_module)
set_seq_parallel_pg(1, 1, 0, 1)
x = EXTRACT_FUNC_DICT["strip"](torch.randn(1, 8, 2, 8), 0, world_size=1, rd=1, ud=1)
out = LongContextAttention(ring_impl_type="strip", attn_type=AttnType.FA3)(x, x, x, causal=True)
torch.testing.assert_close(out, ringflash.flash_attn_func(x, x, x, causal=True))
"""


@pytest.mark.parametrize("code", [RING_FLASH_ATTN, YUNCHANG], ids=["ring_flash_attn", "yunchang"])
def test_files_written_for_other_rings_run(tmp_path: Path, code: str) -> None:
    run(tmp_path, code)


def test_every_module_is_the_same_object_under_both_names_and_a_second_call_changes_nothing(tmp_path: Path) -> None:
    code = """
import importlib, pkgutil, sys
from ringflash.compat import PACKAGES, install
for name, package in PACKAGES.items():
    install(name)
    before = dict(sys.modules)
    install(name)
    assert sys.modules == before
    ours = importlib.import_module(package)
    assert importlib.import_module(name) is ours
    modules = [x.name for x in pkgutil.walk_packages(ours.__path__, ".")]
    for x in modules:
        assert importlib.import_module(name + x) is importlib.import_module(package + x) is sys.modules[package + x], x
    print(name, len(modules))
"""
    found = [line.split() for line in run(tmp_path, code)]
    assert [name for name, _ in found] == list(PACKAGES)
    assert all(int(count) > 0 for _, count in found)


def test_unknown_names_are_refused_with_those_that_are_known() -> None:
    with pytest.raises(ArgumentError, match="name='flash_attn_3'; allowed are flash_attn, ring_flash_attn, yunchang"):
        install("flash_attn_3")


def test_a_package_that_is_imported_already_is_not_replaced(tmp_path: Path) -> None:
    package = tmp_path / "flash_attn"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "own.py").touch()
    code = """
import sys
import flash_attn.own
from ringflash import ArgumentError
from ringflash.compat import install
try:
    install("flash_attn")
except ArgumentError as error:
    print(error)
print(*(name for name in sys.modules if name.startswith("flash_attn")))
"""
    refusal, modules = run(tmp_path, code)
    assert refusal.startswith("name='flash_attn', but flash_attn is imported already, from " + str(package))
    assert modules == "flash_attn flash_attn.own"


def test_one_that_is_installed_but_not_imported_is_stood_in_for(tmp_path: Path) -> None:
    (tmp_path / "flash_attn.py").write_text("raise ImportError('of another CUDA')")
    code = "from ringflash.compat import install\ninstall('flash_attn')\nimport flash_attn\nprint(flash_attn.__name__)"
    assert run(tmp_path, code) == ["ringflash.flash_attn"]


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="the real flash-attn is installed")
def test_transformers_still_asks_for_the_real_flash_attn(tmp_path: Path) -> None:
    code = """
import ringflash.compat
ringflash.compat.install("flash_attn")
from transformers.utils import is_flash_attn_2_available
print(is_flash_attn_2_available())
"""
    assert run(tmp_path, code) == ["False"]
