"""Spark, configured for training and checked before it is needed.

`init_nncontext` starts Spark inside this process, or joins the Spark that `spark-submit` or a
notebook server has started. It sets what the user left open and changes nothing that is set: not
in the code, nor on the command line, in `spark-defaults.conf` or in the environment.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pyspark
from pyspark import SparkConf, SparkContext

from tfspark import ahead, jvm_classes
from tfspark.errors import ClusterError, InvalidInputError
from tfspark.executors import compare_executors
from tfspark.slots import STARTING_WORKERS, in_process

logger = logging.getLogger("tfspark")

MIN_JAVA = 17
MIN_PYSPARK, END_PYSPARK = (3, 5), (5, 0)

# The folder that holds the package; on the workers' path, a checkout works without installation.
_PACKAGE_HOME = Path(__file__).resolve().parent.parent

# A Unix socket's path has 108 bytes on Linux and 104 on macOS, with the closing zero. PySpark
# appends "/." + a UUID of 36 characters + ".sock" to the folder.
_MAX_SOCKET_FOLDER = 104 - 1 - 2 - 36 - 5

# Has malloc ask for huge pages (glibc 2.35 and later; others ignore it). TensorFlow's tensors come
# from malloc, and with pages of 4 KiB a step spends a sixth of its time on looking pages up.
_HUGE_PAGES = "glibc.malloc.hugetlb=1"

# Has an embedded JVM collect garbage a little more, and give back what it does not use: a heap that
# has grown stays large otherwise. With a ratio of 3 the engine `shuffle` lost a tenth of its speed.
_SMALL_HEAP = "-XX:GCTimeRatio=9 -XX:MinHeapFreeRatio=20 -XX:MaxHeapFreeRatio=40"

# What these say of a failed task in pages of Java, the driver raises as one error.
_TASK_LOGGERS = (
    "org.apache.spark.executor.Executor",
    "org.apache.spark.scheduler.TaskSetManager",
    "org.apache.spark.TaskContextImpl",
)

_PROGRESS = "spark.ui.showConsoleProgress"
_JAVA_OPTIONS = "spark.driver.defaultJavaOptions"
_DAEMON = "tfspark.daemon"
_OF_EXECUTORS = "spark.executorEnv."

_checked: weakref.WeakSet[SparkContext] = weakref.WeakSet()

_importing: list[ahead.Ahead] = []  # one that nobody holds any more ends


def init_nncontext(
    conf: Mapping[str, Any] | SparkConf | str | None = None,
    *,
    app_name: str | None = None,
    master: str | None = None,
    check_executors: bool = True,
) -> SparkContext:
    """The SparkContext of this application, started where there is none yet.

    In a plain script or a notebook this starts Spark inside the process on all cores
    (`local[*]`), unless a master is set somewhere. Under `spark-submit` it takes the master given
    there. Where a SparkContext is active already, that one is returned.

    What it sets where the user did not:

    * on a local master: `PYSPARK_PYTHON` to this interpreter, so that virtual environments work;
      tfspark's folder on the workers' `PYTHONPATH`; the driver on the loopback address; driver
      memory of a quarter of the machine's (at least 1 GiB), because the driver is the executor
      there too, and a JVM that collects garbage before it takes all of that; log level `ERROR`,
      without the errors of single tasks, which the driver raises; warnings and errors only from
      the workers' TensorFlow; on Linux, Python workers that are forked from a process that has
      imported TensorFlow (`spark.python.daemon.module`), so that they start at once and share its
      memory; that process is started beside the JVM, and one tiny job in the background has
      Spark make use of it; and Java options (`spark.driver.defaultJavaOptions`) for a smaller
      heap and for a quicker start: the second start of the JVM writes its classes into a file of
      some 90 MB (in `~/.cache/tfspark`, or `$XDG_CACHE_HOME/tfspark`), which later ones map;
    * everywhere: `spark.ui.showConsoleProgress=false`, because tfspark shows its own progress;
      Unix domain sockets between the JVM and Python (Spark 4.1 and later, not on YARN), which
      nearly halve the time of a small task; a longer `spark.locality.wait.node`, because a
      task away from its store costs a rebuild of the store; a shorter
      `spark.storage.cachedPeersTtl`, so that soon after the loss of an executor commits have two
      copies again; shorter waits of barrier stages for a lost executor's successor
      (`spark.scheduler.barrier.maxConcurrentTasksCheck`); and huge pages for the memory of Python
      workers (`spark.executorEnv.GLIBC_TUNABLES`), which is a sixth of a small model's step.

    Args:
        conf: Spark settings, as a dict or a `SparkConf`; a string is the application's name.
        app_name: the application's name.
        master: a Spark master, such as `"local[4]"` or `"spark://host:7077"`.
        check_executors: run one tiny job that compares Python, TensorFlow and tfspark on the
            executors with the driver's. It runs once per SparkContext, and only where executors
            are processes of their own.

    Returns:
        The active SparkContext.

    Raises:
        ClusterError: Java is missing or older than 17, PySpark is not of a supported version, the
            session is a Spark Connect one, or executors differ from the driver.
        InvalidInputError: an argument has the wrong type, or a name or master is given twice.

    Example:
        >>> sc = init_nncontext({"spark.task.cpus": 2}, app_name="digits", master="local[4]")
        >>> sc.master, sc.appName
        ('local[4]', 'digits')
    """
    requested = _requested(conf, app_name, master)
    _check_pyspark(pyspark.__version__)
    _refuse_connect(requested)
    active = SparkContext._active_spark_context
    if active is not None:
        _warn_of_ignored(requested, active)
    context = active or _start(requested)
    if check_executors and not in_process(context) and context not in _checked:
        try:
            compare_executors(context)
        except ClusterError:
            if active is None:
                context.stop()  # so that the next try can start with other settings
            raise
        _checked.add(context)
    return context


# Starting Spark


def _requested(
    conf: Mapping[str, Any] | SparkConf | str | None, app_name: str | None, master: str | None
) -> dict[str, str]:
    """Every setting that the caller named, as Spark's strings."""
    if isinstance(conf, str):
        conf = {"spark.app.name": conf}
    elif isinstance(conf, SparkConf):
        conf = dict(conf.getAll())
    elif conf is None:
        conf = {}
    elif not isinstance(conf, Mapping):
        raise InvalidInputError(
            "conf is a dict of Spark settings, a SparkConf, an application's name or None. "
            f"Received: {type(conf).__name__}."
        )
    settings = {str(key): _as_setting(value) for key, value in conf.items()}
    for key, argument, value in (
        ("spark.app.name", "app_name", app_name),
        ("spark.master", "master", master),
    ):
        if value is None:
            continue
        if not isinstance(value, str):
            raise InvalidInputError(
                f"{argument} is a string. Received: {value!r}, a {type(value).__name__}."
            )
        if settings.setdefault(key, value) != value:
            raise InvalidInputError(
                f"{argument} is given once. Received: {argument}={value!r}, and "
                f"{settings[key]!r} as {key} in conf."
            )
    return settings


