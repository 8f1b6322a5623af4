"""The comparison in benchmarks/: pairs, medians, tables, processes that leave nothing behind."""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import environments
import pytest
from compare import SIDES, Bench, Results, cell_of
from environments import CannotMakeError, Environment, find_python
from processes import Family, Outcome, last_answer, run_side
from report import LIMIT, cells, page, plot, ratio, rows, table

SCRIPTS = Path(environments.__file__).parent / "sides"
needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")


@pytest.fixture(scope="module")
def protocol():
    spec = importlib.util.spec_from_file_location("protocol", SCRIPTS / "protocol.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def answer(rate, equal="bits", **more):
    return {
        "rows_per_second": rate,
        "seconds_to_first_step": 4.0,
        "equal_weights": equal,
        "loopback_bytes_per_step": 2e6,
        **more,
    }


def limit(rate):
    memory = {"driver": 800.0, "worker": 0.0, "all": 800.0}
    return {"answer": answer(rate, "one process"), "memory_mb": memory}


def unit(side, rate, before, after, **more):
    return {
        "workload": "lenet",
        "batch": 128,
        "side": side,
        "repeat": 0,
        "answer": answer(rate, **more),
        "error": None,
        "memory_mb": {"driver": 300.0, "worker": 700.0, "all": 1700.0},
        "limits": [limit(before), limit(after)],
    }


def failed(side, error):
    return {**unit(side, 1, 1, 1), "answer": None, "error": error, "memory_mb": {}, "limits": []}


class TestReport:
    def test_a_ratio_is_to_the_mean_of_the_limits_on_both_sides(self):
        assert ratio(unit("bigdl", 600, before=1000, after=2000)) == pytest.approx(0.4)

    def test_figures_are_medians_and_the_limit_is_a_row(self):
        units = [
            unit("bigdl", 500, 1000, 1000),
            unit("bigdl", 900, 1000, 1000),
            unit("bigdl", 1200, 2000, 2000),  # a fast minute
        ]
        plain, bigdl = rows(units)
        assert (plain.side, plain.ratio, plain.rows_per_second) == (LIMIT, 1.0, 1000)
        assert bigdl.units == 3
        assert bigdl.rows_per_second == 900
        assert bigdl.ratio == pytest.approx(0.6)
        assert bigdl.spread == pytest.approx((0.5, 0.9))
        assert bigdl.wire_mb == pytest.approx(2.0)
        assert "| bigdl | 900 | 0.60 | 0.50–0.90 |" in table([bigdl])
        assert "| 1,000 | 1.00 |  |" in table([plain])  # always the same

    def test_the_fastest_comes_first_and_what_does_not_count_last(self):
        units = [
            failed("elephas", "ValueError: no"),
            unit("loner", 990, 1000, 1000, equal="no"),
            unit("bigdl", 400, 1000, 1000),
            unit("tfspark-gang", 900, 1000, 1000),
        ]
        sides = [row.side for row in rows(units)]
        assert sides == [LIMIT, "tfspark-gang", "bigdl", "loner", "elephas"]

    def test_workloads_stay_together(self):
        keys = [("lenet", 128), ("ncf", 1024), ("lenet", 4096), ("lenet", 512)]
        units = [{"workload": workload, "batch": batch} for workload, batch in keys]
        assert list(cells(units)) == [*sorted(k for k in keys if k[0] == "lenet"), ("ncf", 1024)]

    def test_shares_of_phases_add_up(self):
        seconds = {"data": 0.0, "gradient": 0.03, "update": 0.01, "exchange": 0.06}
        (_, row) = rows([unit("tfspark-gang", 9, 10, 10, phase_seconds=seconds)])
        assert row.phases == pytest.approx(
            {"data": 0.0, "gradient": 0.3, "update": 0.1, "exchange": 0.6}
        )
        assert "| 0 30 10 60 |" in table([row])

    def test_one_failure_of_several_does_not_hide_the_others(self):
        (_, row) = rows([unit("bigdl", 5, 10, 10), failed("bigdl", "RuntimeError: no luck")])
        assert (row.ratio, row.units, row.problem) == (0.5, 1, None)

    def test_a_failure_is_a_row_with_the_error_in_it(self):
        text = table(rows([failed("bigdl", "x\nValueError: a | b\nStopping")]))
        assert "| bigdl | ValueError: a / b |" in text

    def test_what_ran_too_long_says_so(self):
        text = table(rows([failed("bigdl", "Ended after 5 s.\nException: while it ended")]))
        assert "| bigdl | Ended after 5 s. |" in text

    def test_what_trained_several_models_does_not_count(self):
        text = table(rows([unit("loner", 30, 10, 10, equal="no")]))
        assert "| (3.00) |" in text and "| 3.00 |" not in text

    def test_the_page_and_the_picture_have_every_workload_and_batch(self, tmp_path):
        units = [unit("bigdl", 5, 10, 10), {**failed("elephas", "no"), "workload": "ncf"}]
        content = {"machine": {"cores": 2}, "units": units}
        text = page(content)
        assert "### lenet, batch 128" in text and "### ncf, batch 128" in text
        plot(content, tmp_path / "picture.png")
        assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


class FakeSides:
    """Stands in for `run_side`; a limit is a tenth faster each time."""

    def __init__(self, failing=()):
        self.ran, self.failing, self.rate = [], failing, 1000.0

    def __call__(self, command, environment, limit_s):
        script = Path(command[1]).name
        self.ran.append(script.removesuffix(".py"))
        if script in self.failing:
            return Outcome(None, "RuntimeError: as it was told", {}, 1.0)
        if script == SIDES[LIMIT].script:
            self.rate *= 1.1
        return Outcome(answer(self.rate), None, {}, 1.0)


class TestBench:
    @pytest.fixture
    def options(self):
        return argparse.Namespace(
            sides=["Keras fit", "tfspark-gang"], workers=2, seconds=1, blocks=3, time_limit=5
        )

    def test_every_side_lies_between_two_limits(self, options, tmp_path):
        fake, results = FakeSides(), Results(tmp_path, {}, resume=False)
        Bench(options, results, fake).cell("lenet", 128, 0)
        assert fake.ran == ["plain_loop", "plain_fit", "plain_loop", "tfspark_gang", "plain_loop"]
        first, second = results.units
        rates = [limit["answer"]["rows_per_second"] for limit in first["limits"] + second["limits"]]
        assert rates == pytest.approx([1100, 1210, 1210, 1331])

    def test_a_failure_stops_nothing_and_the_next_side_gets_new_limits(self, options, tmp_path):
        fake = FakeSides(failing=["plain_fit.py"])
        results = Results(tmp_path, {}, resume=False)
        Bench(options, results, fake).cell("lenet", 128, 0)
        assert fake.ran == ["plain_loop", "plain_fit", "plain_loop", "tfspark_gang", "plain_loop"]
        assert [bool(unit["answer"]) for unit in results.units] == [False, True]

    def test_resuming_measures_only_what_is_missing(self, options, tmp_path):
        options.sides = ["Keras fit"]
        Bench(options, Results(tmp_path, {}, resume=False), FakeSides()).cell("lenet", 128, 0)
        options.sides = ["Keras fit", "tfspark-gang"]
        fake, results = FakeSides(), Results(tmp_path, {}, resume=True)
        Bench(options, results, fake).cell("lenet", 128, 0)
        assert fake.ran == ["plain_loop", "tfspark_gang", "plain_loop"]
        written = json.loads((tmp_path / "compare.json").read_text())
        assert [unit["side"] for unit in written["units"]] == ["Keras fit", "tfspark-gang"]
        assert "tfspark-gang" in (tmp_path / "compare.md").read_text()

    def test_a_table_is_of_one_machine(self, options, tmp_path):
        results = Results(tmp_path, {"processor": "of then"}, resume=False)
        Bench(options, results, FakeSides()).cell("lenet", 128, 0)
        with pytest.raises(SystemExit, match=r"of one machine.*of then.*of now.*--out"):
            Results(tmp_path, {"processor": "of now"}, resume=True)
        Results(tmp_path, None, resume=True).publish(tmp_path / "speed.md")
        assert "processor of then" in (tmp_path / "speed.md").read_text()

    def test_a_workload_that_a_side_cannot_train_is_said_in_a_word(self, options, tmp_path):
        options.sides = ["torch-distributor"]
        fake, results = FakeSides(), Results(tmp_path, {}, resume=False)
        Bench(options, results, fake).cell("lstm", 128, 0)
        assert fake.ran == []
        assert rows(results.units)[0].problem == "not written for PyTorch"

    def test_an_environment_that_cannot_be_made_is_tried_once(self, options, tmp_path, monkeypatch):
        tried = []

        class Hopeless:
            def make(self):
                tried.append(1)
                raise CannotMakeError("no compiler")

        monkeypatch.setitem(environments.ENVIRONMENTS, "horovod", Hopeless())
        options.sides = ["horovod"]
        results = Results(tmp_path, {}, resume=False)
        bench = Bench(options, results, FakeSides())
        for batch in (128, 512):
            bench.cell("lenet", batch, 0)
        assert [unit["error"] for unit in results.units] == ["no compiler"] * 2
        assert tried == [1]

    def test_workloads_are_named_with_or_without_a_batch(self):
        assert cell_of("lenet:64") == [("lenet", 64)]
        assert cell_of("lenet") == [("lenet", 128), ("lenet", 512), ("lenet", 4096)]
        with pytest.raises(argparse.ArgumentTypeError, match="no workload 'resnet'"):
            cell_of("resnet")


def lives(pid):
    """Whether a process runs; one that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class TestProcesses:
    def run(self, source, limit_s=20.0):
        return run_side([sys.executable, "-c", source], {}, limit_s)

    def test_the_answer_is_found_in_what_others_print(self):
        text = 'noise\n{"other": 1}\n\n{"rows_per_second": 5}\n26/01/01 WARN Spark: bye\n'
        assert last_answer(text) == {"rows_per_second": 5}
        assert last_answer("nothing") is None

    def test_an_answer_and_the_memory_that_it_took(self):
        outcome = self.run(
            "import time; held = bytearray(b'x') * (200 * 2**20); time.sleep(1.5)\n"
            """print('{"rows_per_second": 1}')"""
        )
        assert outcome.answer == {"rows_per_second": 1} and outcome.error is None
        if Path("/proc/self/stat").exists():
            assert 200 < outcome.memory_mb["driver"] < 400

    @needs_proc
    def test_memory_that_takes_long_to_count_is_counted_seldom(self, monkeypatch):
        counted = []

        def count(stat):
            counted.append(stat.pid)
            until = time.thread_time() + 0.02
            while time.thread_time() < until:
                pass
            return 10.0

        monkeypatch.setattr("processes._memory_mb", count)
        child = subprocess.Popen(
            [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True
        )
        family = Family(child.pid)
        assert family.look() == family.look() == [child.pid]  # 4 s lie between two counts
        assert counted == [child.pid]
        assert family.memory_mb() == {"driver": 10.0, "worker": 0.0, "all": 10.0}
        child.communicate(b"\n", timeout=20)

    def test_an_error_is_the_end_of_the_output(self):
        outcome = self.run("print('before'); raise ValueError('of the side')")
        assert outcome.answer is None
        assert "before" in outcome.error and "ValueError: of the side" in outcome.error

    @needs_proc
    @pytest.mark.parametrize("session", [False, True])
    def test_nothing_outlives_the_time_limit(self, session, tmp_path):
        # As Spark's daemons do: a child that leaves the group or the session and goes on.
        note = tmp_path / "pid"
        child = "import time; time.sleep(600)"
        source = (
            "import subprocess, sys, time\n"
            f"p = subprocess.Popen([sys.executable, '-c', {child!r}],"
            f" start_new_session={session})\n"
            f"open({str(note)!r}, 'w').write(str(p.pid))\n"
            "time.sleep(600)\n"
        )
        began = time.monotonic()
        outcome = self.run(source, limit_s=3.0)
        assert outcome.answer is None and outcome.error.startswith("Ended after 3 s.")
        assert time.monotonic() - began < 30
        assert not lives(int(note.read_text()))

    @needs_proc
    def test_children_of_a_side_that_has_answered_are_ended_too(self, tmp_path):
        note = tmp_path / "pid"
        child = "import time; time.sleep(600)"
        source = (
            "import subprocess, sys\n"
            f"p = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
            f"open({str(note)!r}, 'w').write(str(p.pid))\n"
            """print('{"rows_per_second": 1}')\n"""
        )
        assert self.run(source).answer
        assert not lives(int(note.read_text()))


class TestEnvironments:
    def test_requirements_are_there_and_pinned(self):
        for name in environments.ENVIRONMENTS:
            lines = (SCRIPTS / "requirements" / f"{name}.txt").read_text().splitlines()
            assert lines and all("==" in line for line in lines)

    def test_a_made_environment_is_kept_until_its_requirements_change(self, tmp_path, monkeypatch):
        monkeypatch.setattr(environments, "VENVS", tmp_path / "venvs")
        monkeypatch.setattr(environments, "REQUIREMENTS", tmp_path)
        monkeypatch.setattr(environments, "HERE", tmp_path / "benchmarks")
        (tmp_path / "peer.txt").write_text("one==1\n")
        ran = []
        monkeypatch.setattr(
            Environment,
            "_run",
            lambda self, command, output, log: (
                ran.append(command),
                (tmp_path / "venvs" / "peer").mkdir(exist_ok=True),
            ),
        )
        made = Environment("peer").make()
        assert made == tmp_path / "venvs" / "peer" / "bin" / "python"
        count = len(ran)
        Environment("peer").make()
        assert len(ran) == count == 3
        (tmp_path / "peer.txt").write_text("one==2\n")
        Environment("peer").make()
        assert len(ran) == 2 * count

    def test_a_python_is_found_by_its_version(self, monkeypatch):
        version = ".".join(map(str, sys.version_info[:2]))
        monkeypatch.setenv("PYTHON" + version.replace(".", ""), sys.executable)
        assert Path(find_python(version)).exists()
        with pytest.raises(CannotMakeError, match=r"No Python 9\.9 .* Set PYTHON99"):
            find_python("9.9")


class TestProtocol:
    def test_equal_weights(self, protocol):
        import numpy as np

        weights = [np.ones((3, 2)), np.zeros(2)]
        same = protocol.fingerprint(weights)
        near = protocol.fingerprint([weights[0] * (1 + 1e-6), weights[1]])
        far = protocol.fingerprint([weights[0] * 1.01, weights[1]])
        assert protocol.equality([same, same]) == "bits"
        assert protocol.equality([same, near]) == "close"
        assert protocol.equality([same, far]) == "no"

    def test_a_side_is_measured_in_blocks_of_about_the_time_asked(self, protocol):
        options = protocol.options_of("", ["--seconds", "4", "--blocks", "3", "--batch", "100"])
        taken = []

        def run(steps):  # 20 ms a step
            taken.append(steps)
            return 0.02 * steps

        measured = protocol.measure(options, run, watch=lambda steps: {"watched": steps})
        assert measured["rows_per_second"] == pytest.approx(100 / 0.02)
        assert taken[0] == 1 and taken[-3:] == [200] * 3
        assert measured["steps"] == measured["watched"] == 600

    def test_answers_of_workers_need_all_of_them(self, protocol, tmp_path, capsys):
        arguments = ["--scratch", str(tmp_path), "--workers", "2"]
        options = protocol.options_of("", arguments)
        measured = {"rows_per_second": 7.0}
        protocol.leave(options, 0, measured, [[1.0]], {"peer": "1"})
        with pytest.raises(SystemExit, match="1 of 2 workers"):
            protocol.answer_of_workers(options)
        protocol.leave(options, 1, {"rows_per_second": 9.0}, [[2.0]], {"peer": "1"})
        protocol.answer_of_workers(options)
        found = last_answer(capsys.readouterr().out)
        assert found["rows_per_second"] == 7.0 and found["equal_weights"] == "no"

    def test_batches_are_cut_and_bounded(self, protocol):
        from workloads import WORKLOADS

        features, labels = protocol.cut_batches(WORKLOADS["ncf"], 8)
        assert [feature.shape for feature in features] == [(16, 8, 1)] * 2
        assert labels.shape == (16, 8)
        images, _ = protocol.cut_batches(WORKLOADS["mobilenet"], 512)
        assert images[0].nbytes <= protocol.MOST_BYTES
