"""Settings of the engine `gang`; its rounds are tested by the contract suite."""

import sys

import pytest

from tfspark.errors import InvalidInputError
from tfspark.sync.meeting import port_range


def test_ports():
    assert port_range(None) is None
    assert port_range("40000") == range(40000, 40001)
    assert port_range("40000-40100") == range(40000, 40101)


@pytest.mark.parametrize("setting", ["", "x", "-3", "5-4", "0-10", "65000-65536", "1-2-3"])
def test_what_is_no_range_of_ports(setting):
    with pytest.raises(InvalidInputError, match=r"spark.tfspark.ports.*Received"):
        port_range(setting)


RETAINED = """
import numpy as np, os
from tfspark.sync.tasks import memory_kept

def resident_mb():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

def spend():
    np.ones(2**25).sum()  # 256 MB

with memory_kept():
    before = resident_mb()
    spend()
    within = resident_mb()
print(within - before, resident_mb() - before)
"""


@pytest.mark.skipif(
    sys.platform != "linux", reason="only glibc's malloc can be told to keep memory"
)
def test_memory_of_large_arrays_is_kept_for_a_round_and_no_longer(run_python):
    within, after = map(float, run_python(RETAINED).stdout.split()[-2:])
    assert within > 200
    assert after < 50
