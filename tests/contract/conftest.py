"""One suite for every engine: `engine` runs each test on all of them."""

import pytest


@pytest.fixture(params=["local", "shuffle", "gang"])
def engine(request, sc):
    """The name of an engine; Spark is there for all, since all read RDDs."""
    return request.param
