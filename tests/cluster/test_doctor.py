"""`tfspark doctor` on this machine: what it says where all is well, and where it is not."""

import os
import re
import subprocess
import sys

import pytest

from tfspark.doctor import Finding, Level, _clocks, _Facts, _room, _tensorflow, examine

pytestmark = pytest.mark.cluster


def doctor(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "tfspark", "doctor", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_a_cluster_where_all_is_well(tmp_path):
    folder = str(tmp_path / "models")
    status, said, _ = doctor(
        "--master", "local-cluster[2,1,1024]", "--conf", "spark.ui.enabled=false",
        "--model-dir", folder,
    )  # fmt: skip
    assert status == 0, said
    checks = re.findall(r"(?m)^(?:ok|warning) +([\w ]+):", said)
    assert checks == [
        "Spark", "executors", "slots", "engine", "TensorFlow", "clocks", "disk", "memory",
        "connections", "model_dir",
    ]  # fmt: skip
    assert "2 ranks can run at once" in said and "trainings take 'gang'" in said
    assert re.search(r"all ranks reach the driver and each other: [\d.]+ ms .* MB/s", said)
    assert said.endswith("A training can run here.\n")
    assert os.listdir(folder) == []


@pytest.mark.slow
def test_a_folder_that_is_a_file(tmp_path):
    path = tmp_path / "file"
    path.touch()
    status, said, _ = doctor("--master", "local[2]", "--model-dir", str(path))
    assert status == 1
    assert re.search(r"(?m)^PROBLEM +model_dir: .*must be a folder", said)
    assert said.endswith("A training would fail here.\n")


def test_a_usage_message():
    done = subprocess.run(
        [sys.executable, "-m", "tfspark"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "usage: tfspark {doctor}" in done.stderr


def test_ports_that_are_taken(sc, monkeypatch):
    monkeypatch.setattr(
        "tfspark.sync.meeting.MeetingPlace.of",
        classmethod(lambda cls, context: cls("127.0.0.1", "127.0.0.1", range(1, 2), None)),
    )
    monkeypatch.setattr("tfspark.sync.control.socket.create_server", _refuse)
    found = {finding.check: finding for finding in examine(sc)}
    assert found["connections"].level is Level.PROBLEM
    assert "all in use" in found["connections"].text
    assert "spark.tfspark.ports" in found["connections"].text


def _refuse(*_, **__):
    raise OSError(98, "Address already in use")


def facts(rank, host, **changes):
    good = {"clock": 100.0, "disk_bytes": 2**40, "memory_bytes": 2**36, "import_s": 3.0}
    return _Facts(rank, host, **{**good, **changes})


def test_a_clock_that_is_wrong():
    good, bad = facts(0, "a"), facts(1, "b", clock=160.0)
    assert _clocks([good], 99.0, 101.0).level is Level.GOOD
    found = _clocks([good, bad], 99.0, 101.0)
    assert found.level is Level.WARNING and "that of b differs" in found.text
    assert "by 59 s" in found.text


def test_room_is_shared_by_the_ranks_of_a_host():
    ranks = [facts(n, "a", disk_bytes=5 * 2**30, memory_bytes=2**30) for n in range(4)]
    disk, memory = _room([*ranks, facts(4, "b")])
    assert (disk.check, disk.level) == ("disk", Level.WARNING)
    assert "1.2 GiB" in disk.text and "least: a" in disk.text and "spark.local.dir" in disk.text
    assert (memory.check, memory.level) == ("memory", Level.PROBLEM)
    assert "0.2 GiB" in memory.text and "memoryOverhead" in memory.text
    assert all(finding.level is Level.GOOD for finding in _room([facts(0, "b")]))


def test_an_environment_that_loads_slowly():
    found = _tensorflow([facts(0, "a"), facts(1, "b", import_s=200.0)])
    assert found.level is Level.WARNING and "200 s (the slowest: b)" in found.text


def test_findings_are_lines():
    assert str(Finding("disk", Level.PROBLEM, "full")) == "PROBLEM  disk: full"
    assert str(Finding("disk", Level.GOOD, "fine")) == "ok       disk: fine"
