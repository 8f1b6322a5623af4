"""What Python workers are forked from."""

from __future__ import annotations

import json
import sys
import traceback

import pytest
from pyspark import SparkConf

from tfspark import context, daemon

PRELOADED = """
    import json, os, sys
    from tfspark import daemon
    daemon.preload({modules!r})
    folder = "/proc/self/task"
    threads = [open(f"{{folder}}/{{thread}}/comm").read() for thread in os.listdir(folder)]
    print(json.dumps(dict(threads=threads, modules=sorted(sys.modules))))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="init_nncontext uses the daemon on Linux only")
def test_nothing_that_is_imported_waits_for_a_thread_of_its_own(run_python):
    # Spark sets OMP_NUM_THREADS for its workers, which OpenBLAS heeds.
    result = run_python(PRELOADED.format(modules=daemon.MODULES), OMP_NUM_THREADS="1")
    found = json.loads(result.stdout)
    assert {"tensorflow", *daemon.MODULES} <= set(found["modules"])
    assert not {"keras", "sklearn", "matplotlib"} & set(found["modules"])
    main, *others = found["threads"]
    assert main.startswith("python")
    assert set(others) <= {"jemalloc_bg_thd\n"}  # ended before a fork, and started after it


def test_keras_is_there_for_a_task_that_asks_for_it(run_python):
    source = """
        import sys
        preloads = {preloads}
        if preloads:
            from tfspark import daemon
            daemon.preload(daemon.MODULES)
        import tensorflow as tf
        print(sorted(tf.__path__))
        import tensorflow.keras.layers
        from tensorflow.keras import Model
        import keras
        assert Model is keras.Model is tf.keras.Model
        print(tf.keras.layers.Dense(2)(tf.ones((3, 4))).shape, len(sys.meta_path))
    """
    outputs = [run_python(source.format(preloads=preloads)).stdout for preloads in (True, False)]
    assert "(3, 2)" in outputs[0]
    assert outputs[0] == outputs[1]


def test_standard_output_is_kept_for_spark(run_python, tmp_path):
    (tmp_path / "talkative.py").write_text(
        "import os\nprint('from Python')\nos.write(1, b'from C\\n')\n"
    )
    source = f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        from tfspark import daemon
        daemon.preload(["talkative", "no_such_module_anywhere"])
        print("port")
    """
    result = run_python(source)
    assert result.stdout == "port\n"
    assert "from Python" in result.stderr
    assert "from C" in result.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="init_nncontext uses the daemon on Linux only")
def test_pages_stay_shared_from_run_to_run(run_python):
    """A worker that looked at all objects for garbage would have a copy of each, some 60 MB."""
    source = """
        import gc, os, sys, types
        from tfspark import daemon
        daemon.preload(daemon.MODULES)
        from tfspark.sync import tasks

        def private_mb():
            with open("/proc/self/smaps_rollup") as lines:
                return sum(int(l.split()[1]) for l in lines if l.startswith("Private_Dirty")) / 1024

        if os.fork() == 0:
            before, frozen = private_mb(), gc.get_freeze_count()
            for run in range(3):
                sys.modules[f"imported_{run}"] = types.ModuleType("imported")
                tasks._freeze_modules()
                gc.collect()
            print(private_mb() - before, gc.get_freeze_count() - frozen, len(gc.get_objects()))
            sys.stdout.flush()
            os._exit(0)
        os.wait()
    """
    copied_mb, frozen, looked_at = map(float, run_python(source).stdout.split())
    assert copied_mb < 15
    assert frozen >= 3
    assert looked_at < 2_000


def test_a_spark_that_has_gone_is_no_error(capsys):
    tracebacks = daemon.Tracebacks()
    for error in (BrokenPipeError(), ConnectionResetError(), ValueError("of a task")):
        try:
            raise error
        except (OSError, ValueError):
            tracebacks.print_exc()
    printed = capsys.readouterr().err
    assert printed.count("Traceback") == 1 and printed.endswith("ValueError: of a task\n")
    assert tracebacks.format_exc is traceback.format_exc


class TestWhereItIsUsed:
    @pytest.fixture(autouse=True)
    def checkout(self, monkeypatch):
        monkeypatch.setattr(sys, "platform", "linux")
        monkeypatch.setenv("PYSPARK_PYTHON", sys.executable)
        monkeypatch.delenv("PYTHONPATH", raising=False)
        self.conf = SparkConf(loadDefaults=False)
        self.conf.set("spark.executorEnv.PYTHONPATH", f"/else:{context._PACKAGE_HOME}")

    def test_on_a_local_master(self):
        assert context._daemon_works("local[2]", self.conf)
        assert context._daemon_works("local-cluster[2,1,1024]", self.conf)

    def test_not_where_executors_are_elsewhere(self):
        assert not context._daemon_works("yarn", self.conf)
        assert not context._daemon_works("spark://host:7077", self.conf)

    def test_not_where_a_fork_crashes(self, monkeypatch):
        monkeypatch.setattr(sys, "platform", "darwin")
        assert not context._daemon_works("local", self.conf)

    def test_not_with_another_interpreter(self, monkeypatch):
        monkeypatch.setenv("PYSPARK_PYTHON", "/usr/bin/python-of-another-day")
        assert not context._daemon_works("local", self.conf)

    def test_not_where_workers_cannot_import_it(self, monkeypatch, tmp_path):
        self.conf.set("spark.executorEnv.PYTHONPATH", "/else")
        assert not context._daemon_works("local", self.conf)
        monkeypatch.setattr(context, "_PACKAGE_HOME", tmp_path / "site-packages")
        assert context._daemon_works("local", self.conf)
