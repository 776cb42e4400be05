"""Tell in one screen what this machine has, what ringflash will do with it, and what to change.

    make doctor                     or      python launch/doctor.py

Looks at the processor, memory, disks, installed versions, GPUs and the links between them; names the kernels that
will be used; runs ring attention on two CPU processes (gloo) and, where there are two GPUs or more, on all of them
(NCCL). Exits with 1 if ringflash cannot run here. Advice that only concerns speed does not change the exit code.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

try:
    import torch
    import torch.cuda.nccl
    import torch.distributed as dist
    import torch.multiprocessing
    from rich.console import Console
    from rich.table import Table

    from ringflash import DistributedFlashAttention, shard, unshard
    from ringflash.errors import ArgumentError
    from ringflash.kernels.select import name_of, select
except ModuleNotFoundError as missing:
    sys.exit(
        f"{missing.name} is not installed for {sys.executable}.\n"
        "In a checkout, `make doctor` installs everything into .venv first; otherwise: pip install -e ."
    )

GIB = 2**30
SMOKE_SECONDS = 120
HEAD_DIMS = (64, 128, 256)


@dataclass
class Report:
    """Rows of the screen, in order, and what to change."""

    rows: list[tuple[str, str]] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def row(self, name: str, value: str) -> None:
        """Show a fact."""
        self.rows.append((name, value))


def usable_cores() -> int:
    """Cores that this process may use: its affinity, less what a container's quota takes away."""
    cores = len(os.sched_getaffinity(0))
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        limit, period = quota.read_text().split()
        if limit != "max":
            cores = min(cores, max(1, int(limit) // int(period)))
    return cores


def memory() -> tuple[int, int]:
    """Bytes of main memory: available and total."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available, total = (int(fields[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))
    return available, total


def look_at_host(report: Report) -> None:
    """Processor, memory, disks, compiler."""
    cores, (available, total) = usable_cores(), memory()
    threads = os.environ.get("OMP_NUM_THREADS")
    report.row("system", f"{platform.system()} {platform.machine()}, Python {platform.python_version()}")
    report.row("processor", f"{cores} cores, OMP_NUM_THREADS {threads or 'not set'}")
    report.row("memory", f"{available / GIB:.1f} of {total / GIB:.1f} GiB available")
    shared = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
    disk = shutil.disk_usage(Path.cwd()).free
    report.row("free space", f"{disk / GIB:.1f} GiB in this folder, {shared / GIB:.1f} GiB in /dev/shm")
    if threads is None and not torch.cuda.is_available():
        report.advice.append(
            f"torchrun gives each process one thread. `make train` sets OMP_NUM_THREADS itself; if you call torchrun, "
            f"set it to cores / processes, here OMP_NUM_THREADS={max(1, cores // 2)} for two."
        )
    if threads is not None and threads.isdigit() and int(threads) > cores:
        report.advice.append(f"OMP_NUM_THREADS={threads} is more than the {cores} cores here: unset it.")
    if available < 4 * GIB:
        report.advice.append("Less than 4 GiB of memory is available: the default training job needs about that.")
    if disk < 5 * GIB:
        report.advice.append("Less than 5 GiB is free here: a checkpoint may not fit. Set the run folder elsewhere.")
    if shared < GIB and torch.cuda.device_count() > 1:
        report.advice.append(
            "/dev/shm is smaller than 1 GiB, and NCCL needs it: docker run --shm-size=8g (or --ipc=host)."
        )


def look_at_versions(report: Report) -> None:
    """What is installed, and whether Triton can compile."""
    build = (
        f"CUDA {torch.version.cuda}"
        if torch.version.cuda
        else f"ROCm {torch.version.hip}"
        if torch.version.hip
        else "CPU"
    )
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "not in use"
    names = ("ringflash", "triton", "deepspeed", "transformers")
    report.row("torch", f"{torch.__version__} ({build} build), NCCL {nccl}")
    report.row("packages", ", ".join(f"{name} {installed_version(name)}" for name in names))
    compiler = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    report.row("C compiler", compiler or "none")
    if compiler is None:
        report.advice.append("Triton and torch.compile need a C compiler: install gcc.")
    if installed_version("triton") == "not installed":
        report.advice.append("Triton is not installed: GPUs would use plain torch operators. pip install triton")


def installed_version(name: str) -> str:
    """Version of an installed package."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def look_at_gpus(report: Report) -> None:
    """Each GPU, the driver, and how the GPUs reach each other."""
    driver = query_driver()
    if not torch.cuda.is_available():
        report.row("GPUs", "none that torch can use")
        if driver and torch.version.cuda is None:
            report.advice.append(
                f"There is an NVIDIA driver ({driver}), but torch {torch.__version__} cannot use it: install its CUDA "
                "build, on Linux the default one of `pip install torch`."
            )
        elif driver:
            report.advice.append(
                f"torch cannot use the GPU: driver {driver} may be older than CUDA {torch.version.cuda} needs, or "
                "CUDA_VISIBLE_DEVICES hides it."
            )
        return
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        capability = f"compute capability {device.major}.{device.minor}"
        report.row(f"GPU {index}", f"{device.name}, {capability}, {free / GIB:.0f} of {total / GIB:.0f} GiB free")
        if free < 0.9 * total:
            report.advice.append(f"GPU {index}: another program holds {(total - free) / GIB:.0f} GiB of its memory.")
        if device.major < 8 and torch.version.cuda:
            report.advice.append(f"GPU {index} has no bfloat16: train with engine.precision=fp32, as auto does there.")
    report.row("driver", driver or "unknown")
    if len({torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}) > 1:
        report.advice.append("The GPUs differ: a ring runs at the pace of the slowest. Choose by CUDA_VISIBLE_DEVICES.")
    look_at_links(report)


def query_driver() -> str | None:
    """Version of the NVIDIA driver, None without one."""
    path = Path("/proc/driver/nvidia/version")
    if not path.is_file():
        return None
    words = path.read_text().split("\n")[0].split()
    return next((word for word in words if word[0].isdigit() and "." in word), "unknown")


def look_at_links(report: Report) -> None:
    """Pairs of GPUs that read each other's memory, and the kind of link where nvidia-smi tells it."""
    count = torch.cuda.device_count()
    if count < 2:
        return
    pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
    apart = [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]
    kinds = ", ".join(sorted(link_kinds())) or "unknown kind"
    report.row("links", f"{len(pairs) - len(apart)} of {len(pairs)} GPU pairs reach each other's memory; {kinds}")
    if apart:
        report.advice.append(
            f"GPUs {apart[0][0]} and {apart[0][1]} do not reach each other's memory: keys will pass through the host. "
            "The ring hides that only with more tokens per GPU."
        )


def link_kinds() -> set[str]:
    """Kinds of link in `nvidia-smi topo -m`, such as NV18, PIX or SYS."""
    if shutil.which("nvidia-smi") is None:
        return set()
    shown = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=30).stdout
    rows = [line.split() for line in shown.splitlines() if line.startswith("GPU")]
    return {cell for row in rows for cell in row[1 : len(rows) + 1] if cell != "X"}


def look_at_kernels(report: Report) -> None:
    """Which kernels attention will use, for each dtype and head dimension, on the best device here."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        dims: dict[str, list[str]] = {}
        for head_dim in HEAD_DIMS:
            dims.setdefault(kernel_name(device, dtype, head_dim), []).append(str(head_dim))
        chosen = [f"{name} for head dimension {', '.join(group)}" for name, group in dims.items()]
        report.row(f"kernels, {str(dtype).removeprefix('torch.')}", "; ".join(chosen))
        if device.type == "cuda" and "blockwise" in dims:
            report.advice.append(
                f"{dtype} will run on plain torch operators on this GPU, many times slower than Triton."
            )


def kernel_name(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Short name of the implementation that `ringflash.kernels.select` takes."""
    try:
        return name_of(select(device, dtype, head_dim, head_dim, "auto"))
    except ArgumentError as error:
        return f"none: {error}"


def try_ring(report: Report, backend: str, ranks: int) -> None:
    """Ring attention over a few processes, compared with one device."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        context = torch.multiprocessing.spawn(ring_rank, (ranks, backend, folder), nprocs=ranks, join=False)
        assert context is not None  # as join=False returns one
        try:
            while not context.join(timeout=max(0.0, begin + SMOKE_SECONDS - time.monotonic())):
                if time.monotonic() - begin > SMOKE_SECONDS:
                    raise TimeoutError(f"no answer after {SMOKE_SECONDS} s")
        except Exception as error:
            message = str(error).strip().splitlines()[-1]
            report.row(f"ring, {backend}", f"FAILED: {message}")
            report.broken.append(f"Ring attention over {ranks} {backend} processes failed: {message}")
        else:
            seconds = time.monotonic() - begin
            report.row(f"ring, {backend}", f"right on {ranks} processes, {seconds:.1f} s with their start")
        finally:
            for process in context.processes:
                process.kill()


def ring_rank(rank: int, ranks: int, backend: str, folder: str) -> None:
    """One process of the smoke test: attention over the ring must equal attention on one device."""
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    dist.init_process_group(backend, init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 256, 4, 64).to(device) for _ in range(3))
    q, k, v = (x.double().transpose(1, 2) for x in (query, key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    out = unshard(DistributedFlashAttention()(*(shard(x, 1) for x in (query, key, value))), 1)
    error = (out.double() - expected).abs().max().item()
    # Together: a process that goes while another still talks to it is at times aborted by torch at its exit.
    dist.barrier()
    dist.destroy_process_group()
    if error > 1e-2:  # float32 on tensor cores may round to TF32
        raise RuntimeError(f"rank {rank}: the ring's result is off by {error:.1e}")


def show(report: Report, console: Console) -> None:
    """Print the screen."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for row in report.rows:
        table.add_row(*row)
    console.print(table)
    console.print()
    for line in report.broken:
        console.print(f"[bold red]broken[/]  {line}", highlight=False)
    for line in report.advice:
        console.print(f"[bold yellow]change[/]  {line}", highlight=False)
    if not report.broken and not report.advice:
        console.print("[bold green]Nothing to change.[/]")
    start = "make train" if not report.broken else "docs/troubleshooting.md"
    console.print(f"Next: {start}")


def main() -> None:
    """Look, try, show; exit with 1 if ringflash cannot run here."""
    report = Report()
    for look in (look_at_host, look_at_versions, look_at_gpus, look_at_kernels):
        look(report)
    try_ring(report, "gloo", 2)
    if torch.cuda.device_count() > 1:
        try_ring(report, "nccl", torch.cuda.device_count())
    show(report, Console())
    sys.exit(1 if report.broken else 0)


if __name__ == "__main__":
    main()
