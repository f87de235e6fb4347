"""The training step, compiled on each backend, and its settings.

A step is a deterministic function of (state, batch, step number). The noise of
an example depends on (seed, step, its index). The state of layers that draw
random numbers (dropout, random gazes) depends on (seed, step, replica).
Adversarial images are crafted first, with constant weights. The loss on them is
differentiated afterwards.
"""

import contextlib
import dataclasses
from typing import Callable

import keras
import numpy as np
from keras import layers, ops

from saccade.attacks import losses
from saccade.core import gradients, lp, randomness
from saccade.data import augment
from saccade.models import blocks
from saccade.models import inspect as model_inspect
from saccade.training import config as training_config
from saccade.training import objectives

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
_TINY = 1e-12  # Avoids 0/0 for a zero gradient.


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a training step minimizes.

    The classes of the module `objectives` have the same interface.

    Attributes:
        loss: Callable `(logits_fn, clean, crafted, labels)` that returns the
            losses, shape `(batch,)`, and the logits for the accuracy.
            `logits_fn` runs the model in training mode.
        craft: Callable `(logits_fn, images, labels, keys)` that returns the
            images for the loss. None: the loss uses the clean images.
            `logits_fn` runs the model in inference mode, or in training mode
            if the objective has a true `train_mode`. With a warm-up of epsilon
            it also receives `scale`, the factor of the radius.
    """

    loss: Callable
    craft: Callable | None = None


STANDARD = objectives.Standard()


# --- The step ----------------------------------------------------------------


def make_step(
    model,
    optimizer,
    objective,
    *,
    seed=0,
    augmentation=None,
    l2=0.0,
    config=None,
    crafting_model=None,
    steps_per_epoch=1,
):
    """Builds the compiled training step of the active backend.

    Args:
        model: A built `keras.Model` from images to logits. On TensorFlow the
            step runs under the current distribution strategy.
        optimizer: A `keras.optimizers.Optimizer`, built on the model.
        objective: An `Objective`.
        seed: Integer, the run's seed.
        augmentation: A `augment.Augmentation`, or None.
        l2: Coefficient of `l2_loss`. Above 0 it replaces the L2 regularizers
            of the layers; with 0 the layers keep them.
        config: A `StepConfig`, or None for the default one.
        crafting_model: The same architecture in another dtype policy. It
            computes with the weights of `model` while images are crafted; its
            own weights are never read.
        steps_per_epoch: Steps in one epoch, for the warm-ups of epsilon and of
            the weight perturbation.

    Returns:
        Callable `(images, labels, indices, step)` that updates `model` and
        `optimizer` and returns the mean loss and the number of correct
        predictions. `indices` are the positions of the examples in the data
        set. With `config.replays` it takes the perturbation as a fifth
        argument, of the shape of `images`, and returns the new perturbation as
        a third value.

    Raises:
        NotImplementedError: If the active backend cannot train.
        ValueError: If the objective does not fit the config.
    """
    makers = {
        "tensorflow": _tensorflow_step,
        "jax": _jax_step,
        "torch": _torch_step,
    }
    backend = keras.config.backend()
    if backend not in makers:
        raise NotImplementedError(
            f"Training needs one of {tuple(makers)}. Received: {backend!r}"
        )
    config = config or training_config.StepConfig()
    config.check(objective)
    run = Step(
        model,
        objective,
        seed,
        augmentation or augment.Augmentation(),
        l2,
        config,
        crafting_model,
        steps_per_epoch,
    )
    return makers[backend](run, model, optimizer)


def kernels(model):
    """Returns the trainable kernels of convolutions and dense layers."""
    trainable = {id(variable) for variable in model.trainable_variables}
    found = {
        id(layer.kernel): layer.kernel
        for layer in model_inspect.all_layers(model)
        if isinstance(layer, _WITH_KERNEL) and id(layer.kernel) in trainable
    }
    return list(found.values())


def l2_loss(variables, coefficient):
    """Returns coefficient / 2 times the sum of squares of all variables."""
    squares = [ops.sum(ops.square(ops.cast(v, "float32"))) for v in variables]
    return 0.5 * coefficient * sum(squares, ops.zeros(()))


def perturbed(weights, grads, size):
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
    """The backend-independent part: keys, augmentation, attack and loss."""

    def __init__(
        self,
        model,
        objective,
        seed,
        augmentation,
        l2=0.0,
        config=None,
        crafting_model=None,
        steps_per_epoch=1,
    ):
        self.model, self.objective = model, objective
        # Returns the logits of auxiliary heads too, which are all trained.
        self.training_fn = in_training(model)
        self.seed, self.augmentation = seed, augmentation
        self.config = config or training_config.StepConfig()
        self.l2, self.kernels = l2, kernels(model) if l2 else ()
        for kernel in self.kernels:
            kernel.regularizer = None  # Otherwise L2 would be added twice.
        self.crafting_model = crafting_model
        self.warmup_steps = self.config.epsilon_warmup * steps_per_epoch
        self.awp_from = self.config.awp_warmup * steps_per_epoch
        self.generators = model_inspect.generators(model)
        self.replays = self.config.replays
        # The tensors that adversarial weight perturbation changes.
        self.perturbable = [
            v for v in model.trainable_variables if len(v.shape) > 1
        ]

    def prepare(self, images, labels, indices, step, carried=None, replica=0):
        """Sets all random states; returns the clean and the crafted images."""
        model_inspect.key_generators(self.generators, self.seed, step, replica)
        # All replays of a batch use the same augmentation.
        view = step // self.replays if self.replays else step
        keys = randomness.example_keys(self.seed, indices, view)
        clean = augment.augment(images, keys, self.augmentation)
        if carried is not None:
            crafted = ops.clip(clean + carried, 0.0, 1.0)
        elif self.objective.craft is None:
            return clean, clean
        else:
            settings = (
                {"scale": self.epsilon_scale(step)} if self.warmup_steps else {}
            )
            crafted = self.objective.craft(
                self._crafting_fn(),
                clean,
                labels,
                randomness.fold_in(keys, 1),
                **settings,
            )
        return clean, ops.stop_gradient(crafted)

    def epsilon_scale(self, step):
        """The factor of epsilon at a step, which rises to 1 in the warm-up."""
        if not self.warmup_steps:
            return 1.0
        done = ops.cast(step, "float32") + 1.0
        return ops.minimum(1.0, done / self.warmup_steps)

    def perturbed_weights(self, weights, grads, step):
        """The weights at which a step takes its gradient; see `awp`."""
        size = self.config.awp
        if self.awp_from:
            begun = ops.cast(step, "float32") >= self.awp_from
            size = size * ops.cast(begun, "float32")
        return perturbed(weights, grads, size)

    def _crafting_fn(self):
        training = getattr(self.objective, "train_mode", False)
        # A layer that draws random numbers updates its seed state. The compiled
        # loop of an attack must not read a variable that is assigned inside it.
        draws = model_inspect.is_stochastic(self.model)
        if self.crafting_model is None and not training and not draws:
            return lambda x: self.model(x, training=False)
        net = self.crafting_model or self.model
        values = [ops.convert_to_tensor(v) for v in self.model.variables]
        pairs = list(zip(net.variables, values, strict=True))

        def logits_fn(x):
            # A scope for each call: no call may read what another one assigned
            # inside the loop of an attack.
            with keras.StatelessScope(state_mapping=pairs):
                outputs = net(x, training=training)
            return keras.tree.map_structure(
                lambda output: ops.cast(output, "float32"), outputs
            )

        return logits_fn

    def mean_loss(self, clean, crafted, labels):
        """The mean of the objective's losses, and its logits."""
        values, logits = self.objective.loss(
            self.training_fn, clean, crafted, labels
        )
        return ops.mean(values), logits

    def loss(self, clean, crafted, labels, replicas=1):
        """The loss of this replica; the sum over replicas is the total loss.

        The mean is divided by the number of replicas here because functional
        losses, unlike Keras `Loss` objects, do not do it. Weight losses are
        divided too, because every replica computes all of them.
        """
        mean, logits = self.mean_loss(clean, crafted, labels)
        predicted = losses.predictions(logits)
        correct = ops.equal(predicted, ops.cast(labels, "int32"))
        total = mean + sum(self.model.losses, ops.zeros(()))
        if self.l2:
            total = total + l2_loss(self.kernels, self.l2)
        return total / replicas, ops.sum(ops.cast(correct, "float32"))

    def carry(self, carried, grad, step):
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
        attack = self.objective.attack
        epsilon = self.epsilon_scale(step) * attack.epsilon
        direction = lp.ascent_direction(
            gradients.clean_gradient(grad), attack.norm
        )
        stepped = carried + epsilon * direction
        return lp.project(stepped, epsilon, attack.norm)


