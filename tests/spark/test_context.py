"""Spark as init_nncontext starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pyspark
import pytest
from pyspark.sql import SparkSession

from tfspark import context
from tfspark.slots import slots, task_threads


def test_the_active_context_is_joined(sc, caplog):
    assert context.init_nncontext() is sc
    assert not caplog.records
    assert context.init_nncontext({"spark.task.cpus": 7}) is sc
    assert "too late: spark.task.cpus=7 (is None)" in caplog.text


def test_slots_and_threads_of_a_local_master(sc):
    assert slots(sc) == 4  # local[4]
    assert task_threads(sc) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere PySpark's own daemon is used")
def test_workers_start_with_tensorflow(sc):
    assert sc.getConf().get("spark.python.daemon.module") == "tfspark.daemon"

    def look(rows):
        import os
        import sys

        list(rows)
        with open(f"/proc/{os.getppid()}/cmdline") as line:
            return [("tensorflow" in sys.modules, line.read().split("\0")[1:3])]

    found = sc.parallelize(range(2), 2).mapPartitions(look).collect()
    assert found == [(True, ["-m", "tfspark.daemon"])] * 2


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere PySpark's own daemon is used")
def test_data_frames_and_rdds_share_a_daemon(sc):
    def daemons(_):
        import os

        import pyarrow

        yield pyarrow.RecordBatch.from_pydict({"pid": [os.getppid()]})

    (row,) = SparkSession(sc).range(1, numPartitions=1).mapInArrow(daemons, "pid long").collect()
    assert sc.parallelize([0], 1).map(lambda _: os.getppid()).collect() == [row.pid]


STARTED = """
    import json
    from tfspark import init_nncontext
    from tfspark.slots import slots, task_threads
    sc = init_nncontext({conf!r}, master={master!r})
    def where(rows):
        import importlib.util, sys
        list(rows)
        return [(sys.executable, importlib.util.find_spec("tfspark") is not None)]
    workers = sc.parallelize(range(2), 2).mapPartitions(where).collect()
    conf = dict(sc.getConf().getAll())
    result = dict(slots=slots(sc), threads=task_threads(sc), workers=workers, conf=conf)
    sc.stop()
    print(json.dumps(result))
