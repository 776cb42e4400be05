"""Processes that come to a kernel at the same time compile it once: one does, the others load what it has left.

Triton keeps what it has compiled on disk, in a folder for each variant: kernel, types, constants, chip, versions. It
looks there before it compiles, but all ranks of a job come to their first launch together, find nothing, and compile
the same for themselves. Here they take turns at a lock in that folder, and whoever comes second finds it done. Other
variants have other folders, so ranks that come to different ones compile side by side.

The system releases a lock when its holder dies. Where files cannot be locked, or a holder does not get on, everybody
compiles for himself, which is never wrong. The lock reaches as far as the file system's do: on one that hosts share,
often to all of them.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from triton import knobs
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.compiler import CompiledKernel
from triton.compiler.compiler import make_backend
from triton.runtime.cache import CacheManager, get_cache_key, get_cache_manager
from triton.runtime.jit import JITFunction

log = logging.getLogger(__name__)

QUIET = 1.0
"""Seconds that a compilation may take before the log tells what is waited for."""

LONGEST_WAIT = 120.0
"""Seconds; compilations take a tenth of that. A holder that takes longer may be stopped, or locks may not work."""


def compiled_once(kernel: Any) -> Any:
    """A decorator above `triton.jit` or `gluon.jit`: the kernel, compiled once by processes that share Triton's cache.

    Example:
        >>> @compiled_once
        ... @triton.jit
        ... def zero_kernel(x): tl.store(x, 0.0)
    """
    if not isinstance(kernel, JITFunction):  # the interpreter compiles nothing
        return kernel
    caches: Any = kernel.device_caches  # by device; what is not there yet, its factory prepares
    prepare_device = caches.default_factory

    def prepare() -> object:
        """What Triton prepares for a device, among it the function that compiles the kernel."""
        prepared = prepare_device()
        kernel.compile = functools.partial(compile_once, kernel.compile)
        return prepared

    caches.default_factory = prepare
    return kernel


def compile_once(
    compile_here: Callable[..., CompiledKernel], source: Any, target: Any, options: Mapping[str, Any], **rest: Any
) -> CompiledKernel:
    """`triton.compile`, by this process unless another one is at it already.

    Args:
        compile_here: `triton.compile`, which takes the other arguments and looks into the cache itself.
        source: kernel, types of arguments and constants.
        target: the chip.
        options: number of warps and what else the compiler is told.
        **rest: what Triton hands over beside them to a thread that compiles ahead.
    """

    def found() -> CompiledKernel:
        return compile_here(source, target=target, options=options, **rest)

    folder = cache_of(source, target, options)
    if knobs.compilation.always_compile or is_compiled(folder, source):
        return found()
    with locked(getattr(folder, "lock_path", None)):  # a cache of another kind than files has none
        if not is_compiled(folder, source):
            with told_of(source):
                compiled = found()
                if not rest:  # Triton compiles for this thread, whose device the kernel is going to run on
                    _ = compiled.run  # loads it, for which Triton up to 3.6 compiles a launcher in C
                return compiled
    return found()


def cache_of(source: Any, target: Any, options: Mapping[str, Any]) -> CacheManager:
    """Triton's cache of a variant, found as `triton.compile` finds it."""
    backend = make_backend(target)
    parsed = backend.parse_options(dict(options, **source.parse_options()))
    key = get_cache_key(source, backend, parsed, env_vars=get_cache_invalidating_env_vars())
    return get_cache_manager(hashlib.sha256(key.encode("utf-8")).hexdigest())


def is_compiled(folder: CacheManager, source: Any) -> bool:
    """Whether the cache of a variant holds it."""
    name = f"{source.name[:150]}.json"
    return name in (folder.get_group(name) or {})


@contextmanager
def locked(path: str | None) -> Generator[None]:
    """Hold the lock of a file if that can be had in `LONGEST_WAIT`; no process has it where files cannot be locked."""
    try:
        file = None if path is None else os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:
        file = None
    if file is None:
        yield
        return
    give_up = time.monotonic() + LONGEST_WAIT
    try:
        # Asked again and again, for a wait that ends: a lock server may never answer a request to be woken.
        while time.monotonic() < give_up:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.02)
            except OSError:
                break
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)  # closing would leave it to a process forked meanwhile
        os.close(file)


@contextmanager
def told_of(source: Any) -> Generator[None]:
    """Log what is compiled if that takes longer than `QUIET`.

    A warning, so that Python shows it on standard error where logging is not set up, while it lasts.
    """
    words = "ringflash: compiling %s (once for this machine; later runs find it in %s)"
    timer = threading.Timer(QUIET, log.warning, (words, in_words(source), knobs.cache.dir))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def in_words(source: Any) -> str:
    """A variant as its user knows it.

    Example: "attend_backward for head dimension 128, bf16".
    """
    types = [x for x in source.signature.values() if isinstance(x, str)]
    dtypes = re.findall(r"(?:^\*|^tensordesc<)(\w+)", types[0]) if types else []
    constants = {source.fn.arg_names[path[0]]: x for path, x in source.constants.items() if len(path) == 1}
    dims = [constants[name] for name in ("DIM", "VALUE_DIM") if name in constants][:1]
    dims = dims or re.findall(r"^tensordesc<\w+\[\d+, ?(\d+)\]", types[0] if types else "")
    details = ", ".join([*(f"head dimension {x}" for x in dims), *dtypes])
    return source.name.removesuffix("_kernel") + (f" for {details}" if details else "")
