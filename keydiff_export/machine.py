"""The machine under a measurement: what it is, how fast it copies memory, what this process and others took of it."""

from __future__ import annotations

import os
import platform
import resource
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

COPY_BYTES, COPY_REPEATS = 128 << 20, 5


def machine_facts() -> dict[str, Any]:
    """CPU model, CPUs that this process may use, memory in bytes, operating system, Python; None where not known."""
    return {
        "cpu": _first_field("/proc/cpuinfo", "model name") or platform.processor() or None,
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def copy_bandwidth(threads: int) -> float:
    """Bytes/s that a memory copy moves with a number of threads, read and written bytes both counted, as STREAM does.

    Every thread copies its part of 128 MiB, more than any cache holds; the median of five copies.
    """
    size = COPY_BYTES // threads
    pairs = [(np.ones(size, np.uint8), np.zeros(size, np.uint8)) for _ in range(threads)]
    times = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(COPY_REPEATS):
            began = time.perf_counter()
            list(pool.map(lambda pair: np.copyto(pair[1], pair[0]), pairs))
            times.append(time.perf_counter() - began)
    return 2 * size * threads / statistics.median(times)


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far.

    Linux's VmHWM where there is one: `getrusage` also counts what the parent held when it started this process.
    """
    peak = _first_field("/proc/self/status", "VmHWM")
    if peak is not None:
        return int(peak.split()[0]) * 1024
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def rss_bytes() -> int | None:
    """Resident memory of this process now; None where the system does not say."""
    now = _first_field("/proc/self/status", "VmRSS")
    return None if now is None else int(now.split()[0]) * 1024


def anonymous_bytes() -> int | None:
    """Resident memory of this process now without pages of mapped files; None where the system does not say."""
    now = _first_field("/proc/self/status", "RssAnon")
    return None if now is None else int(now.split()[0]) * 1024


@dataclass(frozen=True)
class Usage:
    """Processor time in seconds since some moment: of the whole machine, and of this process.

    Attributes:
        machine: (total, idle, stolen) of all CPUs; stolen is what a hypervisor gave to others. None if not readable.
        own: user and system time of this process.
    """

    machine: tuple[float, float, float] | None
    own: float

    @classmethod
    def now(cls) -> Usage:
        """Since boot, and since this process began."""
        times = os.times()
        return cls(_cpu_seconds(), times.user + times.system)

    def shares_since(self, before: Usage) -> dict[str, float | None]:
        """Shares of the machine's processor time since `before` that were stolen, and that other processes took."""
        if self.machine is None or before.machine is None:
            return {"stolen": None, "others": None}
        total, idle, stolen = (a - b for a, b in zip(self.machine, before.machine, strict=True))
        others = total - idle - stolen - (self.own - before.own)
        return {
            "stolen": round(stolen / max(total, 1e-9), 4),
            "others": round(max(others, 0.0) / max(total, 1e-9), 4),
        }


def _cpu_seconds() -> tuple[float, float, float] | None:
    try:
        with open("/proc/stat", encoding="ascii") as stream:
            ticks = [int(word) for word in stream.readline().split()[1:9]]
    except OSError:
        return None
    user, nice, system, idle, waiting, interrupts, soft, stolen = ticks
    unit = os.sysconf("SC_CLK_TCK")
    total = user + nice + system + idle + waiting + interrupts + soft + stolen
    return total / unit, (idle + waiting) / unit, stolen / unit


def _first_field(file: str, name: str) -> str | None:
    """Value of the first `name: value` line of a file; None without one."""
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name), None)
