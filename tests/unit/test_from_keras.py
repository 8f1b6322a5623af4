"""Programs from Keras models against plain Keras' own `train_on_batch`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from programs import joined

from tfspark.data.spec import Field, RowSpec
from tfspark.errors import ProgramError
from tfspark.graph.from_keras import program_from_keras
from tfspark.graphdef.loader import load

RATE = 0.1
ROWS = 7


class Scale(keras.layers.Layer):
    """A custom layer, with a counter of its calls as its state."""

    def build(self, shape: Any) -> None:
        self.factor = self.add_weight(shape=(shape[-1],), initializer="ones", name="factor")
        self.calls = self.add_weight(
            shape=(), dtype="int32", initializer="zeros", trainable=False, name="calls"
        )

    def call(self, x: Any) -> Any:
        self.calls.assign_add(1)
        self.add_loss(0.01 * keras.ops.mean(x))
        return x * self.factor


class TwoLayers(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.first = keras.layers.Dense(4, activation="relu")
        self.second = keras.layers.Dense(3)

    def call(self, x: Any, training: bool = False) -> Any:
        return self.second(self.first(x))


class OwnLoss(TwoLayers):
    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        return keras.ops.mean(keras.ops.abs(y - y_pred)) + 0.1 * keras.ops.mean(y_pred**2)


def dense() -> tuple[Any, Any]:
    layers = keras.layers
    model = keras.Sequential([layers.Dense(5, activation="tanh"), layers.Dense(3)])
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model, ({"x": (4,)}, {"y": ((), "int32", 3)})


def labels_of_one() -> tuple[Any, Any]:
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile(loss="mse")
    return model, ({"x": (4,)}, {"y": ()})


def convolution() -> tuple[Any, Any]:
    layers = keras.layers
    model = keras.Sequential(
        [
            layers.Input((6, 6, 2)),
            layers.Conv2D(3, 3, name="_stem"),  # no name that a graph takes as it is
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Flatten(),
            layers.Dense(3, activation="softmax"),
        ]
    )
    model.compile(loss="sparse_categorical_crossentropy")
    return model, ({"x": (6, 6, 2)}, {"y": ((1,), "int64", 3)})


def lstm() -> tuple[Any, Any]:
    model = keras.Sequential(
        [keras.layers.Input((5, 2)), keras.layers.LSTM(3), keras.layers.Dense(1)]
    )
    model.compile(loss="mae")
    return model, ({"x": (5, 2)}, {"y": (1,)})


def embedding() -> tuple[Any, Any]:
    layers = keras.layers
    model = keras.Sequential(
        [layers.Embedding(11, 3), layers.GlobalAveragePooling1D(), layers.Dense(1)]
    )
    model.compile(loss=keras.losses.BinaryCrossentropy(from_logits=True))
    return model, ({"x": ((4,), "int32", 11)}, {"y": ((1,), "float32", 2)})


def two_and_two() -> tuple[Any, Any]:
    layers = keras.layers
    a, b = layers.Input((3,), name="a"), layers.Input((2,), name="b")
    both = layers.Concatenate()([a, b])
    out = {"p": layers.Dense(1, name="p")(both), "q": layers.Dense(2, name="q")(both)}
    model = keras.Model({"a": a, "b": b}, out)
    model.compile(loss={"p": "mse", "q": "mae"}, loss_weights={"p": 0.3, "q": 2.0})
    return model, ({"a": (3,), "b": (2,)}, {"p": (1,), "q": (2,)})


def list_outputs() -> tuple[Any, Any]:
    layers = keras.layers
    a, b = layers.Input((3,)), layers.Input((2,))
    both = layers.Concatenate()([a, b])
    model = keras.Model([a, b], [layers.Dense(1)(both), layers.Dense(2)(both)])
    model.compile(loss=["mse", "mae"])
    return model, ([("a", (3,)), ("b", (2,))], [("p", (1,)), ("q", (2,))])


def custom() -> tuple[Any, Any]:
    layers = keras.layers
    model = keras.Sequential(
        [Scale(), layers.Dense(2), layers.Lambda(lambda x: keras.ops.sin(x) * 2)]
    )
    model.compile(loss="mse")
    return model, ({"x": (4,)}, {"y": (2,)})


def dropout() -> tuple[Any, Any]:
    layers = keras.layers
    model = keras.Sequential([layers.Dense(8), layers.Dropout(0.5, seed=3), layers.Dense(1)])
    model.compile(loss="mse")
    return model, ({"x": (4,)}, {"y": (1,)})


def regularized() -> tuple[Any, Any]:
    layers = keras.layers
    model = keras.Sequential(
        [
            layers.Dense(4, kernel_regularizer=keras.regularizers.L2(0.1)),
            layers.Dense(2, activity_regularizer=keras.regularizers.L1(0.05)),
        ]
    )
    model.compile(loss="mse")
    return model, ({"x": (4,)}, {"y": (2,)})


def weighted() -> tuple[Any, Any]:
    model, (x, y) = dense()
    return model, (x, y, {"w": ()})


def frozen() -> tuple[Any, Any]:
    layers = keras.layers
    model = keras.Sequential(
        [layers.Dense(4), layers.BatchNormalization(), layers.Dense(2), layers.Dense(1)]
    )
    model.build((None, 4))
    model.layers[0].trainable = model.layers[1].trainable = False
    model.compile(loss="mse")
    return model, ({"x": (4,)}, {"y": (1,)})


def summed() -> tuple[Any, Any]:
    model, rows = regularized()
    model.compile(loss=keras.losses.MeanSquaredError(reduction="sum"))
    return model, rows


def subclassed() -> tuple[Any, Any]:
    model = TwoLayers()
    model.compile(loss="mse")
    return model, ({"x": (4,)}, {"y": (3,)})


def own_loss() -> tuple[Any, Any]:
    model = OwnLoss()
    model.compile(loss="mse")
    return model, ({"x": (4,)}, {"y": (3,)})


def double() -> tuple[Any, Any]:
    model = keras.Sequential([keras.layers.Dense(2, dtype="float64")])
    model.compile(loss=keras.losses.MeanSquaredError(dtype="float64"))
    return model, ({"x": ((3,), "float64", None)}, {"y": ((2,), "float64", None)})


def half() -> tuple[Any, Any]:
    policy = "mixed_bfloat16"
    model = keras.Sequential(
        [keras.layers.Dense(4, dtype=policy), keras.layers.Dense(1, dtype="float32")]
    )
    model.compile(loss="mse")
    return model, ({"x": (4,)}, {"y": (1,)})


MODELS = [
    dense, labels_of_one, convolution, lstm, embedding, two_and_two, list_outputs, custom, dropout,
    regularized, weighted, frozen, summed, subclassed, own_loss, double, half,
]  # fmt: skip


def spec_and_batches(parts: Any, steps: int) -> tuple[RowSpec, list[list[np.ndarray]]]:
    """A row spec of named shapes, and random batches for it, flat."""

    def field(name: str, value: Any) -> Field:
        shape, dtype, _ = value if len(value) == 3 and isinstance(value[1], str) else (value, "", 0)
        return Field(name, dtype or "float32", tuple(shape))

    def structure(part: Any) -> Any:
        if isinstance(part, list):
            return [field(name, value) for name, value in part]
        if len(part) == 1:
            return field(*next(iter(part.items())))
        return {name: field(name, value) for name, value in part.items()}

    spec = RowSpec.of(tuple(structure(part) for part in parts))
    limits = {}
    for part in parts:
        for name, value in part if isinstance(part, list) else part.items():
            if len(value) == 3 and isinstance(value[1], str):
                limits[name] = value[2]
    rng = np.random.default_rng(5)

    def batch(f: Field) -> np.ndarray:
        if limits.get(f.name):
            return rng.integers(0, limits[f.name], (ROWS, *f.shape)).astype(f.dtype)
        return rng.uniform(0.1, 1, (ROWS, *f.shape)).astype(f.dtype)

    return spec, [[batch(f) for f in spec.fields] for _ in range(steps)]


def run(
    bound: Any, batches: list[list[np.ndarray]], parts: int = 1
) -> tuple[list[float], np.ndarray, list[np.ndarray]]:
    """SGD by hand in NumPy on a program, the rows of each batch dealt to `parts` ranks."""
    call = load(bound.program.graph)
    flat, state, losses = bound.flat, list(bound.state), []
    for step, batch in enumerate(batches):
        loss, gradient, news = 0.0, np.zeros_like(flat), []
        for low, high in zip(
            np.linspace(0, ROWS, parts + 1).astype(int)[:-1],
            np.linspace(0, ROWS, parts + 1).astype(int)[1:],
            strict=True,
        ):
            outputs = call(
                flat, *state, *(x[low:high] for x in batch),
                np.int64(high - low), np.int64(ROWS), np.array([3, step]),
            )  # fmt: skip
            part_loss, part, *new_state = joined(bound.program, outputs)
            loss += float(part_loss)
            gradient = gradient + part
            news.append(new_state)
        flat = (flat - RATE * gradient / ROWS).astype(flat.dtype)
        state = news[0]
        losses.append(loss / ROWS)
    return losses, flat, state


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_same_weights_as_plain_keras(make: Callable[[], tuple[Any, Any]]) -> None:
    keras.utils.set_random_seed(1)
    model, parts = make()
    spec, batches = spec_and_batches(parts, 3)
    bound = program_from_keras(model, spec)
    before = [variable.numpy().copy() for variable in model.variables]
    losses, flat, state = run(bound, batches)

    model.optimizer = keras.optimizers.SGD(RATE)
    model.optimizer.build(model.trainable_variables)
    expected = [
        model.train_on_batch(*spec.unflatten(batch), return_dict=True)["loss"] for batch in batches
    ]
    after = [variable.numpy().copy() for variable in model.variables]
    assert any(not np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    tolerance = 2e-2 if make is half else 1e-5
    np.testing.assert_allclose(losses, expected, rtol=tolerance, atol=tolerance)
    for variable, value in zip(model.variables, before, strict=True):
        variable.assign(value)
    bound.assign(flat, state)
    for variable, value in zip(model.variables, after, strict=True):
        np.testing.assert_allclose(
            variable.numpy(), value, rtol=tolerance, atol=tolerance, err_msg=variable.path
        )


@pytest.mark.parametrize(
    "make",
    [dense, labels_of_one, lstm, two_and_two, regularized, weighted, frozen, summed, custom],
    ids=lambda make: make.__name__,
)
def test_three_ranks_equal_one(make: Callable[[], tuple[Any, Any]]) -> None:
    keras.utils.set_random_seed(1)
    model, parts = make()
    spec, batches = spec_and_batches(parts, 2)
    bound = program_from_keras(model, spec)
    losses, flat, _ = run(bound, batches)
    other_losses, other_flat, _ = run(bound, batches, parts=3)
    np.testing.assert_allclose(other_losses, losses, rtol=1e-5)
    np.testing.assert_allclose(other_flat, flat, rtol=1e-5, atol=1e-6)


def one_layer(layer: Any, loss: Any = "mse") -> Any:
    model = keras.Sequential([layer])
    model.compile(loss=loss)
    return model


class OwnStep(keras.Sequential):
    def train_step(self, data: Any) -> Any:
        return {}


def masked() -> Any:
    layers = keras.layers
    model = keras.Sequential([layers.Masking(), layers.LSTM(1, return_sequences=True)])
    model.compile(loss="mse")
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: "model", "Keras model is expected. Received: builtins.str"),
        (lambda: OwnStep([keras.layers.Dense(1)]), "Received: OwnStep. Override compute_loss"),
        (lambda: keras.Sequential([keras.layers.Dense(1)]), "needs a loss to train"),
        (lambda: one_layer(keras.layers.Dense(1, trainable=False)), "depend on a trainable"),
        (lambda: one_layer(keras.layers.Dense(1, dtype="float16")), r"kernel \(float16\)"),
        (
            lambda: one_layer(keras.layers.Dense(1), keras.losses.MeanSquaredError(reduction=None)),
            "with reduction=None",
        ),
        (masked, "carries a mask"),
    ],
)
def test_refuses(make: Any, message: str) -> None:
    spec = RowSpec.of((Field("x", "float32", (5, 2)), Field("y", "float32", (5, 1))))
    with pytest.raises(ProgramError, match=message):
        program_from_keras(make(), spec)


def test_names_and_kinds_of_the_state() -> None:
    layers = keras.layers
    model = keras.Sequential(
        [
            layers.Input((4,)),
            layers.Dense(3, trainable=False, name="still"),
            layers.BatchNormalization(name="norm"),
            layers.Dropout(0.5, name="drop"),
            Scale(name="scale"),
            layers.Dense(1, name="last"),
        ],
        name="model",
    )
    spec = RowSpec.of((Field("x", "float32", (4,)), Field("y", "float32", (1,))))
    bound = program_from_keras(
        model, spec, loss="mse", group_of=lambda path: int(not path.startswith("model/last"))
    )
    kinds = {slot.name.split("/", 1)[-1]: slot.kind for slot in bound.program.state}
    assert kinds == {
        "still/kernel": "constant",
        "still/bias": "constant",
        "norm/moving_mean": "mean",
        "norm/moving_variance": "mean",
        "seed_generator_state": "seed",
        "scale/calls": "first",
    }
    assert [(weight.name, weight.group) for weight in bound.program.weights] == [
        ("model/last/kernel", 0), ("model/last/bias", 0), ("model/norm/gamma", 1),
        ("model/norm/beta", 1), ("model/scale/factor", 1),
    ]  # fmt: skip
    assert not model.compiled
    assert model._compile_loss is None
