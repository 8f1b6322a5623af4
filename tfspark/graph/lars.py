"""LARS: momentum whose rate is fitted to every tensor, for large batches."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf
from keras import ops

from tfspark.errors import require


@keras.saving.register_keras_serializable("tfspark")
class LARS(keras.optimizers.Optimizer):
    """Layer-wise adaptive rate scaling: SGD with momentum for very large batches.

    The step of every tensor `w` with gradient `g` is made proportional to the norm of `w`, so that
    no layer is torn apart at a high rate while another one hardly moves:

    ```
    ratio    = trust_coefficient * |w| / (|g| + weight_decay * |w| + epsilon)
    velocity = momentum * velocity + learning_rate * ratio * (g + weight_decay * w)
    w        = w - velocity
    ```

    `|x|` is the L2 norm of the whole tensor. `ratio` is 1 where `|w|` or `|g|` is 0, and for
    tensors that are not adapted. With `nesterov` the weights move by `momentum * velocity +
    learning_rate * ratio * (g + weight_decay * w)` instead, `velocity` being the new one.

    Tensors of fewer than two dimensions (biases, scales and offsets of normalisation) are not
    adapted, as customary: their norms say little. They train at `learning_rate` itself. Where that
    is too high for them, adapt them as well, or make the ratio larger and the rate smaller.

    It is a Keras optimizer like any other, here and in plain Keras. On shards the norms are sums
    over all ranks, so that the step is that of whole tensors.

    Args:
        learning_rate: a float, a schedule, or a function without arguments. As the ratio is of the
            order of `trust_coefficient`, rates are much higher than those of SGD: 1 to 30.
        momentum: from 0 up to, not including, 1.
        nesterov: see above; needs a momentum.
        weight_decay: factor of `w` in the direction (an L2 penalty, inside the ratio), not of
            Keras's decoupled kind; None: 0. `exclude_from_weight_decay` works as in Keras.
        trust_coefficient: how far a step may go in proportion to the norm of the weights; also
            known as eeta. None: no tensor is adapted.
        epsilon: added to the denominator of the ratio.
        adapt_vectors: whether tensors of fewer than two dimensions are adapted as well.
        **kwargs: those of every Keras optimizer: `clipnorm`, `clipvalue`, `global_clipnorm`,
            `use_ema`, `gradient_accumulation_steps`, `name` …. Gradients are clipped first.

    Raises:
        InvalidInputError: an argument is out of its range.

    Source: You, Gitman, Ginsburg: Large Batch Training of Convolutional Networks,
    arXiv:1708.03888, algorithm 1.

    Example:
        >>> optimizer = LARS(1.0, momentum=0.0, trust_coefficient=0.1)
        >>> weights = keras.Variable([[3.0, 4.0]])
        >>> optimizer.apply([tf.constant([[0.0, 2.0]])], [weights])  # ratio: 0.1 * 5 / 2
        >>> weights.numpy()
        array([[3. , 3.5]], dtype=float32)
    """

    def __init__(
        self,
        learning_rate: Any = 1.0,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float | None = None,
        trust_coefficient: float | None = 0.001,
        epsilon: float = 0.0,
        adapt_vectors: bool = False,
        **kwargs: Any,
    ):
        super().__init__(learning_rate=learning_rate, weight_decay=weight_decay, **kwargs)
        require(0 <= momentum < 1, "momentum is at least 0 and below 1", momentum=momentum)
        require(not nesterov or momentum > 0, "nesterov needs a momentum", momentum=momentum)
        require((weight_decay or 0) >= 0, "weight_decay is at least 0", weight_decay=weight_decay)
        require(
            trust_coefficient is None or trust_coefficient > 0,
            "trust_coefficient is above 0, or None",
            trust_coefficient=trust_coefficient,
        )
        require(epsilon >= 0, "epsilon is at least 0", epsilon=epsilon)
        self.momentum = momentum
        self.nesterov = nesterov
        self.trust_coefficient = trust_coefficient
        self.epsilon = epsilon
        self.adapt_vectors = adapt_vectors

    def adapts(self, variable: Any) -> bool:
        """Whether the rate is fitted to this tensor's norms."""
        is_eligible = self.adapt_vectors or len(variable.shape) > 1
        return self.trust_coefficient is not None and is_eligible

    def build(self, variables: Any) -> None:
        """Makes the velocities, where there is a momentum."""
        if self.built:
            return
        super().build(variables)
        self._velocities = (
            self.add_optimizer_variables(variables, "velocity") if self.momentum else None
        )

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """See the class."""
        if isinstance(gradient, tf.IndexedSlices):
            # Of an embedding: a row that occurs twice has the sum of two gradients, and one norm.
            gradient = tf.convert_to_tensor(gradient)
        gradient = ops.cast(gradient, variable.dtype)
        rate = ops.cast(learning_rate, variable.dtype)
        decay = (self.weight_decay or 0.0) if self._use_weight_decay(variable) else 0.0
        if self.adapts(variable):
            rate = rate * self._trust_ratio(gradient, variable, decay)
        step = rate * (gradient + decay * variable)
        if self._velocities is not None:
            velocity = self._velocities[self._get_variable_index(variable)]
            self.assign(velocity, self.momentum * velocity + step)
            step = self.momentum * velocity + step if self.nesterov else velocity
        self.assign_sub(variable, step)

    def _trust_ratio(self, gradient: Any, variable: Any, decay: float) -> Any:
        weight_norm, gradient_norm = _norm(variable), _norm(gradient)
        denominator = gradient_norm + decay * weight_norm + self.epsilon
        is_defined = ops.logical_and(weight_norm > 0, gradient_norm > 0)
        return ops.where(is_defined, self.trust_coefficient * weight_norm / denominator, 1.0)

    def _apply_weight_decay(self, variables: Any) -> None:
        """Nothing: Keras would subtract from the weights what belongs into the direction."""

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        return {
            **super().get_config(),
            "momentum": self.momentum,
            "nesterov": self.nesterov,
            "trust_coefficient": self.trust_coefficient,
            "epsilon": self.epsilon,
            "adapt_vectors": self.adapt_vectors,
        }


def _norm(tensor: Any) -> Any:
    return ops.sqrt(ops.sum(ops.square(tensor)))
