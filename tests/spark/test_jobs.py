"""Jobs on an embedded Spark that is told to have lost its executors."""

import time

import pytest

from tfspark import TFDataset
from tfspark.errors import ClusterError, UserFunctionError
from tfspark.sync import jobs
from tfspark.sync.jobs import Jobs


@pytest.fixture
def slots(monkeypatch):
    """Sets how many slots there are, looked at often."""
    monkeypatch.setattr(jobs, "in_process", lambda context: False)
    monkeypatch.setattr(jobs, "_FIRST_LOOK_S", 0.1)
    monkeypatch.setattr(jobs, "_SELDOM_S", 0.1)

    def there(number):
        monkeypatch.setattr(jobs, "registered_slots", lambda context: number)

    return there


def slow(value):
    """Longer than any test; in small parts, because Spark waits for the end of a sleep."""
    for _ in range(600):
        time.sleep(0.1)
    return value


def test_a_job_without_executors_is_one_error(sc, slots):
    slots(0)
    started = time.monotonic()
    said = pytest.raises(ClusterError, match=r"1 task slot at the same time.*fewer for 0\.5 s")
    with said, Jobs(sc, wait_for_slots_s=0.5).job():
        sc.parallelize([0], 1).map(slow).collect()
    assert time.monotonic() - started < 30


def test_so_is_a_data_set_that_cannot_be_written(sc, slots):
    slots(0)
    rdd = sc.parallelize([0], 1).map(slow)
    dataset = TFDataset.from_rdd(rdd, names=["x"], shapes=[[]], batch_size=2)
    with pytest.raises(ClusterError, match="task slot"), Jobs(sc, wait_for_slots_s=0.5).job():
        dataset.materialise(sc, 1)


def test_a_job_with_executors_ends_as_it_would(sc, slots):
    slots(3)
    mine = Jobs(sc, wait_for_slots_s=0.0)
    with mine.job(3):
        assert sc.parallelize([1, 2], 2).map(lambda x: time.sleep(0.5) or x).sum() == 3
    with pytest.raises(UserFunctionError, match="ZeroDivisionError"), mine.job():
        sc.parallelize([0], 1).map(lambda x: 1 / x).collect()
    assert not sc.getJobTags()