"""


def start(run_python, conf=None, master=None, **environment):
    source = STARTED.format(conf=conf, master=master)
    return json.loads(run_python(source, **environment).stdout.splitlines()[-1])


@pytest.mark.cluster
def test_a_plain_script_gets_an_embedded_spark(run_python):
    started = start(run_python, {"spark.ui.enabled": False}, PYSPARK_PYTHON=None)
    conf = started["conf"]
    assert conf["spark.master"] == "local[*]"
    assert started["workers"] == [[sys.executable, True]] * 2
    assert int(conf["spark.driver.memory"].removesuffix("m")) >= 1024
    assert conf["spark.driver.defaultJavaOptions"].startswith(context._SMALL_HEAP)
    assert conf["spark.ui.showConsoleProgress"] == "false"
    assert conf["spark.driver.host"] == "127.0.0.1"


@pytest.mark.cluster
def test_what_the_user_set_stays(run_python, tmp_path):
    (tmp_path / "spark-defaults.conf").write_text(
        "spark.master local[3]\n"
        "spark.driver.memory 1100m\n"
        "spark.ui.showConsoleProgress true\n"
        "spark.ui.enabled false\n"
        "spark.locality.wait.node 1s\n"
        "spark.python.daemon.module pyspark.daemon\n"
        "spark.driver.defaultJavaOptions -Dx=y\n"
    )
    started = start(
        run_python,
        {"spark.task.cpus": 2, "spark.log.level": "WARN"},
        SPARK_CONF_DIR=str(tmp_path),
        PYSPARK_SUBMIT_ARGS="--conf spark.python.unix.domain.socket.enabled=false pyspark-shell",
    )
    conf = started["conf"]
    assert conf["spark.master"] == "local[3]"
    assert (started["slots"], started["threads"]) == (1, 2)
    assert conf["spark.driver.memory"] == "1100m"
    assert conf["spark.ui.showConsoleProgress"] == "true"
    assert conf["spark.locality.wait.node"] == "1s"
    assert conf["spark.log.level"] == "WARN"
    assert conf["spark.python.daemon.module"] == "pyspark.daemon"
    assert conf["spark.driver.defaultJavaOptions"] == "-Dx=y"
    assert conf["spark.python.unix.domain.socket.enabled"] == "false"


@pytest.mark.cluster
def test_spark_submit_names_the_master(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(STARTED.format(conf="a name", master=None)))
    submit = Path(pyspark.__file__).parent / "bin" / "spark-submit"
    arguments = ["--master", "local[2]", "--conf", "spark.ui.enabled=false"]
    result = subprocess.run(
        [str(submit), *arguments, "--driver-memory", "1200m", str(script)],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(
                [str(Path(context.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
            ),
            "PYSPARK_DRIVER_PYTHON": sys.executable,
        },
    )
    assert result.returncode == 0, result.stderr
    started = json.loads(result.stdout.splitlines()[-1])
    assert started["slots"] == 2
    assert started["workers"] == [[sys.executable, True]] * 2
    assert started["conf"]["spark.driver.memory"] == "1200m"
    assert started["conf"]["spark.app.name"] == "a name"


@pytest.mark.cluster
def test_a_socket_folder_too_long_is_left_alone(run_python, tmp_path):
    folder = tmp_path / ("x" * 80)
    folder.mkdir()
    started = start(
        run_python,
        {
            "spark.ui.enabled": False,
            "spark.driver.extraJavaOptions": f"-Djava.io.tmpdir={folder}",
        },
        "local[2]",
    )
    assert "spark.python.unix.domain.socket.enabled" not in started["conf"]
    assert len(started["workers"]) == 2


@pytest.mark.cluster
@pytest.mark.slow
def test_a_cluster_of_processes_is_checked_and_counted(run_python):
    started = start(run_python, {"spark.ui.enabled": False}, "local-cluster[2,2,1024]")
    assert started["slots"] == 4
    assert started["workers"] == [[sys.executable, True]] * 2


@pytest.mark.cluster
@pytest.mark.slow
def test_executors_without_the_drivers_packages_are_named(run_python, tmp_path):
    # -S leaves out site-packages, as an executor without TensorFlow would.
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    source = """
        from tfspark import init_nncontext
        from tfspark.errors import ClusterError
        try:
            init_nncontext({"spark.ui.enabled": False}, master="local-cluster[1,1,1024]")
        except ClusterError as error:
            print("refused:", error)
        from pyspark import SparkContext
        assert SparkContext._active_spark_context is None
    """
    output = run_python(source, PYSPARK_PYTHON=str(python)).stdout
    assert "refused: Executors need TensorFlow. Received: TensorFlow" in output
    assert "on the driver, none on" in output


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere PySpark's own daemon is used")
def test_workers_start_without_a_task_of_the_script(run_python):
    source = """
        import time
        from pathlib import Path
        from tfspark import init_nncontext
        from tfspark.slots import busy_slots

        context = init_nncontext(master="local[2]")
        jvm = context._jvm.java.lang.ProcessHandle.current().pid()

        def children():
            tasks = Path(f"/proc/{jvm}/task").glob("*/children")
            pids = " ".join(task.read_text() for task in tasks).split()
            return [Path(f"/proc/{pid}/cmdline").read_text() for pid in pids]

        deadline = time.monotonic() + 60
        while not any("tfspark.daemon" in line for line in children()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert len(context.statusTracker().getActiveJobsIds()) == 1
        assert busy_slots(context) == 0
        context.stop()  # while it imports
    """
    result = run_python(source)
    assert " ERROR " not in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.skipif(sys.platform != "linux", reason="what a JVM maps is read from /proc")
def test_the_third_start_maps_the_classes_that_the_second_wrote(run_python, tmp_path):
    source = """
        from tfspark import init_nncontext
        sc = init_nncontext(master="local[1]")
        assert sc.parallelize([1, 2], 1).sum() == 3
        with open(f"/proc/{sc._gateway.proc.pid}/maps") as maps:
            print(*{line.split()[-1] for line in maps if ".jsa" in line and "tfspark" in line})
    """
    # In a folder without a configuration of Spark: with one, classes are not kept.
    folders = {"XDG_CACHE_HOME": str(tmp_path), "SPARK_CONF_DIR": None}
    outputs = [run_python(source, **folders).stdout.split() for _ in range(3)]
    (archive,) = (tmp_path / "tfspark").glob("*.jsa")
    assert outputs == [[], [], [str(archive)]]
    os.truncate(archive, archive.stat().st_size // 2)
    assert run_python(source, **folders).stdout.split() == []