# --- The backends ------------------------------------------------------------


def _tensorflow_step(run, model, optimizer):
    import tensorflow as tf

    strategy = tf.distribute.get_strategy()
    replicas = strategy.num_replicas_in_sync
    # XLA is used on accelerators only: on the CPU it runs convolutions three
    # times slower. It cannot compile a step with mirrored variables.
    accelerated = any(map(tf.config.list_physical_devices, ("GPU", "TPU")))

    def replica_fn(images, labels, indices, step, *carried):
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        clean, crafted = run.prepare(
            images, labels, indices, step, *carried, replica=replica
        )
        batch = clean, crafted, labels
        values = _perturbed_on_replica(run, batch, step, replicas)
        with tf.GradientTape() as tape:
            tape.watch([crafted, *values])
            with _weights_at(run.perturbable, values) as scope:
                loss, correct = run.loss(*batch, replicas)
        variables = model.trainable_variables
        value_of = dict(zip(map(id, run.perturbable), values, strict=False))
        points = [value_of.get(id(v), v) for v in variables]
        extra = [crafted] if carried else []
        grads = tape.gradient(loss, [*points, *extra])
        _keep_updates(scope, model)
        # Keras's optimizer sums the gradients of the replicas.
        optimizer.apply(grads[: len(points)], variables)
        new = [run.carry(*carried, grads[-1], step)] if carried else []
        return [loss, correct, *new]

    compiled = True if replicas == 1 and accelerated else None

    @tf.function(autograph=False, jit_compile=compiled)
    def step_fn(*batch):
        loss, correct, *carried = strategy.run(replica_fn, args=batch)
        sums = [strategy.reduce("SUM", r, axis=None) for r in (loss, correct)]
        parts = map(strategy.experimental_local_results, carried)
        return [*sums, *(tf.concat(part, axis=0) for part in parts)]

    def split(values):
        if replicas == 1:
            return tf.convert_to_tensor(values)
        parts = tf.split(
            values, replicas
        )  # Raises if the parts differ in size.
        return strategy.experimental_distribute_values_from_function(
            lambda context: parts[context.replica_id_in_sync_group]
        )

    return lambda images, labels, indices, step, *carried: step_fn(
        split(images),
        split(labels),
        split(indices),
        tf.constant(step, tf.int32),
        *map(split, carried),
    )


