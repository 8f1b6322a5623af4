"""When an archive of the JVM's classes is written, and when it is mapped."""

import os
import time

import pytest

from tfspark.jvm_classes import cache_folder, java_options

HOTSPOT = '/usr/bin/java\nopenjdk version "17.0.15"\n64-Bit Server VM (mixed mode, sharing)'
HEAD = b"\xa8\xba\x0b\xf0"


@pytest.fixture
def jars(tmp_path):
    folder = tmp_path / "jars"
    folder.mkdir()
    (folder / "spark-core.jar").write_bytes(b"classes")
    return folder


@pytest.fixture
def start(tmp_path, jars):
    def start(java=HOTSPOT, also=()):
        return java_options(java, jars, also, tmp_path / "cache")

    return start


def file_of(options, option):
    (found,) = [each for each in options.split() if each.startswith(f"-XX:{option}=")]
    return found.partition("=")[2]


def write(options, content=HEAD + b"all classes"):
    """What the JVM does as it ends."""
    path = file_of(options, "ArchiveClassesAtExit")
    with open(path, "wb") as file:
        file.write(content)
    return path


def test_the_second_start_writes_and_the_third_maps(start):
    assert start() == ""
    write(start())
    archive = file_of(start(), "SharedArchiveFile")
    with open(archive, "rb") as file:
        assert file.read() == HEAD + b"all classes"
    assert file_of(start(), "SharedArchiveFile") == archive


def test_an_archive_that_is_being_written_is_left_alone(start):
    start()
    path = write(start(), b"\0\0\0\0all classes")
    assert file_of(start(), "ArchiveClassesAtExit")  # nothing to map yet
    assert os.path.exists(path)
    long_ago = time.time() - 7200
    os.utime(path, (long_ago, long_ago))
    start()
    assert not os.path.exists(path)


def test_of_two_that_wrote_at_the_same_time_one_is_kept(start, tmp_path):
    start()
    path = write(start())
    (tmp_path / "cache" / f"{os.path.basename(path)[:-5]}0.part").write_bytes(HEAD + b"others")
    archive = file_of(start(), "SharedArchiveFile")
    kept = [each.name for each in (tmp_path / "cache").iterdir() if each.suffix != ".starts"]
    assert kept == [os.path.basename(archive)]


def test_where_no_start_could_write_no_more_try(start):
    assert ["Archive" in start() for _ in range(7)] == [False, True, True, True, *[False] * 3]


def test_an_archive_that_was_cut_short_is_not_mapped(start):
    start()
    write(start())
    archive = file_of(start(), "SharedArchiveFile")
    os.truncate(archive, 6)
    assert file_of(start(), "ArchiveClassesAtExit")
    assert not os.path.exists(archive)


@pytest.mark.parametrize("what", ["java", "class path", "jar"])
def test_another_spark_has_an_archive_of_its_own(start, jars, what):
    start()
    write(start())
    assert start()
    if what == "jar":
        (jars / "spark-core.jar").write_bytes(b"other classes")
    java = HOTSPOT.replace("17.0.15", "17.0.16") if what == "java" else HOTSPOT
    assert start(java, also=["more.jar"] if what == "class path" else ()) == ""


def test_archives_that_nobody_uses_go(start, jars, tmp_path):
    start()
    write(start())
    old = file_of(start(), "SharedArchiveFile")
    long_ago = time.time() - 61 * 24 * 3600
    os.utime(old, (long_ago, long_ago))
    (jars / "spark-core.jar").write_bytes(b"other classes")
    start()
    write(start())
    new = file_of(start(), "SharedArchiveFile")
    assert [os.path.exists(each) for each in (old, new)] == [False, True]


def test_a_machine_that_shares_no_classes(start):
    assert [start("java\nEclipse OpenJ9 VM") for _ in range(3)] == [""] * 3


def test_a_folder_that_cannot_be_made(tmp_path, jars):
    (tmp_path / "file").touch()
    found = [java_options(HOTSPOT, jars, (), tmp_path / "file" / "cache") for _ in range(3)]
    assert found == [""] * 3


def test_a_folder_whose_name_needs_quotes(tmp_path, jars):
    found = [java_options(HOTSPOT, jars, (), tmp_path / "a home") for _ in range(3)]
    assert found == [""] * 3


def test_the_folder_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "tfspark"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert str(cache_folder()).startswith(os.path.expanduser("~"))
