"""One suite for every engine: `engine` runs each test on all of them."""

import pytest


@pytest.fixture(params=["local", "shuffle"])
def engine(request, sc):
    """The name of an engine; Spark is there for both, since both read RDDs."""
    return request.param
