"""What is secret stays so, what is private is, and all of it is gone when an application ends."""

import glob
import os
import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

ROOT = Path(__file__).parent.parent.parent
SUPPORT = ROOT / "tests/support"
TOKEN = "6d" * 32

SOURCE = """
    import json, logging, os, stat, sys
    import pyspark
    import tfspark.sync.meeting as meeting
    from spark_app import *

    logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)
    meeting.secrets.token_hex = lambda size: {token!r}
    events, work = {events!r}, {work!r}
    settings = dict(
        eventLog__enabled=True, eventLog__compress=False, eventLog__dir=events,
        local__dir=work, log__level="DEBUG",
        authenticate=True, authenticate__secret="of Spark", network__crypto__enabled=True,
    )
    with application("local-cluster[2,1,1024]", **settings) as sc:
        model, training = optimizer(sc, "dense", engine="gang", model_dir={work!r} + "/model")
        training.optimize(MaxIteration(20))
        identity = training._training.loop.engine._place.identity
        found = [os.path.join(root, name) for root, _, names in os.walk(work) for name in names]
        modes = {{
            path: stat.S_IMODE(os.stat(path).st_mode)
            for path in found if "/tfspark/" in path or "/model/" in path
        }}
        training.close()
        alone = train(sc, 20, name="dense", engine="local")
        # Where a local-cluster keeps what its executors log.
        logs = os.path.join(os.path.dirname(pyspark.__file__), "work", sc.applicationId)
        result = dict(
            digest=digest(model), key=identity.key, alone=alone, modes=modes, logs=logs
        )
    print(json.dumps(result))
"""


def test_secrets_are_in_no_log_and_files_are_private(application, tmp_path):
    events, work = tmp_path / "events", tmp_path / "work"
    events.mkdir()
    work.mkdir()
    result = application(SOURCE.format(token=TOKEN, events=str(events), work=str(work)))
    assert result["digest"] == result["alone"]
    key = result["key"].splitlines()[1].encode()
    looked_at, written = [], 0
    for folder in (events, result["logs"]):
        for path in glob.glob(f"{folder}/**", recursive=True):
            if os.path.isfile(path):
                with open(path, "rb") as file:
                    content = file.read()
                assert TOKEN.encode() not in content and key not in content, path
                looked_at.append(os.path.basename(path))
                written += len(content)
    assert looked_at.count("stderr") == 2 and any(n.startswith("events") for n in looked_at)
    assert written > 100_000  # debug logs, and no compressed events
    assert result["modes"]
    for path, mode in result["modes"].items():
        assert not mode & (stat.S_IRWXG | stat.S_IRWXO), (path, oct(mode))


KILLED = """
    import os, sys
    from spark_app import *

    with application("local[2]", local__dir=sys.argv[1]) as sc:
        model, training = optimizer(sc, "dense", engine=sys.argv[2])
        training.optimize(MaxIteration(20))
        print("running", driver_jvm(), flush=True)
        training.optimize(MaxIteration(10**9))
"""


@pytest.mark.parametrize(
    "engine, how", [("gang", signal.SIGKILL), ("shuffle", signal.SIGTERM)], ids=["gang", "shuffle"]
)
def test_a_killed_driver_leaves_no_file_and_no_process(tmp_path, engine, how):
    work = tmp_path / "work"
    work.mkdir()
    driver = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(work), engine],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (SUPPORT, ROOT)))},
    )
    try:
        line = next(line for line in driver.stdout if line.startswith("running"))
    finally:
        os.kill(driver.pid, how)
        driver.wait(30)
        driver.stdout.close()
    jvm = int(line.split()[1])
    deadline = time.monotonic() + 30
    while os.path.exists(f"/proc/{jvm}") or list(work.iterdir()):
        assert time.monotonic() < deadline, [str(path) for path in work.rglob("*")]
        time.sleep(0.2)
