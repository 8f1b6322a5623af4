"""The last lines of a log file, wherever it lies."""

import pytest

from tfspark.data.executor_log import last_lines


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LOG_DIRS", raising=False)
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


def test_without_a_log_there_are_no_lines(here):
    assert last_lines() == []
    (here / "stderr").mkdir()
    assert last_lines() == []