def _as_setting(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _start(requested: dict[str, str]) -> SparkContext:
    """A new SparkContext; the JVM is started unless spark-submit has done so."""
    launch = SparkConf(loadDefaults=False)
    for key, value in requested.items():
        launch.set(key, value)
    launches = SparkContext._gateway is None and "PYSPARK_GATEWAY_PORT" not in os.environ
    local = requested.get("spark.master", "local").startswith("local")
    if launches:
        for key, value in _early_defaults(requested, local, check_java()).items():
            launch.set(key, value)
    with ExitStack() as undo:
        imports = None
        if launches and _can_import_ahead(requested):
            imports = ahead.Ahead(_worker_environment(requested))
            undo.callback(imports.end)
        with _environment(_launch_environment(requested) if launches and local else {}):
            # Only the JVM knows all that the user set: it has read spark-defaults.conf and the
            # arguments of spark-submit.
            SparkContext._ensure_initialized(conf=launch)
        conf, silences = _configured(requested)
        uses_daemon = conf.get("spark.python.daemon.module") == _DAEMON
        if uses_daemon and imports is not None:
            conf.set(f"{_OF_EXECUTORS}{ahead.SOCKET}", imports.path)
        context = SparkContext(conf=conf)
        if silences:
            _silence(context, _TASK_LOGGERS)
        if uses_daemon and in_process(context):
            _start_workers(context)
            if imports is not None:
                _importing.append(imports)
                undo.pop_all()
    return context


def _early_defaults(requested: Mapping[str, str], local: bool, java: str) -> dict[str, str]:
    """What has to be set before the JVM starts, where the user set nothing."""
    named = requested.keys() | _named_before_launch()
    defaults = {}
    if _PROGRESS not in named:
        # To Spark, a Python script is a shell, and a shell turns this on; so later we could not
        # tell whether the user did.
        defaults[_PROGRESS] = "false"
    if local and _JAVA_OPTIONS not in named:
        defaults[_JAVA_OPTIONS] = f"{_SMALL_HEAP} {_kept_classes(java, requested)}".strip()
    return defaults


def _configured(requested: Mapping[str, str]) -> tuple[SparkConf, bool]:
    """All settings, and whether errors of single tasks are to be silent; the JVM runs."""
    conf = SparkConf()
    for key, value in requested.items():
        conf.set(key, value)
    if conf.get("spark.app.name") in (None, "pyspark-shell"):
        conf.set("spark.app.name", Path(sys.argv[0]).stem or "tfspark")
    conf.setIfMissing("spark.master", "local[*]")
    master = str(conf.get("spark.master"))
    defaults = _defaults(master)
    silences = not conf.contains("spark.log.level") and "spark.log.level" in defaults
    for key, value in defaults.items():
        conf.setIfMissing(key, value)
    if _sockets_work(master, conf):
        conf.setIfMissing("spark.python.unix.domain.socket.enabled", "true")
    if master.startswith("local"):
        os.environ.setdefault(
            "PYSPARK_PYTHON", conf.get("spark.pyspark.python", sys.executable) or sys.executable
        )
    if _daemon_works(master, conf):
        conf.setIfMissing("spark.python.daemon.module", _DAEMON)
        # Spark SQL sets this for its workers; set for all, one daemon serves DataFrames and RDDs.
        conf.setIfMissing("spark.executorEnv.SPARK_SIMPLIFIED_TRACEBACK", "1")
    return conf, silences


def _can_import_ahead(requested: Mapping[str, str]) -> bool:
    """Whether this process will most likely start the JVM and workers as `_DAEMON` has them."""
    named = _named_before_launch()
    return (
        sys.platform == "linux"
        and bool(re.match(r"local(\[|$)", requested.get("spark.master", "local")))
        and "spark.master" not in named
        and "spark.python.daemon.module" not in requested.keys() | named
        and shutil.which(os.environ.get("PYSPARK_PYTHON", sys.executable)) == sys.executable
        and len(os.fsencode(tempfile.gettempdir())) <= _MAX_SOCKET_FOLDER
    )


def _worker_environment(requested: Mapping[str, str]) -> dict[str, str]:
    """The variables that Spark will start Python with; where they turn out to differ, it does."""
    environment = {
        **os.environ,
        "PYTHONHASHSEED": os.environ.get("PYTHONHASHSEED", "0"),
        "PYTHONUNBUFFERED": "YES",
        "OMP_NUM_THREADS": requested.get("spark.task.cpus", "1"),
    }
    for key, value in {**_defaults("local"), **requested}.items():
        if key.startswith(_OF_EXECUTORS):
            environment[key[len(_OF_EXECUTORS) :]] = value
    return environment


def _start_workers(context: SparkContext) -> None:
    """Has Spark start what workers are forked from, while the script builds its model.

    That imports for some seconds, which would be the first task's otherwise.
    """
    context.setJobGroup(STARTING_WORKERS, "Python workers start")
    # Asynchronous in the JVM: no thread of Python waits for it, nor is there an error of it here.
    context.parallelize([0], 1).mapPartitions(_read())._jrdd.countAsync()
    context._jsc.clearJobGroup()


def _read() -> Callable[[Iterable[Any]], Iterable[Any]]:
    """A task that reads its input to the end; nested, so that it travels by value."""
    return lambda rows: [row for row in rows if row is None]


def _silence(context: SparkContext, loggers: Iterable[str]) -> None:
    """Switches loggers of the JVM off."""
    assert context._jvm is not None
    log4j = context._jvm.org.apache.logging.log4j
    for logger in loggers:
        log4j.core.config.Configurator.setLevel(logger, log4j.Level.OFF)


def _defaults(master: str) -> dict[str, str]:
    """What tfspark prefers on this master; used where the user set nothing."""
    defaults = {
        _PROGRESS: "false",
        # Tasks want the host of their store. With the usual 3 s a busy slot would send one away,
        # and reading and writing the partition again takes longer than that.
        "spark.locality.wait.node": "10s",
        # Milliseconds that an executor believes to know the others. With the usual minute, one that
        # was alone for a moment keeps commits to itself for as long, and they die with it.
        "spark.storage.cachedPeersTtl": "2000",
        # A barrier stage waits for slots by asking now and then, by default every 15 s. An executor
        # that was lost is often back within a few.
        "spark.scheduler.barrier.maxConcurrentTasksCheck.interval": "1s",
        "spark.scheduler.barrier.maxConcurrentTasksCheck.maxFailures": "120",
    }
    if "GLIBC_TUNABLES" not in os.environ:
        defaults["spark.executorEnv.GLIBC_TUNABLES"] = _HUGE_PAGES
    if master.startswith("local"):
        defaults |= {"spark.driver.host": "127.0.0.1", "spark.driver.bindAddress": "127.0.0.1"}
        # The JVM's own log configuration is the user's, where there is one.
        if not (_conf_folder() / "log4j2.properties").exists():
            defaults["spark.log.level"] = "ERROR"
        if "TF_CPP_MIN_LOG_LEVEL" not in os.environ:
            # Each worker would greet the terminal with TensorFlow's notes about the processor.
            defaults["spark.executorEnv.TF_CPP_MIN_LOG_LEVEL"] = "1"
        if not _is_installed():
            path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
            entries = dict.fromkeys([*filter(None, path), str(_PACKAGE_HOME)])
            defaults["spark.executorEnv.PYTHONPATH"] = os.pathsep.join(entries)
    return defaults


def _launch_environment(requested: Mapping[str, str]) -> dict[str, str]:
    """Variables for an embedded JVM; Spark ranks them below every setting of the user."""
    environment = {"SPARK_DRIVER_MEMORY": f"{_driver_memory_mib(_machine_memory())}m"}
    if not requested.keys() & {"spark.driver.host", "spark.driver.bindAddress"}:
        try:
            address = socket.gethostbyname(socket.gethostname())
        except OSError:
            address = "127.0.0.1"
        # A name that is unknown stops Spark, and one of the loopback address makes it pick some
        # network interface and warn; SPARK_LOCAL_HOSTNAME is the other way to settle this.
        if address.startswith("127.") and "SPARK_LOCAL_HOSTNAME" not in os.environ:
            environment["SPARK_LOCAL_IP"] = "127.0.0.1"
    return environment


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets the variables that are unset, for the duration of the block."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def _machine_memory() -> int:
    """Bytes that this process may use: the machine's, or its container's where that is less."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        if os.path.exists(path):
            text = Path(path).read_text(encoding="ascii").strip()
            if text.isdigit():  # "max" means no limit
                limits.append(int(text))
    return min(limits)


def _driver_memory_mib(machine_bytes: int) -> int:
    """A quarter of the machine: the JVM holds commits, Python and TensorFlow need the rest."""
    return max(1024, machine_bytes // 4 // 2**20)


def _kept_classes(java: str, requested: Mapping[str, str]) -> str:
    """Java options that keep the classes of an embedded JVM for its next start."""
    # A folder of the class path must be empty for that, and Spark puts its configuration there.
    folder = _conf_folder()
    if folder.is_dir() and any(folder.iterdir()):
        return ""
    also = (requested.get("spark.driver.extraClassPath"), os.environ.get("SPARK_DIST_CLASSPATH"))
    return jvm_classes.java_options(java, _spark_home() / "jars", map(str, also))


def _spark_home() -> Path:
    return Path(os.environ.get("SPARK_HOME") or os.path.dirname(pyspark.__file__))


def _conf_folder() -> Path:
    folder = os.environ.get("SPARK_CONF_DIR")
    return Path(folder) if folder else _spark_home() / "conf"


def _named_before_launch() -> set[str]:
    """The settings named in spark-defaults.conf and in PYSPARK_SUBMIT_ARGS."""
    named = re.findall(r"(spark\.[\w.]+)=", os.environ.get("PYSPARK_SUBMIT_ARGS", ""))
    defaults = _conf_folder() / "spark-defaults.conf"
    if defaults.exists():
        named += re.findall(r"(?m)^\s*(spark\.[\w.]+)", defaults.read_text(encoding="utf-8"))
    return set(named)


def _sockets_work(master: str, conf: SparkConf) -> bool:
    """Whether JVM and Python workers can meet at Unix domain sockets, and the user left it open."""
    if _version(pyspark.__version__) < (4, 1) or not hasattr(socket, "AF_UNIX"):
        return False
    # YARN gives each container a folder of its own, with a path too long for a socket.
    if master.startswith("yarn") or "PYSPARK_UDS_MODE" in os.environ:
        return False
    jvm: Any = SparkContext._jvm
    folder = conf.get("spark.python.unix.domain.socket.dir")
    folder = folder or str(jvm.java.lang.System.getProperty("java.io.tmpdir"))
    return len(os.fsencode(folder)) <= _MAX_SOCKET_FOLDER


def _daemon_works(master: str, conf: SparkConf) -> bool:
    """Whether Spark can start `tfspark.daemon`: without its daemon it runs no Python at all."""
    if sys.platform != "linux" or not master.startswith("local"):
        return False  # a fork with macOS's frameworks loaded crashes; other hosts are not known
    if shutil.which(os.environ["PYSPARK_PYTHON"]) != sys.executable:
        return False
    path = conf.get("spark.executorEnv.PYTHONPATH") or os.environ.get("PYTHONPATH", "")
    return _is_installed() or str(_PACKAGE_HOME) in path.split(os.pathsep)


def _is_installed() -> bool:
    return _PACKAGE_HOME.name in ("site-packages", "dist-packages")


def _warn_of_ignored(requested: Mapping[str, str], context: SparkContext) -> None:
    """A running SparkContext cannot be changed: says which settings come too late."""
    conf = context.getConf()
    late = sorted(
        f"{key}={value} (is {conf.get(key)})"
        for key, value in requested.items()
        if conf.get(key) != value
    )
    if late:
        logger.warning(
            "Spark runs already, and these settings come too late: %s. Stop the active "
            "SparkContext first, or set them where it is started.",
            ", ".join(late),
        )


# Checks before Spark starts


def check_java() -> str:
    """Checks that the Java that Spark would start is 17 or later.

    Returns:
        Where it is, and in further lines what it says of its version.

    Raises:
        ClusterError: it is missing or too old; one line that says what to install.
    """
    home = os.environ.get("JAVA_HOME")
    java = shutil.which(os.path.join(home, "bin", "java") if home else "java")
    where = f"in JAVA_HOME ({home})" if home else "on the PATH"
    remedy = f"Install a JDK or JRE {MIN_JAVA} or later, or set JAVA_HOME to one."
    if java is None:
        raise ClusterError(
            f"Spark needs Java {MIN_JAVA} or later. Received: none {where}. {remedy}"
        )
    result = subprocess.run([java, "-version"], capture_output=True, text=True, check=False)
    said = result.stdout + result.stderr
    version = _java_version(said)
    if version is None:
        raise ClusterError(
            f"Spark needs Java {MIN_JAVA} or later. Received: no version from {java!r}. {remedy}"
        )
    if version < MIN_JAVA:
        raise ClusterError(
            f"Spark needs Java {MIN_JAVA} or later. Received: Java {version} {where}. {remedy}"
        )
    return f"{java}\n{said}"


def _java_version(text: str) -> int | None:
    """The major version in what `java -version` printed; `"1.8.0_412"` is 8."""
    match = re.search(r'version "(?:1\.)?(\d+)', text)
    return int(match[1]) if match else None


def _version(text: str) -> tuple[int, int]:
    """Major and minor version: `"4.1.0.dev1"` is `(4, 1)`."""
    major, minor = re.findall(r"\d+", text)[:2]
    return int(major), int(minor)


def _check_pyspark(version: str) -> None:
    if not MIN_PYSPARK <= _version(version) < END_PYSPARK:
        raise ClusterError(
            f"tfspark works with PySpark 3.5 up to 4.x. Received: PySpark {version}. "
            "Install another one: pip install 'pyspark>=3.5,<5'"
        )


def _refuse_connect(requested: Mapping[str, str]) -> None:
    """Spark Connect has no RDDs, which training data and shards are."""
    is_remote = "SPARK_CONNECT_MODE_ENABLED" in os.environ
    remote = os.environ.get("SPARK_REMOTE") or requested.get("spark.remote")
    if requested.get("spark.api.mode") == "connect" or is_remote or remote:
        raise ClusterError(
            "tfspark trains on RDDs, and a Spark Connect session has none. Received: "
            f"{remote or 'a Spark Connect session'}. Run the script with spark-submit, or start "
            "Spark in this process: unset SPARK_REMOTE, spark.remote and spark.api.mode."
        )
