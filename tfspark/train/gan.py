"""`GANEstimator`: a generator and a discriminator that take steps by turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from tfspark.data.dataset import TFDataset
from tfspark.data.spec import RowSpec
from tfspark.errors import InvalidInputError
from tfspark.graph.assembly import BoundProgram
from tfspark.graph.eager import name_of
from tfspark.graph.from_function import program_from_function
from tfspark.graph.from_keras import view_of
from tfspark.graph.prediction import prediction_from_keras
from tfspark.inference.predictor import predict
from tfspark.train.frontends import check_dataset
from tfspark.train.optimizer import TFOptimizer
from tfspark.train.recipe import Settings
from tfspark.train.triggers import Trigger

_GENERATOR, _DISCRIMINATOR = "generator/", "discriminator/"


class GANEstimator:
    """Trains two Keras models against each other: some steps of one, then some of the other.

    In a step of the discriminator the loss is `discriminator_loss_fn(real, fake)`, in one of the
    generator `generator_loss_fn(fake)`, where `real` and `fake` are what the discriminator returns
    for a batch of rows and for a batch that the generator makes. The other model rests: its weights
    and its optimizer's slots stay as they are, to the bit.

    Args:
        generator: from noise to what the rows look like.
        discriminator: from these to a score, usually a logit.
        generator_loss_fn: of the scores of generated rows, to a scalar mean over rows.
        discriminator_loss_fn: of the scores of real and of generated rows, likewise.
        generator_optimizer, discriminator_optimizer: of Keras, or names.
        generator_steps, discriminator_steps: in a row; the discriminator begins.
        model_dir: for checkpoints, from which `train` goes on; see `TFOptimizer`.
        **settings: of `TFOptimizer`, such as `engine` and `num_ranks`.

    Attributes:
        generator, discriminator: as given; after `train` they hold the weights.
        step: finished steps, of both models together.

    Raises:
        InvalidInputError: a count is no number of steps, or a variable of one model has the name of
            one of the other.

    Example:
        >>> generator = keras.Sequential([keras.Input([2]), keras.layers.Dense(3)])
        >>> discriminator = keras.Sequential([keras.Input([3]), keras.layers.Dense(1)])
        >>> gan = GANEstimator(
        ...     generator,
        ...     discriminator,
        ...     lambda fake: -tf.reduce_mean(fake),
        ...     lambda real, fake: tf.reduce_mean(fake) - tf.reduce_mean(real),
        ...     "adam",
        ...     "adam",
        ...     engine="local",
        ...     num_ranks=1,
        ... )
        >>> noise, rows = np.ones([8, 2], np.float32), np.ones([8, 3], np.float32)
        >>> gan.train(TFDataset.from_ndarrays((noise, rows), batch_size=4)).step
        2
    """

    def __init__(
        self,
        generator: Any,
        discriminator: Any,
        generator_loss_fn: Callable[[Any], Any],
        discriminator_loss_fn: Callable[[Any, Any], Any],
        generator_optimizer: Any,
        discriminator_optimizer: Any,
        generator_steps: int = 1,
        discriminator_steps: int = 1,
        model_dir: str | None = None,
        **settings: Any,
    ):
        for model in (generator, discriminator):
            if not isinstance(model, keras.Model):
                raise InvalidInputError(
                    f"Both parts of a GAN are models of Keras 3. Received: {type(model).__name__}."
                )
        for steps in (generator_steps, discriminator_steps):
            if not isinstance(steps, int) or steps < 1:
                raise InvalidInputError(f"Each takes at least one step. Received: {steps!r}.")
        self.generator, self.discriminator = generator, discriminator
        self._losses = generator_loss_fn, discriminator_loss_fn
        self._optimizers = {
            _DISCRIMINATOR: keras.optimizers.get(discriminator_optimizer),
            _GENERATOR: keras.optimizers.get(generator_optimizer),
        }
        self._steps = generator_steps, discriminator_steps
        turns = (_DISCRIMINATOR,) * discriminator_steps + (_GENERATOR,) * generator_steps
        given = {"progress": False, **settings, "model_dir": model_dir, "turns": turns}
        self._settings = Settings.of(**given)
        if self._settings.accumulation_steps > 1 or self._settings.average_every > 1:
            raise InvalidInputError(
                "The models of a GAN take whole steps by turns. Received: accumulation_steps or "
                "average_every above 1. Leave them at 1."
            )
        self.step = 0

    def train(
        self,
        dataset: TFDataset | Callable[[], TFDataset],
        end_trigger: Trigger | None = None,
        checkpoint_trigger: Trigger | None = None,
    ) -> GANEstimator:
        """Trains both models; afterwards they hold the weights.

        Args:
            dataset: rows `(noise, real)` with a batch size, or a function that returns them. Noise
                may as well be drawn in a `map`, anew in every epoch.
            end_trigger: when to stop; default `MaxEpoch(1)`. Steps of both models count.
            checkpoint_trigger: when to write checkpoints into `model_dir`.

        Returns:
            This estimator.

        Raises:
            InvalidInputError: rows that are no pairs.
            TFSparkError: as of `TFOptimizer.optimize`.
        """
        rows = dataset() if callable(dataset) else dataset
        check_dataset(rows)
        if not rows.labelled or len(rows.row_spec.structure()) != 2:
            raise InvalidInputError(
                "A GAN trains on rows (noise, real). "
                f"Received: {', '.join(rows.row_spec.names)} in another structure."
            )
        rows = rows.validated_on(None)
        front_end = _FrontEnd(self, rows.row_spec)
        optimizer = TFOptimizer(front_end, rows, self._optimizers, self._settings)
        try:
            optimizer.optimize(end_trigger, checkpoint_trigger)
            self.step = optimizer.step
        finally:
            optimizer.close()
        return self

    def generate(self, x: Any, batch_size: int = 128, **columns: Any) -> Any:
        """What the generator makes of each row of noise.

        Args:
            x: a `TFDataset`, an RDD, a DataFrame or arrays.
            batch_size: most rows of one call of the model.
            **columns: `feature_cols` and `output_cols` of a DataFrame.
        """
        return predict(prediction_from_keras(self.generator), x, batch_size=batch_size, **columns)

    def loss_of(self, turn: Any, noise: Any, real: Any) -> Any:
        """The loss of the model whose turn it is, for a batch; in the graph that is being built.

        Args:
            turn: int64, finished steps.
            noise, real: of the batch.
        """
        generator_loss, discriminator_loss = self._losses
        generator, discriminator = view_of(self.generator), view_of(self.discriminator)

        def of_discriminator() -> Any:
            fake = tf.stop_gradient(generator.call(noise, training=True))
            real_score = discriminator.call(real, training=True)
            return discriminator_loss(real_score, discriminator.call(fake, training=True))

        def of_generator() -> Any:
            fake = generator.call(noise, training=True)
            return generator_loss(discriminator.call(fake, training=True))

        in_cycle = turn % sum(self._steps)
        return tf.cond(in_cycle < self._steps[1], of_discriminator, of_generator)


class _FrontEnd:
    """A GAN, as `TFOptimizer` needs it.

    Args:
        gan: its models are built, if they are not.
        row_spec: of rows `(noise, real)`.
    """

    def __init__(self, gan: GANEstimator, row_spec: RowSpec):
        self._gan, self._spec = gan, row_spec
        noise, real = row_spec.structure()
        view_of(gan.generator).build(RowSpec.of(noise))
        view_of(gan.discriminator).build(RowSpec.of(real))
        models = {_GENERATOR: gan.generator, _DISCRIMINATOR: gan.discriminator}
        self._variables = {
            name_of(variable): (prefix + name_of(variable), variable)
            for prefix, model in models.items()
            for variable in model.trainable_variables
        }
        if len(self._variables) < sum(len(m.trainable_variables) for m in models.values()):
            raise InvalidInputError(
                "The variables of a GAN have different names. Received: a name that a generator "
                f"and a discriminator have, of {', '.join(self._variables)}. Name their layers."
            )

    def trainable(self) -> tuple[list[str], list[Any]]:
        names, variables = zip(*self._variables.values(), strict=True)
        return list(names), list(variables)

    def program(self, group_of: Callable[[str], int]) -> BoundProgram:
        # Counted in the model state, so that a resume knows whose turn it is.
        turn = tf.Variable(0, dtype=tf.int64, trainable=False, name="gan_turn")

        @tf.autograph.experimental.do_not_convert
        def loss_fn(batch: Sequence[Any]) -> Any:
            noise, real = batch
            loss = self._gan.loss_of(tf.identity(turn), noise, real)
            turn.assign_add(1)
            return loss

        return program_from_function(
            loss_fn,
            [variable for _, variable in self._variables.values()],
            self._spec,
            group_of=lambda name: group_of(self._variables[name][0]),
        )

    def evaluation(self) -> None:
        """A GAN has nothing to validate."""
