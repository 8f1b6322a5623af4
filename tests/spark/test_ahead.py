"""The process that imports TensorFlow beside the JVM, before Spark asks for one."""

import json
import sys
import tempfile

import pytest

from tfspark import context
from tfspark.ahead import fits_together

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="init_nncontext starts it on Linux only"
)


@pytest.mark.parametrize(
    ("name", "ahead", "asked", "fits"),
    [
        ("SPARK_BUFFER_SIZE", None, "65536", True),
        ("PYTHON_WORKER_FACTORY_SECRET", None, "x", True),
        ("ANY_OTHER", "1", "2", True),
        ("OMP_NUM_THREADS", "1", "2", False),
        ("TF_NUM_INTRAOP_THREADS", None, "1", False),
        ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1", None, False),
        ("PYTHONHASHSEED", "0", "1", False),
        ("PYTHONPATH", "/a:/b", "/spark/pyspark.zip:/spark/core.jar:/a:/b:/a", True),
        ("PYTHONPATH", "/a:/b", "/b:/a", False),
        ("PYTHONPATH", None, "/spark/pyspark.zip", True),
    ],
)
def test_what_must_be_the_same(name, ahead, asked, fits):
    def variables(value):
        return {"HOME": "/home", **({} if value is None else {name: value})}

    assert fits_together(variables(ahead), variables(asked)) == fits


@pytest.mark.parametrize(
    ("requested", "variables", "can"),
    [
        ({}, {}, True),
        ({"spark.master": "local[3]"}, {}, True),
        ({"spark.master": "local-cluster[2,1,1024]"}, {}, False),
        ({"spark.master": "spark://host:7077"}, {}, False),
        ({"spark.python.daemon.module": "pyspark.daemon"}, {}, False),
        ({}, {"PYSPARK_PYTHON": "/usr/bin/python-of-another-day"}, False),
        ({}, {"PYSPARK_SUBMIT_ARGS": "--conf spark.master=yarn pyspark-shell"}, False),
    ],
)
def test_where_it_is_started(requested, variables, can, monkeypatch):
    for name in ("PYSPARK_PYTHON", "PYSPARK_SUBMIT_ARGS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert context._can_import_ahead(requested) == can


def test_a_socket_in_a_deep_folder_has_too_long_a_name(monkeypatch, tmp_path):
    monkeypatch.delenv("PYSPARK_PYTHON", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("x" * 100)))
    assert not context._can_import_ahead({})


APPLICATION = """
    import json, os, signal, time
    from spark_app import descendants, wait_for
    from tfspark import init_nncontext

    def those(flag):
        return [p for p, line in descendants().items() if f"tfspark.daemon {{flag}}" in line]

    def ancestors():
        # A task's process, what it was forked from, and the environment that it has.
        def look(rows):
            list(rows)
            yield os.getppid(), os.environ.get("SPARK_BUFFER_SIZE"), os.getcwd()
        ((parent, *rest),) = sc.parallelize([0], 1).mapPartitions(look).collect()
        return parent, rest

    # A task that failed is tried again.
    sc = init_nncontext({{"spark.ui.enabled": False}}, master="local[1,4]")
    {body}
"""


def run(run_python, body, **environment):
    lines = "\n    ".join(body.strip().splitlines())
    result = run_python(APPLICATION.format(body=lines), **environment)
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture
def run_python(run_python, monkeypatch):
    """With the module `spark_app` in reach of the application."""
    support = next(path for path in sys.path if path.endswith("tests/support"))
    monkeypatch.setenv("PYTHONPATH", support)
    return run_python


def test_it_serves_spark_and_ends_with_it(run_python):
    body = """
parent, rest = ancestors()
before = those("--ahead"), those("pyspark.worker")
path = sc.getConf().get("spark.executorEnv.TFSPARK_AHEAD")
sc.stop()
wait_for(lambda: not those("--ahead") and not those("pyspark.worker"), 10)
print(json.dumps([parent, before, rest, os.getcwd(), os.path.exists(os.path.dirname(path))]))
"""
    (parent, (ahead, front), (size, folder), here, left) = run(run_python, body)
    assert parent in ahead and len(front) == 1
    assert size is not None and folder == here
    assert not left


def test_where_settings_differ_spark_has_a_process_of_its_own(run_python, tmp_path):
    (tmp_path / "spark-defaults.conf").write_text("spark.executorEnv.TF_A_SETTING of-the-user\n")
    body = """
parent, _ = ancestors()
wait_for(lambda: not those("--ahead"), 10)
print(json.dumps([parent, those("pyspark.worker")]))
"""
    (parent, own) = run(run_python, body, SPARK_CONF_DIR=str(tmp_path))
    assert parent in own


def test_when_it_dies_spark_starts_another_one(run_python):
    body = """
parent, _ = ancestors()
for process in those("--ahead"):  # with the worker that it has forked
    os.kill(process, signal.SIGKILL)
wait_for(lambda: not those("pyspark.worker"), 10)
again, _ = ancestors()
print(json.dumps([parent, again, those("pyspark.worker")]))
"""
    (parent, again, own) = run(run_python, body)
    assert again != parent and again in own


def test_it_ends_with_a_driver_that_is_killed(run_python):
    source = """
        import os, subprocess, sys, time
        from pathlib import Path
        from spark_app import wait_for

        killed = "import os; from tfspark import init_nncontext, context\\n"
        killed += "die = lambda conf=None: os.kill(os.getpid(), 9)\\n"
        early = killed + "context.SparkContext._ensure_initialized = die\\n"
        early += "init_nncontext(master='local[1]')"
        late = killed + "sc = init_nncontext(master='local[1]')\\n"
        late += "sc.parallelize([0], 1).map(str).collect()\\ndie()"

        def left():
            lines = []
            for path in Path("/proc").glob("[0-9]*/environ"):
                try:
                    if b"OF_THIS_TEST=1" in path.read_bytes():
                        lines.append((path.parent / "cmdline").read_bytes())
                except OSError:
                    continue
            return lines

        for script in (early, late):
            done = subprocess.run(
                [sys.executable, "-c", script], env={**os.environ, "OF_THIS_TEST": "1"},
                stdin=subprocess.DEVNULL,
            )
            assert done.returncode == -9
            wait_for(lambda: not left(), 20)
    """
    run_python(source)


def test_a_spark_that_was_stopped_meanwhile_is_no_error(run_python):
    source = """
        import json, os, socket, struct
        from tfspark.ahead import Ahead
        from spark_app import wait_for

        asked = json.dumps(dict(environment=dict(os.environ), folder="/", arguments=[])).encode()
        for said in (b"", asked[:9], asked):
            ahead = Ahead(os.environ)
            wait_for(lambda: os.path.exists(ahead.path), 30)
            with socket.socket(socket.AF_UNIX) as front:
                wait_for(lambda: front.connect_ex(ahead.path) == 0, 30)
                if said:
                    socket.send_fds(front, [struct.pack("!I", len(asked))], (0, 1, 2))
                    front.sendall(said)
            assert ahead._process.wait(60) == 0
            assert not os.path.exists(os.path.dirname(ahead.path))
    """
    assert "Traceback" not in run_python(source).stderr
