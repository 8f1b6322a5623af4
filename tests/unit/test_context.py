"""Decisions about Spark, without Spark."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from pyspark import SparkConf

from tfspark import context
from tfspark.errors import ClusterError, InvalidInputError

ROOT = Path(__file__).parent.parent.parent
OPTIONS = "spark.driver.defaultJavaOptions"


def fake_java(folder: Path, output: str) -> Path:
    """A `java` that prints this as its version, to standard error as the real one does."""
    java = folder / "bin" / "java"
    java.parent.mkdir(parents=True)
    java.write_text(f"#!/bin/sh\ncat >&2 <<'END'\n{output}\nEND\n")
    java.chmod(java.stat().st_mode | stat.S_IXUSR)
    return java


JAVA_8 = 'java version "1.8.0_412"\nJava(TM) SE Runtime Environment'
JAVA_11 = 'openjdk version "11.0.23" 2024-04-16'
JAVA_21 = 'Picked up JAVA_TOOL_OPTIONS: -Xmx1g\nopenjdk version "21.0.3" 2024-04-16 LTS'
JAVA_24_EA = 'openjdk version "24-ea" 2025-03-18'


class TestJava:
    @pytest.mark.parametrize(
        ("output", "major"), [(JAVA_8, 8), (JAVA_11, 11), (JAVA_21, 21), (JAVA_24_EA, 24)]
    )
    def test_major_version(self, output, major):
        assert context._java_version(output) == major

    def test_a_new_one_in_java_home_is_taken(self, tmp_path, monkeypatch):
        fake_java(tmp_path, JAVA_21)
        monkeypatch.setenv("JAVA_HOME", str(tmp_path))
        context.check_java()

    @pytest.mark.parametrize(
        ("output", "received"), [(JAVA_8, "Java 8 in JAVA_HOME"), ("Segmentation fault", "no ver")]
    )
    def test_an_old_or_broken_one_in_java_home(self, tmp_path, monkeypatch, output, received):
        fake_java(tmp_path, output)
        monkeypatch.setenv("JAVA_HOME", str(tmp_path))
        with pytest.raises(ClusterError, match=f"Java 17 or later. Received: {received}") as caught:
            context.check_java()
        assert "\n" not in str(caught.value)

    def test_none_on_the_path(self, tmp_path, monkeypatch):
        monkeypatch.delenv("JAVA_HOME", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(ClusterError, match="Received: none on the PATH"):
            context.check_java()


class TestMachineCheck:
    """The script behind both make commands; it has to work before anything is installed."""

    def run(self, **environment: str) -> subprocess.CompletedProcess[str]:
        merged = {**os.environ, "JAVA_HOME": "", "PYTHON": sys.executable, **environment}
        return subprocess.run(
            ["/bin/sh", str(ROOT / "tools" / "check_machine.sh")],
            capture_output=True,
            text=True,
            env=merged,
        )

    def test_a_good_machine_passes_without_a_word(self, tmp_path):
        fake_java(tmp_path, JAVA_21)
        result = self.run(JAVA_HOME=str(tmp_path))
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")

    @pytest.mark.parametrize("output", [JAVA_8, JAVA_11, "garbage"])
    def test_an_old_or_broken_java_is_one_line(self, tmp_path, output):
        java = fake_java(tmp_path, output)
        for where in (
            {"JAVA_HOME": str(tmp_path)},
            {"PATH": f"{java.parent}{os.pathsep}{os.environ['PATH']}"},
        ):
            result = self.run(**where)
            assert result.returncode == 1
            assert result.stderr.startswith("tfspark: Java 17 or later is needed")
            assert "Install a JDK" in result.stderr
            assert result.stderr.count("\n") == 1

    def test_a_missing_java_is_one_line(self, tmp_path):
        result = self.run(JAVA_HOME=str(tmp_path))
        assert result.returncode == 1
        assert "none was found in JAVA_HOME" in result.stderr
        assert result.stderr.count("\n") == 1

    def test_a_missing_or_old_python_is_one_line(self, tmp_path):
        old = tmp_path / "python3.8"
        old.write_text('#!/bin/sh\ncase "$2" in *print*) echo 3.8;; *) exit 1;; esac\n')
        old.chmod(0o755)
        for python, received in ((str(old), "is 3.8"), ("no-such-python", "was not found")):
            result = self.run(PYTHON=python)
            assert result.returncode == 1
            assert result.stderr.startswith("tfspark: Python 3.10 or later is needed")
            assert received in result.stderr
            assert result.stderr.count("\n") == 1


class TestRequested:
    def test_every_form_of_conf(self):
        settings = {"spark.task.cpus": "2", "spark.app.name": "a"}
        spark_conf = SparkConf(loadDefaults=False).set("spark.task.cpus", "2").setAppName("a")
        assert context._requested({"spark.task.cpus": 2}, "a", None) == settings
        assert context._requested(spark_conf, None, None) == settings
        assert context._requested("a", None, "local[2]") == {
            "spark.app.name": "a",
            "spark.master": "local[2]",
        }
        assert context._requested(None, None, None) == {}
        assert context._requested({"spark.ui.enabled": False}, None, None) == {
            "spark.ui.enabled": "false"
        }

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((["spark.task.cpus"], None, None), "Received: list"),
            (({"spark.master": "local"}, None, "yarn"), "master is given once"),
            (("name", "other", None), "app_name is given once"),
            ((None, None, 4), "master is a string. Received: 4, a int"),
        ],
    )
    def test_wrong_arguments(self, arguments, message):
        with pytest.raises(InvalidInputError, match=message):
            context._requested(*arguments)


class TestRefusals:
    @pytest.mark.parametrize("version", ["3.4.4", "5.0.0", "2.4"])
    def test_a_pyspark_of_another_age(self, version):
        with pytest.raises(ClusterError, match=rf"PySpark {version}\. .*pip install"):
            context._check_pyspark(version)

    @pytest.mark.parametrize("version", ["3.5.0", "3.5.7", "4.0.0.dev2", "4.3.0"])
    def test_a_supported_pyspark(self, version):
        context._check_pyspark(version)

    @pytest.mark.parametrize(
        "requested", [{"spark.remote": "sc://host"}, {"spark.api.mode": "connect"}]
    )
    def test_spark_connect_by_setting(self, requested):
        with pytest.raises(ClusterError, match="Spark Connect"):
            context.init_nncontext(requested)

    def test_spark_connect_by_environment(self, monkeypatch):
        monkeypatch.setenv("SPARK_REMOTE", "sc://host:15002")
        with pytest.raises(ClusterError, match="Received: sc://host:15002"):
            context.init_nncontext()


class TestEarlyDefaults:
    """What is set before the JVM starts."""

    JAVA = "java\n64-Bit Server VM (mixed mode, sharing)"

    @pytest.fixture
    def cache(self, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setenv("SPARK_CONF_DIR", str(tmp_path / "conf"))
        monkeypatch.delenv("PYSPARK_SUBMIT_ARGS", raising=False)
        return tmp_path / "tfspark"

    def test_starts_are_counted_for_an_archive_of_classes(self, cache):
        options = [context._early_defaults({}, True, self.JAVA)[OPTIONS] for _ in range(2)]
        assert options[0] == context._SMALL_HEAP
        assert "ArchiveClassesAtExit" in options[1]
        assert cache.is_dir()

    def test_java_options_of_the_user_leave_no_trace(self, cache):
        found = context._early_defaults({OPTIONS: "-Dx=y"}, True, self.JAVA)
        assert found == {"spark.ui.showConsoleProgress": "false"}
        assert not cache.exists()

    def test_a_configuration_folder_with_files_leaves_no_trace(self, cache, tmp_path):
        (tmp_path / "conf").mkdir()
        (tmp_path / "conf" / "log4j2.properties").touch()
        assert context._early_defaults({}, True, self.JAVA)[OPTIONS] == context._SMALL_HEAP
        assert not cache.exists()

    def test_the_jvm_of_a_cluster_has_its_own_options(self, cache):
        assert OPTIONS not in context._early_defaults({}, False, self.JAVA)
        assert not cache.exists()


class TestDefaults:
    def test_memory_is_a_quarter_and_at_least_one_gibibyte(self):
        assert context._driver_memory_mib(16 * 2**30) == 4096
        assert context._driver_memory_mib(2 * 2**30) == 1024

    def test_only_a_local_master_is_bound_to_the_loopback_address(self):
        assert context._defaults("local[*]")["spark.driver.host"] == "127.0.0.1"
        assert "spark.driver.host" not in context._defaults("yarn")
        assert "spark.executorEnv.PYTHONPATH" not in context._defaults("spark://h:7077")

    def test_the_users_log_configuration_stays(self, tmp_path, monkeypatch):
        monkeypatch.setenv("SPARK_CONF_DIR", str(tmp_path))
        assert context._defaults("local")["spark.log.level"] == "ERROR"
        (tmp_path / "log4j2.properties").touch()
        assert "spark.log.level" not in context._defaults("local")

    def test_the_users_log_level_of_tensorflow_stays(self, monkeypatch):
        name = "spark.executorEnv.TF_CPP_MIN_LOG_LEVEL"
        monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "0")
        assert name not in context._defaults("local")
        monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL")
        assert context._defaults("local")[name] == "1"

    def test_the_environment_is_restored_and_never_overridden(self, monkeypatch):
        monkeypatch.setenv("A_SET", "user")
        with context._environment({"A_SET": "ours", "B_UNSET": "ours"}):
            assert (os.environ["A_SET"], os.environ["B_UNSET"]) == ("user", "ours")
        assert os.environ["A_SET"] == "user"
        assert "B_UNSET" not in os.environ

    def test_settings_named_before_the_launch(self, tmp_path, monkeypatch):
        (tmp_path / "spark-defaults.conf").write_text(
            "# spark.not.this 1\nspark.one  1\n  spark.two=2\n"
        )
        monkeypatch.setenv("SPARK_CONF_DIR", str(tmp_path))
        monkeypatch.setenv("PYSPARK_SUBMIT_ARGS", "--conf spark.three=3 pyspark-shell")
        assert context._named_before_launch() == {"spark.one", "spark.two", "spark.three"}
