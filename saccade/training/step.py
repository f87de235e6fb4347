"""The training step, compiled on each backend, and its settings.

A step is a deterministic function of (state, batch, step number). The noise of
an example depends on (seed, step, its index). The state of layers that draw
random numbers (dropout, random gazes) depends on (seed, step, replica).
Adversarial images are crafted first, with constant weights. The loss on them is
differentiated afterwards.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import cast

import keras
import numpy as np
from keras import layers, ops

from saccade.attacks import losses
from saccade.attacks.base import LogitsFn
from saccade.core import gradients, lp, randomness
from saccade.core.arrays import Tensor
from saccade.data import augment
from saccade.models import blocks
from saccade.models import inspect as model_inspect
from saccade.training import config as training_config
from saccade.training import engines, objectives

_WITH_KERNEL = (
    layers.Dense,
    layers.EinsumDense,
    layers.Conv1D,
    layers.Conv2D,
    layers.Conv3D,
    layers.Conv1DTranspose,
    layers.Conv2DTranspose,
    layers.Conv3DTranspose,
    layers.DepthwiseConv2D,
)
_UNIT = np.arange(256, dtype="float32") / np.float32(255)
_TINY = 1e-12  # Avoids 0/0 for a zero gradient.


STANDARD = objectives.Standard()


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepOptions:
    """What a training step does besides minimizing its objective.

    Attributes:
        seed: The run's seed.
        augmentation: The augmentation of the images.
        l2: Coefficient of `l2_loss`. Above 0 it replaces the L2 regularizers
            of the layers; with 0 the layers keep them.
        config: How the step handles an adversarial objective.
        crafting_model: The same architecture in another dtype policy. It
            computes with the weights of the model while images are crafted;
            its own weights are never read. None: the model itself.
        grad_accumulation: Number of parts into which a batch is divided. Each
            is crafted and differentiated by itself, and the mean of their
            gradients is applied once.
        clip_norm: Largest norm of the gradient by all weights; 0 for no limit.
    """

    seed: int = 0
    augmentation: augment.Augmentation = augment.Augmentation()
    l2: float = 0.0
    config: training_config.StepConfig = training_config.StepConfig()
    crafting_model: keras.Model | None = None
    grad_accumulation: int = 1
    clip_norm: float = 0.0


# --- The step ----------------------------------------------------------------


def make_step(
    model: keras.Model,
    optimizer: keras.optimizers.Optimizer,
    objective: objectives.Objective,
    options: StepOptions = StepOptions(),  # noqa: B008 -- It is frozen.
    steps_per_epoch: int = 1,
) -> engines.Engine:
    """Builds the compiled training step of the active backend.

    Args:
        model: A built `keras.Model` from images to logits. On TensorFlow the
            step runs under the current distribution strategy.
        optimizer: A `keras.optimizers.Optimizer`, built on the model.
        objective: An `objectives.Objective`.
        options: The other settings of the step.
        steps_per_epoch: Steps in one epoch, for the warm-ups of epsilon and of
            the weight perturbation.

    Returns:
        Callable `(images, labels, indices, step)` that updates `model` and
        `optimizer` and returns the mean loss and the number of correct
        predictions; see `engines.Engine` for loops. `images` are float32 in
        [0, 1] or uint8, `indices` are the positions of the examples in the
        data set. With `replays` it takes the perturbation as a fifth
        argument, of the shape of `images`, and returns the new perturbation as
        a third value.

    Raises:
        NotImplementedError: If the active backend cannot train.
        ValueError: If the objective does not fit the config.
    """
    engine_class = engines.engine_class()
    step = Step(model, objective, options, steps_per_epoch)
    return engine_class(step, model, optimizer)


def kernels(model: keras.Model) -> list[keras.Variable]:
    """Returns the trainable kernels of convolutions and dense layers."""
    trainable = {id(variable) for variable in model.trainable_variables}
    found = {
        id(layer.kernel): layer.kernel
        for layer in model_inspect.all_layers(model)
        if isinstance(layer, _WITH_KERNEL) and id(layer.kernel) in trainable
    }
    return list(found.values())


def unit_range(images: Tensor) -> Tensor:
    """Converts uint8 images to float32 in [0, 1]; others are unchanged.

    The result is that of a division by 255 on every backend. XLA replaces a
    division by a constant with a product, which can differ in the last bit.
    """
    if keras.backend.standardize_dtype(images.dtype) != "uint8":
        return images
    return ops.take(_UNIT, ops.cast(images, "int32"), axis=0)


def l2_loss(variables: Sequence[keras.Variable], coefficient: float) -> Tensor:
    """Returns coefficient / 2 times the sum of squares of all variables."""
    squares = [ops.sum(ops.square(ops.cast(v, "float32"))) for v in variables]
    return 0.5 * coefficient * sum(squares, ops.zeros(()))


def perturbed(
    weights: Sequence[Tensor], grads: Sequence[Tensor], size: Tensor | float
) -> list[Tensor]:
    """Moves each weight tensor by `size` times its norm along its gradient.

    Args:
        weights: List of tensors.
        grads: Their gradients.
        size: Length of the perturbation relative to the norm of the tensor.

    Returns:
        List of perturbed tensors.

    References:
        - [Wu et al., 2020](https://arxiv.org/abs/2004.05884), equation 8
    """
    found = []
    for weight, grad in zip(weights, grads, strict=True):
        weight_norm = ops.sqrt(ops.sum(ops.square(weight)))
        grad_norm = ops.sqrt(ops.sum(ops.square(grad)))
        found.append(weight + size * weight_norm / (grad_norm + _TINY) * grad)
    return found


class Step:
    """The backend-independent part: keys, augmentation, attack and loss.

    Args:
        model, objective, options, steps_per_epoch: See `make_step`.

    Raises:
        ValueError: If the objective does not fit the config.
    """

    def __init__(
        self,
        model: keras.Model,
        objective: objectives.Objective,
        options: StepOptions = StepOptions(),  # noqa: B008 -- It is frozen.
        steps_per_epoch: int = 1,
    ) -> None:
        options.config.check(objective)
        self.model, self.objective, self.options = model, objective, options
        # Returns the logits of auxiliary heads too, which are all trained.
        self.training_fn = in_training(model)
        self.kernels = kernels(model) if options.l2 else []
        for kernel in self.kernels:
            kernel.regularizer = None  # Otherwise L2 would be added twice.
        self.warmup_steps = options.config.epsilon_warmup * steps_per_epoch
        self.awp_from = options.config.awp_warmup * steps_per_epoch
        self.generators = model_inspect.generators(model)
        # What an engine does to the attack before it is called.
        self.compile_attack: Callable[[Callable], Callable] = lambda fn: fn
        # The tensors that adversarial weight perturbation changes.
        self.perturbable = [
            v for v in model.trainable_variables if len(v.shape) > 1
        ]

    def split(self, batch: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        """Divides a batch into the parts of gradient accumulation.

        With n parts, part i holds every n-th row from row i on. A batch that is
        divided among replicas has the same parts as one that is not.
        """
        parts = self.options.grad_accumulation
        if parts == 1:
            return [tuple(batch)]
        return [
            tuple(rows[number::parts] for rows in batch)
            for number in range(parts)
        ]

    def clipped(
        self, grads: Sequence[Tensor], scale: Tensor | None = None
    ) -> list[Tensor]:
        """Rescales gradients by all weights to a norm of at most `clip_norm`.

        Args:
            grads: List of tensors.
            scale: Factor of the gradients; see `engines.loss_scale`.
        """
        limit: Tensor | float = self.options.clip_norm
        if not limit:
            return list(grads)
        if scale is not None:
            limit = limit * scale
        squares = [ops.sum(ops.square(grad)) for grad in grads]
        norm = ops.sqrt(sum(squares, ops.zeros(())))
        factor = limit / ops.maximum(norm, limit)
        return [grad * factor for grad in grads]

    def prepare(
        self,
        images: Tensor,
        labels: Tensor,
        indices: Tensor,
        step: Tensor | int,
        carried: Tensor | None = None,
        replica: Tensor | int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Sets all random states; returns the clean and the crafted images."""
        images = unit_range(images)
        seed, replays = self.options.seed, self.options.config.replays
        model_inspect.key_generators(self.generators, seed, step, replica)
        # All replays of a batch use the same augmentation.
        view = step // replays if replays else step
        keys = randomness.example_keys(seed, indices, view)
        clean = augment.augment(images, keys, self.options.augmentation)
        if carried is not None:
            crafted = ops.clip(clean + carried, 0.0, 1.0)
        elif self.objective.craft is None:
            return clean, clean
        else:
            settings = (
                {"scale": self.epsilon_scale(step)} if self.warmup_steps else {}
            )
            craft = functools.partial(self.objective.craft, self._crafting_fn())
            crafted = self.compile_attack(craft)(
                clean, labels, randomness.fold_in(keys, 1), **settings
            )
        return clean, ops.stop_gradient(crafted)

    def epsilon_scale(self, step: Tensor | int) -> Tensor | float:
        """The factor of epsilon at a step, which rises to 1 in the warm-up."""
        if not self.warmup_steps:
            return 1.0
        done = ops.cast(step, "float32") + 1.0
        return ops.minimum(1.0, done / self.warmup_steps)

    def perturbed_weights(
        self,
        weights: Sequence[Tensor],
        grads: Sequence[Tensor],
        step: Tensor | int,
    ) -> list[Tensor]:
        """The weights at which a step takes its gradient; see `awp`."""
        size: Tensor | float = self.options.config.awp
        if self.awp_from:
            begun = ops.cast(step, "float32") >= self.awp_from
            size = size * ops.cast(begun, "float32")
        return perturbed(weights, grads, size)

    def _crafting_fn(self) -> LogitsFn:
        training = getattr(self.objective, "train_mode", False)
        # A layer that draws random numbers updates its seed state. The compiled
        # loop of an attack must not read a variable that is assigned inside it.
        draws = model_inspect.is_stochastic(self.model)
        net = self.options.crafting_model or self.model
        in_float16 = model_inspect.computes_in_float16(net)
        if net is self.model and not training and not draws and not in_float16:
            return lambda x: self.model(x, training=False)
        values = [ops.convert_to_tensor(v) for v in self.model.variables]
        pairs = list(zip(net.variables, values, strict=True))

        def logits_fn(x: Tensor) -> Tensor | losses.Outputs:
            # A scope for each call: no call may read what another one assigned
            # inside the loop of an attack.
            with keras.StatelessScope(state_mapping=pairs):
                outputs = net(x, training=training)
            return keras.tree.map_structure(
                lambda output: ops.cast(output, "float32"), outputs
            )

        if in_float16:
            return gradients.without_underflow(logits_fn)
        return logits_fn

    def mean_loss(
        self, clean: Tensor, crafted: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The mean of the objective's losses, and its logits."""
        values, logits = self.objective.loss(
            self.training_fn, clean, crafted, labels
        )
        return ops.mean(values), logits

    def loss(
        self,
        clean: Tensor,
        crafted: Tensor,
        labels: Tensor,
        shares: int = 1,
        scope: keras.StatelessScope | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The loss of one share of a batch; the sum over shares is the loss.

        A share is the part of a replica, or a part of it under gradient
        accumulation. The mean is divided by the number of shares here because
        functional losses, unlike Keras `Loss` objects, do not do it. Weight
        losses are divided too, because every share computes all of them.

        Args:
            clean: The images, `(batch, height, width, channels)`.
            crafted: The images of the loss, of the same shape.
            labels: Integers of shape `(batch,)`.
            shares: Number of shares.
            scope: The scope that collects the losses of layers; None: the
                layers keep them.

        Returns:
            The loss and the number of correct predictions, scalars.
        """
        mean, logits = self.mean_loss(clean, crafted, labels)
        predicted = losses.predictions(logits)
        correct = ops.equal(predicted, ops.cast(labels, "int32"))
        kept = _layer_losses(self.model, scope)
        total = mean + sum(kept, ops.zeros(()))
        if self.options.l2:
            total = total + l2_loss(self.kernels, self.options.l2)
        return total / shares, ops.sum(ops.cast(correct, "float32"))

    def carry(
        self, carried: Tensor, grad: Tensor, step: Tensor | int
    ) -> Tensor:
        """Takes the perturbation step of free training.

        The perturbation is used for other images next, so `prepare` clips the
        perturbed images to [0, 1].

        Args:
            carried: The perturbation, of the shape of the images.
            grad: Gradient of the loss by the images.
            step: Number of the step.

        Returns:
            The new perturbation.
        """
        # `StepConfig.check` has refused other objectives.
        attack = cast(objectives.Madry, self.objective).attack
        epsilon = self.epsilon_scale(step) * attack.epsilon
        direction = lp.ascent_direction(
            gradients.clean_gradient(grad), attack.norm
        )
        stepped = carried + epsilon * direction
        return lp.project(stepped, epsilon, attack.norm)


def _layer_losses(
    model: keras.Model, scope: keras.StatelessScope | None
) -> list[Tensor]:
    """The losses of layers in this call, and those of regularizers."""
    if scope is None:
        return model.losses
    found = list(scope.losses)
    for variable in model.trainable_variables:
        if variable.regularizer is not None:
            value = scope.get_current_value(variable)
            found.append(
                variable.regularizer(variable if value is None else value)
            )
    return found


def in_training(model: keras.Model) -> LogitsFn:
    """Returns the function by which an objective calls a model in training.

    Args:
        model: A functional `keras.Model` from images to logits.

    Returns:
        Callable from images to logits, `(batch, classes)`; for a model with
        auxiliary heads to `losses.Outputs`, whose `head_logits`, `(batch,
        heads, classes)`, are the logits of all heads, the main head first. An
        objective trains each head with the label of the image.
    """
    found = [x for x in model.layers if isinstance(x, blocks.MainHead)]
    if not found:
        return lambda images: model(images, training=True)
    reader = keras.Model(model.input, [model.output, *found[0].input])

    def outputs_fn(images: Tensor) -> losses.Outputs:
        logits, *heads = reader(images, training=True)
        return losses.Outputs(logits, ops.stack(heads, axis=1))

    return outputs_fn
