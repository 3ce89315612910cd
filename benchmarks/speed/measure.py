# SPDX-License-Identifier: Apache-2.0
"""How times and memory are measured: interleaved cases, medians of per-round ratios, peak memory in fresh processes."""

from __future__ import annotations

import gc
import multiprocessing
import os
import platform
import random
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata, util
from unittest import mock

import torch

# `--clock cpu` takes the processor time of one thread instead. Other jobs on the machine disturb that far less.
clock = time.perf_counter


@dataclass
class Case:
    """One contestant. `run` is timed. `reset` restores what `run` changed (gradients, overwritten logits), untimed."""

    name: str
    run: Callable[[], object]
    reset: Callable[[], object] = lambda: None


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interleave(
    cases: list[Case], rounds: int, *, limit_s: float | None = None, patience_s: float = 20.0
) -> dict[str, list[float]]:
    """Times the cases in turns.

    Every round runs every case once, in a new random order: a slow moment of the machine then hits all cases alike.
    One round before the first warms up.

    Args:
        cases: the contestants.
        rounds: number of timed rounds.
        limit_s: no further round starts after so many seconds. At least 3 rounds are timed.
        patience_s: a case whose warm-up takes longer than this is not run again. Its warm-up is its only time.

    Returns:
        Name of the case -> seconds in each round.
    """
    order, times = list(cases), {case.name: [] for case in cases}
    shuffle = random.Random(0).shuffle
    started = time.perf_counter()
    for number in range(rounds + 1):
        for case in order:
            elapsed = _timed(case)
            if number > 0 or elapsed > patience_s:
                times[case.name].append(elapsed)
        order = [case for case in order if number > 0 or not times[case.name]]
        shuffle(order)
        if limit_s is not None and number >= 3 and time.perf_counter() - started > limit_s:
            break
    return times


def _timed(case: Case) -> float:
    case.reset()
    gc.collect()
    gc.disable()
    synchronize()
    start = clock()
    result = case.run()
    synchronize()
    elapsed = clock() - start
    gc.enable()
    del result
    case.reset()
    return elapsed


@dataclass(frozen=True)
class Spread:
    median: float
    low: float  # first quartile
    high: float  # third quartile

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


def ratio(times: dict[str, list[float]], over: str, under: str) -> float:
    """Median over rounds of times[over] / times[under].

    If one of them ran in fewer rounds, the ratio of the two medians.
    """
    if len(times[over]) != len(times[under]):
        return statistics.median(times[over]) / statistics.median(times[under])
    return statistics.median(a / b for a, b in zip(times[over], times[under], strict=True))


def settle(limit: float = 1.5, wait_s: float = 0.0) -> float:
    """Waits at most `wait_s` for the one-minute load average to fall below `limit`. Returns the load after that."""
    deadline = time.monotonic() + wait_s
    while os.getloadavg()[0] >= limit and time.monotonic() < deadline:
        time.sleep(5)
    return os.getloadavg()[0]


def machine() -> dict[str, str]:
    """What a reader needs to judge a number: processor, cores and threads, memory, versions."""
    return {
        "processor": _processor(),
        "cores": f"{os.cpu_count()} ({torch.get_num_threads()} threads used)",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "versions": versions(),
    }


_PACKAGES = ("torch", "triton", "sspo-ext", "trl", "liger-kernel", "flash-attn", "transformers", "numpy")


def versions() -> str:
    return ", ".join(f"{name} {v}" for name in _PACKAGES if (v := _version(name)) is not None)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        # In a checkout the package can be imported without being installed.
        return "(source)" if util.find_spec(name.replace("-", "_")) else None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            fields = dict(line.split(":", 1) for line in file.read().split("\n\n")[0].splitlines() if ":" in line)
    except OSError:
        return platform.processor() or platform.machine()
    fields = {k.strip(): v.strip() for k, v in fields.items()}
    flags = fields.get("flags", "").split()
    has = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    model = f"family {fields.get('cpu family')} model {fields.get('model')}"
    return f"{fields.get('model name', platform.machine())} ({model}; {', '.join(has)})"


def extra_peak_mib(build: Callable[..., Callable[[], object]], *args) -> float:
    """Extra peak memory of a call, in MiB.

    `build(*args)` returns the call. The extra is the peak during the call less the memory before it. Both are taken in
    a fresh process, where nothing is cached or mapped yet. On a GPU torch's allocator counts. On a CPU the system
    counts the resident set, which includes workspaces of libraries.

    Args:
        build: a function at the top of a module: it is sent to the process by name.
        *args: what `build` is called with.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_measure_peak, args=(theirs, torch.get_num_threads(), build, args))
    # Otherwise glibc keeps freed blocks of a few MiB, and more of them the longer it runs.
    malloc = dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), "131072")
    with mock.patch.dict(os.environ, malloc):
        process.start()
    theirs.close()
    try:
        result = ours.recv()
    except EOFError:
        result = RuntimeError("the measuring process died, most likely for lack of memory")
    process.join()
    if isinstance(result, Exception):
        raise result
    return result


def _measure_peak(pipe, threads: int, build, args) -> None:
    try:
        torch.set_num_threads(threads)
        _start_libraries()
        run = build(*args)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            result = run()
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - before
        else:
            before = _reset_resident_peak()
            result = run()
            peak = resident_peak() - before
        del result
        pipe.send(peak / 2**20)
    except Exception as error:  # noqa: BLE001 - carried to the parent, which raises it
        pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))


def _start_libraries() -> None:
    """Uses thread pools and GEMM libraries once. Their first use allocates, which is not to be measured."""
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(64, 64).to(dtype).requires_grad_()
        (x @ x).float().log_softmax(-1).sum().backward()


def _status(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def _reset_resident_peak() -> int:
    """Resets the kernel's peak of resident memory, where it allows that. Returns the resident bytes."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        return _status("VmRSS:")
    except OSError:
        return resident_peak()


def resident_peak() -> int:
    """The most bytes that this program held. `getrusage` would count those of the one that started it."""
    try:
        return _status("VmHWM:")
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if platform.system() == "Darwin" else peak * 1024
