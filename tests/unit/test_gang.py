"""Settings of the engine `gang`; its rounds are tested by the contract suite."""

import pytest

from tfspark.errors import InvalidInputError
from tfspark.sync.gang import port_range


def test_ports():
    assert port_range(None) is None
    assert port_range("40000") == range(40000, 40001)
    assert port_range("40000-40100") == range(40000, 40101)


@pytest.mark.parametrize("setting", ["", "x", "-3", "5-4", "0-10", "65000-65536", "1-2-3"])
def test_what_is_no_range_of_ports(setting):
    with pytest.raises(InvalidInputError, match=r"spark.tfspark.ports.*Received"):
        port_range(setting)
