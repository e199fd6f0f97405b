"""Resident memory of this process, and its peak since a moment of one's choice (Linux)."""

from __future__ import annotations

from pathlib import Path

_RESET_PEAK = "5"  # proc(5), /proc/pid/clear_refs


def reset_peak() -> None:
    """Let the peak count from now on."""
    Path("/proc/self/clear_refs").write_text(_RESET_PEAK)


def _status(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def resident_mib() -> float:
    """What is resident now."""
    return _status("VmRSS")


def peak_mib() -> float:
    """The most that was resident since `reset_peak`."""
    return _status("VmHWM")
