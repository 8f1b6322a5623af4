"""TorchDistributor with DistributedDataParallel over gloo, for orientation."""

import os
import sys

import protocol
import pyspark.sql
from workloads import CLASSES, LEARNING_RATE


def lenet(nn):
    """As `workloads.py` has it; Keras flattens in another order, which costs the same."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 5, padding="same"),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding="same"),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 7 * 7, 1024),
        nn.ReLU(),
        nn.Linear(1024, CLASSES),
    )


def dense(nn):
    """As `workloads.py` has it."""
    widths = [256] + 4 * [2850]
    layers = []
    for narrow, wide in zip(widths[:-1], widths[1:]):
        layers += [nn.Linear(narrow, wide), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], CLASSES))


MODELS = {"lenet": lenet, "dense": dense}


def train(options):
    """Measures in one worker, and leaves its part of the answer."""
    import itertools

    import numpy as np
    import torch
    from torch import distributed, nn
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    torch.manual_seed(0)
    rank = distributed.get_rank()
    model = DistributedDataParallel(MODELS[options.workload](nn))
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    loss = nn.CrossEntropyLoss()
    features, labels = protocol.cut_batches(
        protocol.workload_of(options), options.batch // options.workers, rank
    )
    images = np.moveaxis(features[0], -1, 2) if features[0].ndim > 3 else features[0]
    pairs = zip(torch.from_numpy(images.copy()), torch.from_numpy(labels).long())
    data = itertools.cycle(list(pairs))

    def take(steps):
        for _ in range(steps):
            batch, wanted = next(data)
            optimizer.zero_grad()
            loss(model(batch), wanted).backward()
            optimizer.step()

    def agree(seconds):
        value = torch.tensor(seconds)
        distributed.all_reduce(value)
        return float(value) / options.workers

    measured = protocol.measure(options, lambda steps: protocol.timed(lambda: take(steps)), agree)
    weights = [weight.detach().numpy() for weight in model.parameters()]
    protocol.leave(options, rank, measured, weights, {"torch": torch.__version__})
    distributed.destroy_process_group()


def main():
    """Measures and answers."""
    from pyspark.ml.torch.distributor import TorchDistributor

    options = protocol.options_of(__doc__)
    os.environ["PYSPARK_PYTHON"] = sys.executable
    builder = pyspark.sql.SparkSession.builder.master(f"local[{options.workers}]")
    builder.config("spark.ui.enabled", "false").getOrCreate()
    TorchDistributor(options.workers, local_mode=False, use_gpu=False).run(train, options)
    protocol.answer_of_workers(options)


if __name__ == "__main__":
    main()
