"""The last lines of a log file, wherever it lies."""

import pytest

from tfspark.data.executor_log import last_lines


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LOG_DIRS", raising=False)
    monkeypatch.setenv("SPARK_EXECUTOR_DIRS", str(tmp_path))
    return tmp_path


def test_a_standalone_executor_writes_into_its_folder(here):
    (here / "stderr").write_text("".join(f"line {n}\n\n" for n in range(100)))
    assert last_lines() == [f"line {n}" for n in range(85, 100)]


def test_yarn_names_the_folders(here, monkeypatch):
    (here / "stderr").write_text("not this one\n")
    for name in "ab":
        (here / name).mkdir()
    (here / "b" / "stderr").write_text("of the container\n")
    monkeypatch.setenv("LOG_DIRS", f"{here / 'a'},{here / 'b'}")
    assert last_lines() == ["of the container"]


def test_a_log_of_any_size_and_content_gives_a_few_short_lines(here):
    (here / "stderr").write_bytes(b"\xff" * 100_000 + b"\n" + b"last\n")
    lines = last_lines()
    assert lines[-1] == "last" and len(lines) == 2 and len(lines[0]) == 200


def test_chatter_is_passed_over(here):
    (here / "stderr").write_text(
        "26/11/28 19:01:38 INFO BlockManager: Found block rdd_518_1 locally\n"
        "26/11/28 19:01:38 WARN BlockManager: Asked to remove block\n"
        "I0000 00:00:1795892502.642735   28700 port.cc:153] oneDNN custom operations are on.\n"
        "printed INFO by the user\n"
    )
    assert last_lines() == [
        "26/11/28 19:01:38 WARN BlockManager: Asked to remove block",
        "printed INFO by the user",
    ]


def test_a_file_of_the_user_is_no_log(here, monkeypatch):
    (here / "stderr").write_text("a line of the user\n")
    monkeypatch.delenv("SPARK_EXECUTOR_DIRS")
    assert last_lines() == []


def test_without_a_log_there_are_no_lines(here):
    assert last_lines() == []
    (here / "stderr").mkdir()
    assert last_lines() == []
