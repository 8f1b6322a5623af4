"""LeNet on real digits, trained where the RDD is.

The well-known TFPark script with its imports and its data source changed: a TensorFlow graph over
the tensors of a `TFDataset`, a scalar loss, `TFOptimizer.from_loss`. Runs as it is on a laptop and
under spark-submit:

    python examples/lenet.py --epochs 8 --out out/lenet
"""

import argparse
from pathlib import Path

import numpy as np
import tensorflow.compat.v1 as tf
import tf_slim as slim
from digits import load_digits_28x28

from tfspark import (
    Adam,
    EveryEpoch,
    MaxEpoch,
    TFDataset,
    TFOptimizer,
    TrainSummary,
    ValidationSummary,
    init_nncontext,
)

MEAN, STD = 0.1307, 0.3081


def lenet(images, num_classes=10, is_training=True):
    """LeNet-5 as in the TensorFlow-Slim model library, 3.3 million weights."""
    with slim.arg_scope([slim.conv2d, slim.fully_connected], activation_fn=tf.nn.relu):
        net = slim.conv2d(images, 32, [5, 5], scope="conv1")
        net = slim.max_pool2d(net, [2, 2], 2, scope="pool1")
        net = slim.conv2d(net, 64, [5, 5], scope="conv2")
        net = slim.max_pool2d(net, [2, 2], 2, scope="pool2")
        net = slim.flatten(net)
        net = slim.fully_connected(net, 1024, scope="fc3")
        net = slim.dropout(net, 0.5, is_training=is_training, scope="dropout3")
        return slim.fully_connected(net, num_classes, activation_fn=None, scope="fc4")


def digits_rdd(sc, images, labels):
    """An RDD of (normalised image [28, 28, 1], label [])."""
    return sc.parallelize(list(zip(images, labels, strict=True))).map(
        lambda row: ((row[0] - MEAN) / STD, row[1])
    )


def main():
    """Trains, prints the test accuracy, and leaves a log, a model and a loss curve."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("out/lenet"))
    options = parser.parse_args()

    sc = init_nncontext("lenet")
    tf.disable_eager_execution()
    (train_images, train_labels), (test_images, test_labels) = load_digits_28x28()

    dataset = TFDataset.from_rdd(
        digits_rdd(sc, train_images, train_labels),
        names=["features", "labels"],
        shapes=[[28, 28, 1], []],
        types=[tf.float32, tf.int32],
        batch_size=options.batch_size,
        val_rdd=digits_rdd(sc, test_images, test_labels),
    )
    images, labels = dataset.tensors

    is_training = tf.placeholder_with_default(False, [], "is_training")
    logits = lenet(images, is_training=is_training)
    loss = tf.reduce_mean(tf.losses.sparse_softmax_cross_entropy(logits=logits, labels=labels))

    optimizer = TFOptimizer.from_loss(
        loss,
        Adam(1e-3),
        val_outputs=[logits],
        val_labels=[labels],
        val_method="accuracy",
        tensor_with_value={is_training: (True, False)},
    )
    optimizer.set_train_summary(TrainSummary(str(options.out / "logs"), "lenet"))
    optimizer.set_val_summary(ValidationSummary(str(options.out / "logs"), "lenet"))
    optimizer.optimize(end_trigger=MaxEpoch(options.epochs), checkpoint_trigger=EveryEpoch())

    # The session holds the trained weights now: everything TensorFlow can do with one, it can do.
    predictions = optimizer.sess.run(logits, {images: (test_images - MEAN) / STD})
    accuracy = np.mean(predictions.argmax(axis=1) == test_labels)
    print(f"Test accuracy: {accuracy:.2%} of {len(test_labels)} digits")

    tf.train.Saver().save(optimizer.sess, str(options.out / "checkpoint" / "lenet"))
    save_model(optimizer.sess, images, logits, options.out / "model")
    plot_loss(optimizer, options.out / "loss.png")
    print(f"TensorBoard log, checkpoint, saved model and loss curve: {options.out}")


def save_model(session, images, logits, folder):
    """Writes a SavedModel next to the former ones."""
    version = 1 + max((int(path.name) for path in folder.glob("*")), default=0)
    tf.saved_model.simple_save(
        session, str(folder / str(version)), {"images": images}, {"logits": logits}
    )


def plot_loss(optimizer, path):
    """Draws the loss of every step and the validation accuracy of every epoch."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    losses = optimizer.train_summary.read_scalar("Loss")  # [values, (step, value, time)]
    scores = optimizer.val_summary.read_scalar("accuracy")
    # The folder keeps the curves of former runs; this one's are the last.
    losses = losses[-optimizer.step :]
    scores = scores[scores[:, 2] >= losses[0, 2]]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(losses[:, 0], losses[:, 1], color="tab:blue", linewidth=1)
    axes.set(xlabel="step", ylabel="training loss", yscale="log", title="LeNet on digits")
    axes.yaxis.label.set_color("tab:blue")
    right = axes.twinx()
    right.plot(scores[:, 0], scores[:, 1], color="tab:orange", marker="o")
    right.set(ylabel="validation accuracy")
    right.yaxis.label.set_color("tab:orange")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