def _perturbed_on_replica(run, batch, step, replicas):
    """The perturbed weights, the same on every replica; [] without `awp`."""
    import tensorflow as tf

    if not run.config.awp:
        return []
    with tf.GradientTape() as tape, keras.StatelessScope():
        loss = run.mean_loss(*batch)[0] / replicas
    grads = tape.gradient(
        loss,
        [v.value for v in run.perturbable],
        unconnected_gradients=tf.UnconnectedGradients.ZERO,
    )
    context = tf.distribute.get_replica_context()
    grads = context.all_reduce(tf.distribute.ReduceOp.SUM, grads)
    weights = [tf.convert_to_tensor(v) for v in run.perturbable]
    return run.perturbed_weights(weights, grads, step)


@contextlib.contextmanager
def _weights_at(variables, values):
    """Makes the model compute with `values`; [] changes nothing."""
    if not values:
        yield None
        return
    pairs = zip(variables, values, strict=True)
    with keras.StatelessScope(pairs, collect_losses=True) as scope:
        yield scope


def _keep_updates(scope, model):
    """Assigns the batch statistics and seed states that a scope collected."""
    if scope is None:
        return
    for variable in model.non_trainable_variables:
        value = scope.get_current_value(variable)
        if value is not None:
            variable.assign(value)


