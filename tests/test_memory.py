"""What is asked of the system's memory is asked for, and changes no values that anybody could have."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_zero.memory import prefault

MEGABYTE = 1 << 20


@pytest.mark.parametrize("nbytes", [0, 1, 3 * MEGABYTE, 48 * MEGABYTE + 1])
def test_prefaulted_memory_is_the_same_tensor_and_wholly_there(nbytes: int):
    memory = torch.empty(nbytes, dtype=torch.uint8)
    assert prefault(memory) is memory
    assert memory.fill_(7).sum().item() == 7 * nbytes


@pytest.mark.parametrize("nbytes", [33 * MEGABYTE, 130 * MEGABYTE + 1])
def test_where_the_system_takes_no_advice_all_of_it_is_touched_too(nbytes: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    memory = prefault(torch.empty(nbytes, dtype=torch.uint8))
    assert memory.fill_(7).sum().item() == 7 * nbytes


def test_memory_of_any_shape_and_dtype_can_be_prefaulted():
    memory = torch.empty(3, 4096, 2048, dtype=torch.bfloat16)
    assert prefault(memory).shape == (3, 4096, 2048)


def _in_a_fresh_process(script: str) -> int:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    return int(done.stdout)


FAULTS = """
import resource, torch
from lightning_zero.memory import keep_freed_memory, prefault
torch.set_num_threads(1)
def faults(call):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts faults as Linux does")
def test_whoever_writes_into_prefaulted_memory_waits_for_no_page():
    count = FAULTS + f"memory = prefault(torch.empty({64 * MEGABYTE}, dtype=torch.uint8))\nprint(faults(memory.zero_))"
    assert _in_a_fresh_process(count) < 100  # of 16384


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(not HUGE_PAGES.exists() or "[never]" in HUGE_PAGES.read_text(), reason="no huge pages to ask for")
def test_huge_pages_are_asked_for():
    script = f"""
import torch
from lightning_zero.memory import prefault
memory = prefault(torch.empty({64 * MEGABYTE}, dtype=torch.uint8))
wanted = here = False
for line in open("/proc/self/smaps"):
    first = line.split()[0]
    if "-" in first:
        low, high = (int(number, 16) for number in first.split("-"))
        here = low <= memory.data_ptr() + 4096 < high
    elif here and first == "VmFlags:":
        wanted = " hg" in line
print(int(wanted))
"""
    assert _in_a_fresh_process(script) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_freed_memory_is_kept_for_what_comes_next():
    script = f"""
{FAULTS}
keep_freed_memory()
def step(): [torch.ones(6 << 20) for _ in range(6)]
for _ in range(4): step()  # until every block has its place
print(faults(step))
"""
    assert _in_a_fresh_process(script) < 18432  # of 36864
