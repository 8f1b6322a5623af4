"""`tf.distribute.MultiWorkerMirroredStrategy`: one process for each worker, without Spark."""

import json
import os
import socket
import subprocess
import sys

import protocol


def free_addresses(count):
    """Addresses of this machine that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    addresses = [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]
    for one in sockets:
        one.close()
    return addresses


options = protocol.options_of(__doc__)
if "TF_CONFIG" in os.environ:
    import mirrored

    mirrored.train(options)
else:
    cluster = {"worker": free_addresses(options.workers)}
    workers = []
    for rank in range(options.workers):
        config = {"cluster": cluster, "task": {"type": "worker", "index": rank}}
        environment = dict(os.environ, TF_CONFIG=json.dumps(config))
        command = [sys.executable, *sys.argv, "--scratch", options.scratch]
        workers.append(subprocess.Popen(command, env=environment))
    if any([worker.wait() for worker in workers]):
        sys.exit("A worker failed.")
    protocol.answer_of_workers(options)