def _jax_step(run, model, optimizer):
    import jax

    weights = model.trainable_variables
    frozen = model.non_trainable_variables

    def scope(weight_values, frozen_values):
        values = [*weight_values, *frozen_values]
        pairs = zip([*weights, *frozen], values, strict=True)
        # Without `collect_losses` activity losses would be dropped.
        return keras.StatelessScope(state_mapping=pairs, collect_losses=True)

    def loss_fn(weight_values, crafted, frozen_values, clean, labels):
        with scope(weight_values, frozen_values) as state:
            loss, correct = run.loss(clean, crafted, labels)
        frozen_values = [state.get_current_value(v) for v in frozen]
        return loss, (correct, frozen_values)

    @jax.jit
    def step_fn(groups, images, labels, indices, step, *carried):
        weight_values, frozen_values, slot_values = groups
        with scope(weight_values, frozen_values) as state:
            clean, crafted = run.prepare(
                images, labels, indices, step, *carried
            )
        frozen_values = [state.get_current_value(v) for v in frozen]

        def mean_loss(weight_values):
            with scope(weight_values, frozen_values):
                return run.mean_loss(clean, crafted, labels)[0]

        points = weight_values
        if run.config.awp:
            grads = jax.grad(mean_loss)(points)
            points = _perturbed(run, weights, points, grads, step)
        # The gradient by the images is computed only for free training.
        argnums = (0, 1) if carried else (0,)
        grad_fn = jax.value_and_grad(loss_fn, argnums=argnums, has_aux=True)
        (loss, (correct, frozen_values)), (grads, *image_grads) = grad_fn(
            points, crafted, frozen_values, clean, labels
        )
        weight_values, slot_values = optimizer.stateless_apply(
            slot_values, grads, weight_values
        )
        new = [run.carry(*carried, *image_grads, step)] if carried else []
        groups = weight_values, frozen_values, slot_values
        return [loss, correct, *new], groups

    def step(images, labels, indices, step, *carried):
        groups = (weights, frozen, optimizer.variables)
        values = tuple([v.value for v in group] for group in groups)
        step = np.int32(step)
        results, new = step_fn(values, images, labels, indices, step, *carried)
        for group, values in zip(groups, new, strict=True):
            for variable, value in zip(group, values, strict=True):
                variable.assign(value)
        return results

    return step


def _perturbed(run, weights, values, grads, step):
    """The values of all weights; those in `run.perturbable` are perturbed."""
    perturbed_values = run.perturbed_weights(values, grads, step)
    perturbable = {id(v) for v in run.perturbable}
    found = zip(weights, perturbed_values, values, strict=True)
    return [new if id(v) in perturbable else old for v, new, old in found]


def _torch_step(run, model, optimizer):
    import torch

    def perturbed_weights(batch, step):
        with keras.StatelessScope():
            mean, _ = run.mean_loss(*batch)
        weights = [v.value for v in run.perturbable]
        grads = torch.autograd.grad(
            mean, weights, allow_unused=True, materialize_grads=True
        )
        with torch.no_grad():
            values = run.perturbed_weights(weights, grads, step)
        return [value.requires_grad_(True) for value in values]

    def step(images, labels, indices, step, *carried):
        images, labels, indices, *carried = (
            ops.convert_to_tensor(v)
            for v in (images, labels, indices, *carried)
        )
        with torch.no_grad():  # Attacks enable gradients themselves.
            clean, crafted = run.prepare(
                images, labels, indices, step, *carried
            )
        if carried:
            crafted.requires_grad_(True)
        batch = clean, crafted, labels
        values = perturbed_weights(batch, step) if run.config.awp else []
        with _weights_at(run.perturbable, values) as scope:
            loss, correct = run.loss(*batch)
        variables = model.trainable_variables
        value_of = dict(zip(map(id, run.perturbable), values, strict=False))
        points = [value_of.get(id(v), v.value) for v in variables]
        extra = [crafted] if carried else []
        grads = torch.autograd.grad(loss, [*points, *extra])
        new = []
        with torch.no_grad():
            _keep_updates(scope, model)
            optimizer.apply(grads[: len(points)], variables)
            if carried:
                new = [run.carry(*carried, grads[-1], step)]
        return [loss.detach(), correct.detach(), *new]

    return step


def in_training(model):
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

    def outputs_fn(images):
        logits, *heads = reader(images, training=True)
        return losses.Outputs(logits, ops.stack(heads, axis=1))

    return outputs_fn
