"""One training step, compiled on each backend, and what it may consist of.

A step is a function of (state, batch, step number): the noise of an example
comes from (seed, step, its index), and the state of layers that draw (dropout,
random gazes) from (seed, step, replica). Adversarial images are crafted first,
with the weights held constant, and only then is the loss differentiated.
"""

import contextlib
import dataclasses
from typing import Callable

import keras
import numpy as np
from keras import layers, ops

import glimpse
import losses
import model_backbone
import model_registry
import numerics
import objectives

CRAFT_DTYPES = ("float32", "bfloat16")
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
_TINY = 1e-12  # Keeps 0/0 out of the direction of a zero gradient.


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a training step minimizes; every object of `losses` is one too.

    Attributes:
        loss: Callable `(logits_fn, clean, crafted, labels)` to the losses,
            shape `(batch,)`, and the logits the accuracy is counted on;
            `logits_fn` runs the model in training mode.
        craft: Callable `(logits_fn, images, labels, keys)` to the images the
            loss will see, `logits_fn` in inference mode (in training mode if
            the objective has a true `train_mode`); None for the clean images.
            A `scale` besides is the part of the radius in use.
    """

    loss: Callable
    craft: Callable | None = None


STANDARD = objectives.Standard()


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """How a step goes about an adversarial objective.

    Attributes:
        epsilon_warmup: Epochs in which the radius of the attack grows
            linearly from zero, with its steps; 0 for none.
        craft_dtype: `"float32"` or `"bfloat16"`: in what the model computes
            while images are crafted. Perturbations and the loss are float32.
        awp: Adversarial weight perturbation (Wu et al.): before the gradient
            is taken, each weight tensor w of two or more dimensions moves by
            awp * |w| along its own normalized gradient of the objective's
            mean; afterwards it moves back. The paper's are 0.01 with PGD
            adversarial training and 0.005 with TRADES; 0 is none.
        awp_warmup: Epochs before the first move. The authors' program has 0,
            and 10 with TRADES: moved at once, a net may stay at chance.
        replays: Free adversarial training (Shafahi et al.): each batch is
            taken that many times in a row. One backward pass gives the
            gradient of the weights, and that of the images, along which the
            perturbation takes a step of epsilon; the next batch begins with
            it. Replaces the attack; 0 is none.

    References:
        - [Wu et al., 2020](https://arxiv.org/abs/2004.05884), equation 8
        - [Shafahi et al., 2019](https://arxiv.org/abs/1904.12843), algorithm 1
    """

    epsilon_warmup: float = 0.0
    craft_dtype: str = "float32"
    awp: float = 0.0
    awp_warmup: float = 0.0
    replays: int = 0

    def __post_init__(self):
        if self.craft_dtype not in CRAFT_DTYPES:
            raise ValueError(
                "Expected craft_dtype to be one of "
                f"{', '.join(CRAFT_DTYPES)}. Received: "
                f"craft_dtype={self.craft_dtype!r}."
            )
        for name in ("epsilon_warmup", "awp", "awp_warmup", "replays"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ValueError(
                    f"Expected a finite {name} >= 0. Received: "
                    f"{name}={value:g}."
                )
        if self.awp_warmup and not self.awp:
            raise ValueError(
                "Expected awp > 0 with awp_warmup. Received: awp=0, "
                f"awp_warmup={self.awp_warmup:g}."
            )
        if self.replays and self.craft_dtype != "float32":
            raise ValueError(
                "Expected no craft_dtype with replays: free training crafts "
                "with the gradient of its own step. Received: replays="
                f"{self.replays}, craft_dtype={self.craft_dtype!r}."
            )

    def check(self, objective):
        """Raises a ValueError, one line, if the objective does not fit."""
        if self.craft_dtype != "float32" and objective.craft is None:
            raise ValueError(
                "Expected an objective that crafts images for craft_dtype. "
                f"Received: craft_dtype={self.craft_dtype!r}."
            )
        if self.epsilon_warmup and objective.craft is None:
            raise ValueError(
                "Expected an objective that crafts images for epsilon_warmup. "
                f"Received: epsilon_warmup={self.epsilon_warmup:g}."
            )
        if self.replays and not isinstance(objective, objectives.Madry):
            raise ValueError(
                "Expected the objective madry or alp with replays, which climb "
                "the loss that is trained on. Received: "
                f"replays={self.replays}, {type(objective).__name__}."
            )
        target = getattr(objective, "target", "none")
        if self.replays and target != "none":
            raise ValueError(
                "Expected target=none with replays, which climb the loss that "
                f"is trained on. Received: target={target!r}."
            )


DISTRIBUTIONS = ("none", "mirrored")


def scope(distribute, batch_size):
    """Returns the context in which a run makes its model and trains it.

    Args:
        distribute: `"none"`, or `"mirrored"`: the model is on every GPU of
            the machine (without any, on its logical CPU devices), each of
            which takes its part of a batch. The weights that come of it are
            those of one device, but for batch normalization, whose
            statistics are those of the parts.
        batch_size: Images a step.

    Returns:
        A context manager.

    Raises:
        ValueError: If the name is unknown, the backend is not TensorFlow, or
            the devices cannot share a batch.
    """
    if distribute not in DISTRIBUTIONS:
        raise ValueError(
            f"Expected distribute to be one of {', '.join(DISTRIBUTIONS)}. "
            f"Received: distribute={distribute!r}."
        )
    if distribute == "none":
        return contextlib.nullcontext()
    if keras.config.backend() != "tensorflow":
        raise ValueError(
            f"distribute={distribute} is TensorFlow's tf.distribute. Received: "
            f"KERAS_BACKEND={keras.config.backend()}."
        )
    import tensorflow as tf

    gpus = tf.config.list_logical_devices("GPU")
    devices = gpus or tf.config.list_logical_devices("CPU")
    if batch_size % len(devices):
        raise ValueError(
            f"Expected a batch_size that the {len(devices)} devices can share. "
            f"Received: batch_size={batch_size}."
        )
    return tf.distribute.MirroredStrategy([d.name for d in devices]).scope()


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
            step runs under the strategy in whose scope it is made.
        optimizer: A `keras.optimizers.Optimizer`, built on the model.
        objective: An `Objective`.
        seed: Integer, the run's seed.
        augmentation: A `glimpse.Augmentation`, or None.
        l2: Coefficient of `l2_loss`, which replaces the L2 that some
            backbones bring along; with 0 they keep it.
        config: A `StepConfig`, or None for the default one.
        crafting_model: The same architecture in another dtype policy, which
            computes with the weights of `model` while images are crafted; its
            own values are never read.
        steps_per_epoch: Steps in one epoch, for the warm-up of epsilon.

    Returns:
        Callable `(images, labels, indices, step)` to the mean loss and the
        number of right answers of the batch; `indices` are the examples'
        places in the data set. It updates `model` and `optimizer`. With
        `config.replays` it takes the perturbation as a fifth argument, of the
        shape of `images`, and returns the new one as a third value.

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
    config = config or StepConfig()
    config.check(objective)
    run = _Step(
        model,
        objective,
        seed,
        augmentation or glimpse.Augmentation(),
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
        for layer in model._flatten_layers()
        if isinstance(layer, _WITH_KERNEL) and id(layer.kernel) in trainable
    }
    return list(found.values())


def l2_loss(variables, coefficient):
    """Returns coefficient / 2 * the sum of squares of all variables."""
    squares = [ops.sum(ops.square(ops.cast(v, "float32"))) for v in variables]
    return 0.5 * coefficient * sum(squares, ops.zeros(()))


def perturbed(weights, slopes, share):
    """Moves each weight tensor by `share` of its norm along its gradient.

    Args:
        weights: List of tensors.
        slopes: Their gradients.
        share: Length of the move over the norm of the tensor.

    Returns:
        List of tensors.

    References:
        - [Wu et al., 2020](https://arxiv.org/abs/2004.05884), equation 8
    """
    moved = []
    for weight, slope in zip(weights, slopes, strict=True):
        size = ops.sqrt(ops.sum(ops.square(weight)))
        steep = ops.sqrt(ops.sum(ops.square(slope)))
        moved.append(weight + share * size / (steep + _TINY) * slope)
    return moved


class _Step:
    """What is the same on every backend: keys, views, attack, loss."""

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
        # With auxiliary heads each of them learns the label.
        self.answer = model_backbone.in_training(model)
        self.seed, self.augmentation = seed, augmentation
        self.config = config or StepConfig()
        self.l2, self.kernels = l2, kernels(model) if l2 else ()
        for kernel in self.kernels:
            kernel.regularizer = None  # ResNet-20's own would come on top.
        self.crafting_model = crafting_model
        self.warmup_steps = self.config.epsilon_warmup * steps_per_epoch
        self.awp_from = self.config.awp_warmup * steps_per_epoch
        self.generators = model_registry.generators(model)
        self.replays = self.config.replays
        # What adversarial weight perturbation moves.
        self.movable = [
            v for v in model.trainable_variables if len(v.shape) > 1
        ]

    def prepare(self, images, labels, indices, step, carried=None, replica=0):
        """Keys everything that draws; returns the clean and crafted images."""
        model_registry.key_generators(self.generators, self.seed, step, replica)
        # All replays of a batch see one view of it.
        view = step // self.replays if self.replays else step
        keys = numerics.example_keys(self.seed, indices, view)
        clean = glimpse.augment(images, keys, self.augmentation)
        if carried is not None:
            crafted = ops.clip(clean + carried, 0.0, 1.0)
        elif self.objective.craft is None:
            return clean, clean
        else:
            settings = {"scale": self.growth(step)} if self.warmup_steps else {}
            crafted = self.objective.craft(
                self._crafting_fn(),
                clean,
                labels,
                numerics.fold_in(keys, 1),
                **settings,
            )
        return clean, ops.stop_gradient(crafted)

    def growth(self, step):
        """The part of epsilon that step `step` has reached."""
        if not self.warmup_steps:
            return 1.0
        done = ops.cast(step, "float32") + 1.0
        return ops.minimum(1.0, done / self.warmup_steps)

    def moved(self, weights, slopes, step):
        """The weights at which step `step` takes its gradient; see `awp`."""
        share = self.config.awp
        if self.awp_from:
            begun = ops.cast(step, "float32") >= self.awp_from
            share = share * ops.cast(begun, "float32")
        return perturbed(weights, slopes, share)

    def _crafting_fn(self):
        training = getattr(self.objective, "train_mode", False)
        # A layer that draws moves its seed, which the loop of an attack may
        # not read.
        draws = model_registry.is_stochastic(self.model)
        if self.crafting_model is None and not training and not draws:
            return lambda x: self.model(x, training=False)
        net = self.crafting_model or self.model
        values = [ops.convert_to_tensor(v) for v in self.model.variables]
        pairs = list(zip(net.variables, values, strict=True))

        def logits_fn(x):
            # Each call by itself, for what one assigns inside the loop of an
            # attack no other may read.
            with keras.StatelessScope(state_mapping=pairs):
                outputs = net(x, training=training)
            return keras.tree.map_structure(
                lambda output: ops.cast(output, "float32"), outputs
            )

        return logits_fn

    def mean_loss(self, clean, crafted, labels):
        """The mean of the objective's losses, and its logits."""
        values, logits = self.objective.loss(
            self.answer, clean, crafted, labels
        )
        return ops.mean(values), logits

    def loss(self, clean, crafted, labels, replicas=1):
        """This replica's share of the loss; the shares add up to the mean.

        Per-example losses are divided by the size of the global batch, for
        functional losses, unlike Keras's `Loss` objects, know nothing of
        replicas; so are the losses of the weights, which each replica has.
        """
        mean, logits = self.mean_loss(clean, crafted, labels)
        predicted = losses.predictions(logits)
        right = ops.equal(predicted, ops.cast(labels, "int32"))
        share = mean + sum(self.model.losses, ops.zeros(()))
        if self.l2:
            share = share + l2_loss(self.kernels, self.l2)
        return share / replicas, ops.sum(ops.cast(right, "float32"))

    def carry(self, carried, slope, step):
        """Takes the step of free training, along the gradient of the images.

        The box is left to `prepare`: the perturbation goes on to other images.
        """
        attack = self.objective.attack
        epsilon = self.growth(step) * attack.epsilon
        direction = numerics.ascent_direction(
            numerics.clean_gradient(slope), attack.norm
        )
        moved = carried + epsilon * direction
        return numerics.project(moved, epsilon, attack.norm)


# --- The backends ------------------------------------------------------------


def _tensorflow_step(run, model, optimizer):
    import tensorflow as tf

    strategy = tf.distribute.get_strategy()
    replicas = strategy.num_replicas_in_sync
    # XLA is for accelerators (on the CPU it runs convolutions three times
    # slower), and cannot compile a step whose variables are mirrored.
    accelerated = any(map(tf.config.list_physical_devices, ("GPU", "TPU")))

    def replica_fn(images, labels, indices, step, *carried):
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        clean, crafted = run.prepare(
            images, labels, indices, step, *carried, replica=replica
        )
        batch = clean, crafted, labels
        moved = _moved_on_replica(run, batch, step, replicas)
        with tf.GradientTape() as tape:
            tape.watch([crafted, *moved])
            with _weights_at(run.movable, moved) as scope:
                loss, right = run.loss(*batch, replicas)
        variables = model.trainable_variables
        at = dict(zip(map(id, run.movable), moved, strict=False))
        points = [at.get(id(v), v) for v in variables]
        extra = [crafted] if carried else []
        grads = tape.gradient(loss, [*points, *extra])
        _keep_updates(scope, model)
        # Keras's optimizer adds the replicas' gradients up.
        optimizer.apply(grads[: len(points)], variables)
        new = [run.carry(*carried, grads[-1], step)] if carried else []
        return [loss, right, *new]

    compiled = True if replicas == 1 and accelerated else None

    @tf.function(autograph=False, jit_compile=compiled)
    def step_fn(*batch):
        loss, right, *carried = strategy.run(replica_fn, args=batch)
        sums = [strategy.reduce("SUM", r, axis=None) for r in (loss, right)]
        parts = map(strategy.experimental_local_results, carried)
        return [*sums, *(tf.concat(part, axis=0) for part in parts)]

    def split(values):
        if replicas == 1:
            return tf.convert_to_tensor(values)
        parts = tf.split(values, replicas)  # Raises if it does not divide.
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


def _moved_on_replica(run, batch, step, replicas):
    """The perturbed tensors, the same on every replica; none without."""
    import tensorflow as tf

    if not run.config.awp:
        return []
    with tf.GradientTape() as tape, keras.StatelessScope():
        share = run.mean_loss(*batch)[0] / replicas
    slopes = tape.gradient(
        share,
        [v.value for v in run.movable],
        unconnected_gradients=tf.UnconnectedGradients.ZERO,
    )
    context = tf.distribute.get_replica_context()
    slopes = context.all_reduce(tf.distribute.ReduceOp.SUM, slopes)
    weights = [tf.convert_to_tensor(v) for v in run.movable]
    return run.moved(weights, slopes, step)


@contextlib.contextmanager
def _weights_at(variables, values):
    """Lets the model compute with other values, if there are any."""
    if not values:
        yield None
        return
    pairs = zip(variables, values, strict=True)
    with keras.StatelessScope(pairs, collect_losses=True) as scope:
        yield scope


def _keep_updates(scope, model):
    """Assigns what a scope has collected of batch statistics and seeds."""
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
    slots = optimizer.variables

    def scope(weight_values, frozen_values):
        values = [*weight_values, *frozen_values]
        pairs = zip([*weights, *frozen], values, strict=True)
        # Without `collect_losses` the losses of activities would be lost.
        return keras.StatelessScope(state_mapping=pairs, collect_losses=True)

    def loss_fn(weight_values, crafted, frozen_values, clean, labels):
        with scope(weight_values, frozen_values) as state:
            loss, right = run.loss(clean, crafted, labels)
        frozen_values = [state.get_current_value(v) for v in frozen]
        return loss, (right, frozen_values)

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
            slopes = jax.grad(mean_loss)(points)
            points = _moved(run, weights, points, slopes, step)
        # The gradient of the images is computed only where it is used.
        places = (0, 1) if carried else (0,)
        (loss, (right, frozen_values)), (grads, *slopes) = jax.value_and_grad(
            loss_fn, argnums=places, has_aux=True
        )(points, crafted, frozen_values, clean, labels)
        weight_values, slot_values = optimizer.stateless_apply(
            slot_values, grads, weight_values
        )
        new = [run.carry(*carried, *slopes, step)] if carried else []
        groups = weight_values, frozen_values, slot_values
        return [loss, right, *new], groups

    def step(images, labels, indices, step, *carried):
        groups = (weights, frozen, slots)
        values = tuple([v.value for v in group] for group in groups)
        step = np.int32(step)
        results, new = step_fn(values, images, labels, indices, step, *carried)
        for group, values in zip(groups, new, strict=True):
            for variable, value in zip(group, values, strict=True):
                variable.assign(value)
        return results

    return step


def _moved(run, weights, values, slopes, step):
    """The values of all weights, perturbed where that is done."""
    moved = run.moved(values, slopes, step)
    movable = {id(v) for v in run.movable}
    found = zip(weights, moved, values, strict=True)
    return [new if id(v) in movable else old for v, new, old in found]


def _torch_step(run, model, optimizer):
    import torch

    def moved_weights(batch, step):
        with keras.StatelessScope():
            mean, _ = run.mean_loss(*batch)
        weights = [v.value for v in run.movable]
        slopes = torch.autograd.grad(
            mean, weights, allow_unused=True, materialize_grads=True
        )
        with torch.no_grad():
            moved = run.moved(weights, slopes, step)
        return [value.requires_grad_(True) for value in moved]

    def step(images, labels, indices, step, *carried):
        images, labels, indices, *carried = (
            ops.convert_to_tensor(v)
            for v in (images, labels, indices, *carried)
        )
        with torch.no_grad():  # Attacks enable what they need themselves.
            clean, crafted = run.prepare(
                images, labels, indices, step, *carried
            )
        if carried:
            crafted.requires_grad_(True)
        batch = clean, crafted, labels
        moved = moved_weights(batch, step) if run.config.awp else []
        with _weights_at(run.movable, moved) as scope:
            loss, right = run.loss(*batch)
        variables = model.trainable_variables
        at = dict(zip(map(id, run.movable), moved, strict=False))
        points = [at.get(id(v), v.value) for v in variables]
        extra = [crafted] if carried else []
        grads = torch.autograd.grad(loss, [*points, *extra])
        new = []
        with torch.no_grad():
            _keep_updates(scope, model)
            optimizer.apply(grads[: len(points)], variables)
            if carried:
                new = [run.carry(*carried, grads[-1], step)]
        return [loss.detach(), right.detach(), *new]

    return step
