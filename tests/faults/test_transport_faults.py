"""On GPUs, a rank that stands still: the others end within their time limit, and say for whom and what they waited."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

pytestmark = pytest.mark.gpu

LIMIT = 15
"""Seconds that torch.distributed is told to wait."""

SCRIPT = f"""
import os, signal
from datetime import timedelta
import torch
import torch.distributed as dist
from ringflash import Mask
from ringflash.functional import attention
alone = torch.cuda.device_count() == 1  # NCCL refuses to take one GPU for two
torch.cuda.set_device(0 if alone else int(os.environ["RANK"]))
dist.init_process_group("gloo" if alone else "cpu:gloo,cuda:nccl", timeout=timedelta(seconds={LIMIT}))
share = dict(device="cuda", dtype=torch.bfloat16, requires_grad=True)
query, key, value = (torch.randn(1, 4096, 8, 128, **share) for _ in range(3))
def step():
    out, _ = attention(query, key, value, mask=Mask.causal())
    out.backward(torch.ones_like(out))
    torch.cuda.synchronize()
for _ in range(int(os.environ["STEPS"])):
    step()
print("ready", flush=True)
if os.environ["RANK"] == "1":
    os.kill(os.getpid(), signal.SIGSTOP)
step()
print("done", flush=True)
"""


NOTED, BY_A_LIST = 3, 8
"""Steps behind which a call waits for the other ranks' hosts, and behind which only GPUs wait."""


@pytest.mark.parametrize("steps", [NOTED, BY_A_LIST])
def test_a_rank_that_stands_still_ends_the_other_by_name_within_the_limit(steps):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    where = os.environ | {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    where |= {"TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1"}  # where there is one GPU
    where |= {"STEPS": str(steps)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT],
            env=where | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        assert ranks[0].stdout.readline() == "ready\n", ranks[0].stderr.read()
        begin = time.monotonic()
        out, said = ranks[0].communicate(timeout=4 * LIMIT)
        assert time.monotonic() - begin < 3 * LIMIT
        assert "done" not in out
        if steps == NOTED:
            assert ranks[0].returncode == 1
            assert re.search(r"RankMismatchError: rank 1 has not come to call .* timed out after 0:00:15", said), said
            return
        assert ranks[0].returncode == -signal.SIGABRT
        for_what = "(rank 1 to take )?(keys and values for|gradients of) stage 1( from rank 1)?"
        waited = rf"ringflash: rank 0 ends, having waited more than 0:00:15 for {for_what}"
        assert re.search(waited, said), said
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
