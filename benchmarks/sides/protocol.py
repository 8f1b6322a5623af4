"""How every side of the comparison is asked, measures and answers.

A side is a script that trains one workload in a whole process of its own and ends with one line of
JSON. This module needs NumPy and Python 3.7, so that the interpreter of every peer can import it.

    python plain_loop.py --workload lenet --batch 128

Workers of peers may live in processes that the peer's own launcher starts. Each leaves a file in
`options.scratch`; the script that started them reads all of these and answers for them.
"""

import argparse
import glob
import hashlib
import json
import os
import platform
import sys
import tempfile
import time

import numpy as np

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir))

from workloads import WORKLOADS

# The arrays that one worker holds are no larger; speed does not depend on how many rows there are.
MOST_BATCHES, MOST_BYTES = 16, 256 * 2**20
# Steps before a block can be timed, and the seconds after which a machine counts as warm.
WARM_STEPS = 3


def options_of(description, argv=None):
    """What is to be measured.

    Attributes of the result: workload (`workloads.Workload`), batch (rows of a global batch),
    workers (processes of one thread; threads of one process for plain TensorFlow), seconds (length
    of a block), blocks, started (seconds since 1970 when the process was started), scratch (a
    folder that all workers of this run share).
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--workload", choices=sorted(WORKLOADS), default="lenet")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--started", type=float, default=time.time())
    parser.add_argument("--scratch", default=None)
    options = parser.parse_args(argv)
    options.scratch = options.scratch or tempfile.mkdtemp()
    return options


def workload_of(options):
    """The `workloads.Workload`; options hold its name, because a worker may unpickle them."""
    return WORKLOADS[options.workload]


def cut_batches(workload, batch, seed=0):
    """Rows that are cut into batches already: `([feature, …], labels)`, each `[batches, batch, …]`.

    Cutting costs nothing while training then, which favours whoever reads these.
    """
    features, _ = workload.rows(1)
    row_bytes = sum(feature.nbytes for feature in features)
    count = max(2, min(MOST_BATCHES, MOST_BYTES // (row_bytes * batch)))
    features, labels = workload.rows(count * batch, seed)
    shape = (count, batch)
    return [f.reshape(shape + f.shape[1:]) for f in features], labels.reshape(shape)


def measure(options, run, agree=None, watch=None, fill=None):
    """Takes the first step, warms up, then times blocks.

    Args:
        run: `run(steps)` takes so many steps and returns the seconds that they took.
        agree: where several workers call this, turns the seconds of each into one figure for all,
            so that all take as many steps. A step must be synchronous anyway.
        fill: `fill(options, run, agree)` finds how many steps make a block; default:
            `steps_of_a_block`.
        watch: `watch(steps)` is called after the blocks with the steps that were timed.

    Returns:
        A dict for `answer`: seconds_to_first_step, block_rows_per_second, rows_per_second (their
        median), steps (timed ones), loopback_bytes_per_step (what went over this machine's
        loopback device meanwhile, whoever sent it; None where that cannot be read).
    """
    agree = agree or (lambda seconds: seconds)
    run(1)
    first = time.time() - options.started
    run(WARM_STEPS)
    count = (fill or steps_of_a_block)(options, run, agree)
    before = loopback_bytes()
    rates = [options.batch * count / run(count) for _ in range(options.blocks)]
    after = loopback_bytes()
    steps = count * options.blocks
    found = {
        "seconds_to_first_step": first,
        "rows_per_second": float(np.median(rates)),
        "block_rows_per_second": rates,
        "steps": steps,
        "loopback_bytes_per_step": None if before is None else (after - before) / steps,
    }
    if watch is not None:
        found.update(watch(steps))
    return found


def steps_of_a_block(options, run, agree):
    """How many steps take `options.seconds`, tried out."""
    count = WARM_STEPS
    while True:
        took = agree(run(count))
        if took >= options.seconds / 4:
            return max(2, round(options.seconds * count / took))
        count *= 2


def timed(act):
    """Seconds of a call."""
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def loopback_bytes():
    """Bytes sent over the loopback device so far; None on other systems than Linux."""
    try:
        with open("/proc/net/dev") as lines:
            for line in lines:
                name, _, counters = line.partition(":")
                if name.strip() == "lo":
                    return int(counters.split()[8])
    except OSError:
        pass
    return None


def fingerprint(weights):
    """What tells whether two workers hold the same weights: a digest, and norms of all tensors."""
    arrays = [np.ascontiguousarray(weight, dtype=np.float32) for weight in weights]
    digest = hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()
    return {"digest": digest, "norms": [float(np.linalg.norm(array)) for array in arrays]}


def equality(fingerprints):
    """`"bits"`, `"close"` or `"no"`, from the fingerprints of all workers."""
    if len({found["digest"] for found in fingerprints}) == 1:
        return "bits"
    norms = [found["norms"] for found in fingerprints]
    return "close" if all(np.allclose(norms[0], other, rtol=1e-5) for other in norms) else "no"


def leave(options, rank, measured, weights, versions):
    """A worker's part of the answer, for `answer_of_workers`."""
    left = {
        "measured": measured,
        "fingerprint": fingerprint(weights),
        "versions": versions,
        "pid": os.getpid(),
    }
    path = os.path.join(options.scratch, f"worker-{rank}.json")
    with open(path + ".part", "w") as file:
        json.dump(left, file)
    os.rename(path + ".part", path)


def answer_of_workers(options, **more):
    """Answers with rank 0's figures, if all workers have left theirs."""
    left = []
    for path in sorted(glob.glob(os.path.join(options.scratch, "worker-*.json"))):
        with open(path) as file:
            left.append(json.load(file))
    if len(left) != options.workers:
        raise SystemExit(f"{len(left)} of {options.workers} workers have measured.")
    answer(
        left[0]["measured"],
        equality([found["fingerprint"] for found in left]),
        left[0]["versions"],
        **more,
    )


def answer(measured, equal_weights, versions, **more):
    """Prints the answer, the last line of a side.

    Args:
        measured: from `measure`.
        equal_weights: see `equality`; `"one copy"` where only one copy exists, which workers
            average into or own slices of; `"one process"` without workers.
        versions: of the packages that matter.
        more: what only some sides know.
    """
    sys.stdout.flush()
    found = dict(measured, equal_weights=equal_weights, **more)
    found["versions"] = dict(versions, python=platform.python_version())
    print("\n" + json.dumps(found), flush=True)
