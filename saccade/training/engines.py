"""How a training step runs on TensorFlow, JAX and Torch.

An engine compiles `step.Step` for the active backend, keeps the state of model
and optimizer on the devices, and returns results that stay there. Nothing waits
for the device between two steps unless the caller fetches a result.
"""

import abc
import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import keras
import numpy as np
import numpy.typing as npt
from keras import ops

from saccade.core import compilation, devices
from saccade.core.arrays import Tensor

if TYPE_CHECKING:
    from saccade.training import step as training_step

# Images, labels and indices of a step, on the devices.
Placed: TypeAlias = tuple[Any, Any, Any]


class Engine(abc.ABC):
    """Runs the steps of one model and optimizer.

    Calling an engine takes one step and leaves the result in the variables of
    model and optimizer. `take` is for loops: after it the variables are invalid
    until `write_back`.
    """

    def __init__(
        self,
        run: "training_step.Step",
        model: keras.Model,
        optimizer: keras.optimizers.Optimizer,
    ) -> None:
        self.run, self.model, self.optimizer = run, model, optimizer

    def __call__(
        self,
        images: npt.ArrayLike,
        labels: npt.ArrayLike,
        indices: npt.ArrayLike,
        step: int,
        *carried: Tensor,
    ) -> list[Tensor]:
        """Takes one step; see `step.make_step`."""
        batch = self.place(images, labels, indices)
        loss, correct, *new = self.take([batch], step, *carried)
        self.write_back()
        return [loss[0], correct[0], *new]

    def place(
        self,
        images: npt.ArrayLike,
        labels: npt.ArrayLike,
        indices: npt.ArrayLike,
    ) -> Placed:
        """Starts to copy a batch to the devices, each with its part of it.

        Args:
            images: float32 in [0, 1] or uint8, `(k, height, width, channels)`.
                With several hosts these are the rows of this host.
            labels: Integers of shape `(k,)`.
            indices: Integers of shape `(k,)`.
        """
        return self._rows(images), self._rows(labels), self._rows(indices)

    @abc.abstractmethod
    def _rows(self, values: npt.ArrayLike) -> Tensor:
        """Starts to copy rows to the devices."""

    @abc.abstractmethod
    def take(
        self, batches: Sequence[Placed], step: int, *carried: Tensor
    ) -> list[Tensor]:
        """Takes one step for each batch, all of them in one call.

        Args:
            batches: What `place` returned, one for each step.
            step: Number of the first step.
            *carried: The perturbation of free training, for one batch only.

        Returns:
            List of the losses, `(len(batches),)`, the numbers of correct
            predictions, `(len(batches),)`, and the new perturbation if there
            is one. The values may still be being computed.
        """

    def _points(self, values: Sequence[Tensor]) -> list[Tensor]:
        """The weights at which the loss is taken; `values` if perturbed."""
        pairs = zip(self.run.perturbable, values, strict=False)
        value_of = {id(variable): value for variable, value in pairs}
        weights = self.model.trainable_variables
        return [value_of.get(id(v), v.value) for v in weights]

    def write_back(self) -> None:  # noqa: B027 -- Only JAX needs it.
        """Makes the variables of model and optimizer hold the newest state."""

    def fetch(self, values: Sequence[Tensor]) -> list[np.ndarray]:
        """Waits for results and copies them to the host, all at once."""
        return [np.asarray(ops.convert_to_numpy(value)) for value in values]


def engine_class() -> type[Engine]:
    """Returns the engine of the active backend.

    Raises:
        NotImplementedError: If the active backend cannot train.
    """
    engines = {"tensorflow": _TensorFlow, "jax": _Jax, "torch": _Torch}
    backend = keras.config.backend()
    if backend not in engines:
        raise NotImplementedError(
            f"Training needs one of {tuple(engines)}. Received: {backend!r}"
        )
    return engines[backend]


class _TensorFlow(Engine):
    """A `tf.function` under the current distribution strategy."""

    def __init__(self, *args: Any) -> None:
        import tensorflow as tf

        super().__init__(*args)
        self.strategy = tf.distribute.get_strategy()
        self.replicas = self.strategy.num_replicas_in_sync
        # XLA is used on accelerators only: on the CPU it runs convolutions
        # three times slower. It cannot compile updates of mirrored variables,
        # but their reads: with several replicas the attack is compiled, which
        # is most of an adversarial step.
        accelerated = compilation.accelerated()
        compiled = True if self.replicas == 1 and accelerated else None
        if self.replicas > 1 and accelerated:
            self.run.compile_attack = tf.function(
                jit_compile=True, autograph=False
            )
        compile_step = tf.function(autograph=False, jit_compile=compiled)
        self._one = compile_step(self._one_step)
        self._several = compile_step(self._several_steps)

    def take(
        self, batches: Sequence[Placed], step: int, *carried: Tensor
    ) -> list[Tensor]:
        import tensorflow as tf

        number = tf.constant(step, tf.int32)
        if len(batches) > 1:
            return self._several(list(batches), number)
        parts = map(self._rows, carried)
        loss, correct, *new = self._one(*batches[0], number, *parts)
        return [loss[None], correct[None], *new]

    def lowered(self, batch: Placed) -> str:
        """Returns what XLA makes of a step, as text, without running it."""
        import tensorflow as tf

        step = tf.function(self._one_step, autograph=False, jit_compile=True)
        number = tf.constant(0, tf.int32)
        return step.experimental_get_compiler_ir(*batch, number)(stage="hlo")

    def _rows(self, values: npt.ArrayLike) -> Tensor:
        """Hands each replica of this process its part of the rows."""
        import tensorflow as tf

        if self.replicas == 1:
            return tf.convert_to_tensor(values)
        local = self.replicas // devices.process()[1]
        # Raises if the parts differ in size.
        parts = tf.split(values, local)
        return self.strategy.experimental_distribute_values_from_function(
            lambda context: parts[context.replica_id_in_sync_group % local]
        )

    def _one_step(self, *batch: Any) -> list[Tensor]:
        import tensorflow as tf

        loss, correct, *carried = self.strategy.run(self._on_replica, batch)
        sums = [
            self.strategy.reduce("SUM", r, axis=None) for r in (loss, correct)
        ]
        parts = map(self.strategy.experimental_local_results, carried)
        return [*sums, *(tf.concat(part, axis=0) for part in parts)]

    def _several_steps(
        self, batches: list[Placed], step: Tensor
    ) -> list[Tensor]:
        import tensorflow as tf

        count = len(batches)
        if self.replicas > 1:
            # A loop in the graph cannot hold what sums over replicas, so the
            # steps stand one after the other.
            found = [
                self._one_step(*batch, step + number)
                for number, batch in enumerate(batches)
            ]
            return [ops.stack(values) for values in zip(*found, strict=True)]
        stacked = [tf.stack(values) for values in zip(*batches, strict=True)]

        def body(number: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
            batch = [values[number] for values in stacked]
            results = tf.stack(self._one_step(*batch, step + number))
            row = tf.one_hot(number, count)[:, None]
            return number + 1, found + row * results

        _, found = tf.while_loop(
            lambda number, found: number < count,
            body,
            (tf.constant(0), tf.zeros((count, 2))),
            maximum_iterations=count,
        )
        return [found[:, 0], found[:, 1]]

    def _on_replica(
        self,
        images: Tensor,
        labels: Tensor,
        indices: Tensor,
        step: Tensor,
        *carried: Tensor,
    ) -> list[Tensor]:
        import tensorflow as tf

        run, variables = self.run, self.model.trainable_variables
        context = tf.distribute.get_replica_context()
        first = context.replica_id_in_sync_group * run.options.grad_accumulation
        found = [
            self._gradients(part, step, carried, first + number)
            for number, part in enumerate(run.split((images, labels, indices)))
        ]
        loss, correct, *grads = (sum(v) for v in zip(*found, strict=True))
        self.optimizer.apply(
            self._for_optimizer(context, grads[: len(variables)]), variables
        )
        new = [run.carry(carried[0], grads[-1], step)] if carried else []
        return [loss, correct, *new]

    def _gradients(
        self, part: Placed, step: Tensor, carried: tuple, replica: Tensor
    ) -> list[Tensor]:
        """Loss, correct predictions, gradients by weights and by images."""
        import tensorflow as tf

        run = self.run
        images, labels, indices = part
        clean, crafted = run.prepare(
            images, labels, indices, step, _only(carried), replica
        )
        batch = clean, crafted, labels
        values = self._perturbed(batch, step)
        with tf.GradientTape() as tape:
            tape.watch([crafted, *values])
            # Replicas are threads that share the layers, with their lists of
            # losses. A scope belongs to one thread.
            shared = self.replicas > 1
            with _weights_at(run.perturbable, values, shared) as scope:
                shares = self.replicas * run.options.grad_accumulation
                loss, correct = run.loss(*batch, shares, scope)
            scaled = self.optimizer.scale_loss(loss)
        extra = [crafted] if carried else []
        grads = tape.gradient(scaled, [*self._points(values), *extra])
        _keep_updates(scope, self.model)
        return [loss, correct, *grads]

    def _for_optimizer(self, context: Any, grads: list[Tensor]) -> list[Tensor]:
        """The gradients of this replica, which the optimizer sums.

        Clipping needs the norm of the sum. Loss scaling needs the sum too, so
        that all replicas agree on whether it is finite.
        """
        import tensorflow as tf

        scale = loss_scale(self.optimizer)
        if not self.run.options.clip_norm and scale is None:
            return grads
        if self.replicas > 1:
            grads = context.all_reduce(tf.distribute.ReduceOp.SUM, grads)
        grads = self.run.clipped(grads, scale)
        return [grad / self.replicas for grad in grads]

    def _perturbed(self, batch: tuple, step: Tensor) -> list[Tensor]:
        """The perturbed weights, the same on every replica; [] without AWP."""
        import tensorflow as tf

        run = self.run
        if not run.options.config.awp:
            return []
        with tf.GradientTape() as tape, keras.StatelessScope():
            loss = run.mean_loss(*batch)[0] / self.replicas
        grads = tape.gradient(
            loss,
            [v.value for v in run.perturbable],
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        context = tf.distribute.get_replica_context()
        grads = context.all_reduce(tf.distribute.ReduceOp.SUM, grads)
        weights = [tf.convert_to_tensor(v) for v in run.perturbable]
        return run.perturbed_weights(weights, grads, step)


class _Jax(Engine):
    """A jitted function of the state, which stays on the devices.

    The state of model and optimizer is read from the variables once. Each call
    donates its buffers to the next one, so that the variables are invalid until
    `write_back`.
    """

    def __init__(self, *args: Any) -> None:
        import jax

        super().__init__(*args)
        self.groups = (
            self.model.trainable_variables,
            self.model.non_trainable_variables,
            self.optimizer.variables,
        )
        self.state: Any = None
        self._steps = jax.jit(self._take, donate_argnums=(0,))

    def _rows(self, values: npt.ArrayLike) -> Tensor:
        return devices.shard(values)

    def take(
        self, batches: Sequence[Placed], step: int, *carried: Tensor
    ) -> list[Tensor]:
        if self.state is None:
            self.state = self._read()
        carried = tuple(map(self._rows, carried))
        results, self.state = self._steps(
            self.state, tuple(batches), np.int32(step), carried
        )
        return results

    def lowered(self, batch: Placed) -> str:
        """Returns what a step is lowered to for the compiler, as text."""
        state = self.state or self._read()
        step = self._steps.lower(state, (batch,), np.int32(0), ())
        return step.as_text()

    def write_back(self) -> None:
        if self.state is None:
            return
        for group, values in zip(self.groups, self.state, strict=True):
            for variable, value in zip(group, values, strict=True):
                variable.assign(devices.local(value))
        self.state = None

    def fetch(self, values: Sequence[Tensor]) -> list[np.ndarray]:
        import jax

        values = [devices.local(value) for value in values]
        return jax.device_get(values)

    def _read(self) -> tuple[list[Tensor], ...]:
        """The values of all variables, each in buffers of its own."""
        import jax

        seen: set[int] = set()

        def own(value: Tensor) -> Tensor:
            value = devices.replicate(value)
            if id(value) in seen:  # A buffer can be donated once only.
                value = jax.numpy.copy(value)
            seen.add(id(value))
            return value

        return tuple([own(v.value) for v in group] for group in self.groups)

    def _take(
        self,
        state: tuple,
        batches: tuple[Placed, ...],
        step: Tensor,
        carried: tuple,
    ) -> tuple:
        import jax
        from jax import numpy as jnp

        if len(batches) == 1:
            state, results = self._one_step(state, batches[0], step, carried)
            loss, correct, *new = results
            return [loss[None], correct[None], *new], state

        def body(state: tuple, inputs: tuple) -> tuple:
            batch, number = inputs
            return self._one_step(state, batch, number, ())

        stacked = tuple(map(jnp.stack, zip(*batches, strict=True)))
        numbers = step + jnp.arange(len(batches), dtype="int32")
        state, results = jax.lax.scan(body, state, (stacked, numbers))
        return results, state

    def _one_step(
        self, state: tuple, batch: Placed, step: Tensor, carried: tuple
    ) -> tuple:
        run = self.run
        weights, _, slots = state
        frozen, results = self._accumulated(state, batch, step, carried)
        loss, correct, grads, *image_grads = results
        with self._scope(state):
            scale = loss_scale(self.optimizer)
        grads = run.clipped(grads, scale)
        weights, slots = self.optimizer.stateless_apply(slots, grads, weights)
        new = [run.carry(carried[0], image_grads[0], step)] if carried else []
        return (weights, frozen, slots), [loss, correct, *new]

    def _accumulated(
        self, state: tuple, batch: Placed, step: Tensor, carried: tuple
    ) -> tuple:
        """New frozen values, and the sums over the parts of the batch."""
        import jax
        from jax import numpy as jnp

        weights, frozen, slots = state
        parts = self.run.split(batch)
        if len(parts) == 1:
            return self._gradients(state, batch, step, carried, 0)

        def body(carry: tuple, inputs: tuple) -> tuple:
            frozen, sums = carry
            part, number = inputs
            frozen, found = self._gradients(
                (weights, frozen, slots), part, step, (), number
            )
            sums = jax.tree.map(jnp.add, sums, found)
            return (frozen, sums), None

        zeros = (
            jnp.zeros(()),
            jnp.zeros(()),
            jax.tree.map(jnp.zeros_like, weights),
        )
        stacked = tuple(map(jnp.stack, zip(*parts, strict=True)))
        numbers = jnp.arange(len(parts), dtype="int32")
        (frozen, sums), _ = jax.lax.scan(
            body, (frozen, list(zeros)), (stacked, numbers)
        )
        return frozen, sums

    def _scope(self, state: tuple) -> keras.StatelessScope:
        pairs = [
            pair
            for group, values in zip(self.groups, state, strict=True)
            for pair in zip(group, values, strict=True)
        ]
        # Without `collect_losses` activity losses would be dropped.
        return keras.StatelessScope(state_mapping=pairs, collect_losses=True)

    def _gradients(
        self,
        state: tuple,
        part: Placed,
        step: Tensor,
        carried: tuple,
        number: Tensor,
    ) -> tuple:
        """New frozen values; loss, correct predictions and gradients."""
        import jax

        run = self.run
        images, labels, indices = part
        weights, _, slots = state

        def frozen_in(scope: keras.StatelessScope) -> list[Tensor]:
            return [scope.get_current_value(v) for v in self.groups[1]]

        with self._scope(state) as scope:
            clean, crafted = run.prepare(
                images, labels, indices, step, _only(carried), number
            )
        frozen = frozen_in(scope)

        def loss_fn(weights: list[Tensor], crafted: Tensor) -> tuple:
            with self._scope((weights, frozen, slots)) as scope:
                parts = run.options.grad_accumulation
                loss, correct = run.loss(clean, crafted, labels, parts)
                scaled = self.optimizer.scale_loss(loss)
            return scaled, (loss, correct, frozen_in(scope))

        points = weights
        if run.options.config.awp:
            points = self._perturbed(
                (weights, frozen, slots), (clean, crafted, labels), step
            )
        # The gradient by the images is computed only for free training.
        argnums = (0, 1) if carried else (0,)
        grads, (loss, correct, frozen) = jax.grad(
            loss_fn, argnums, has_aux=True
        )(points, crafted)
        return frozen, [loss, correct, *grads]

    def _perturbed(self, state: tuple, batch: tuple, step: Tensor) -> list:
        """The values of all weights, of which some are perturbed."""
        import jax

        run = self.run
        weights, *rest = state

        def mean_loss(weights: list[Tensor]) -> Tensor:
            with self._scope((weights, *rest)):
                return run.mean_loss(*batch)[0]

        grads = jax.grad(mean_loss)(weights)
        moved = run.perturbed_weights(weights, grads, step)
        perturbable = {id(v) for v in run.perturbable}
        found = zip(self.groups[0], moved, weights, strict=True)
        return [new if id(v) in perturbable else old for v, new, old in found]


class _Torch(Engine):
    """Eager operations on one device."""

    def _rows(self, values: npt.ArrayLike) -> Tensor:
        return ops.convert_to_tensor(values)

    def take(
        self, batches: Sequence[Placed], step: int, *carried: Tensor
    ) -> list[Tensor]:
        found = [
            self._one_step(batch, step + number, carried)
            for number, batch in enumerate(batches)
        ]
        losses, correct, *new = zip(*found, strict=True)
        return [ops.stack(losses), ops.stack(correct), *(v[0] for v in new)]

    def _one_step(
        self, batch: Placed, step: int, carried: tuple
    ) -> list[Tensor]:
        import torch

        run, variables = self.run, self.model.trainable_variables
        carried = tuple(map(self._rows, carried))
        found = [
            self._gradients(part, step, carried, number)
            for number, part in enumerate(run.split(batch))
        ]
        loss, correct, *grads = (sum(v) for v in zip(*found, strict=True))
        new = []
        with torch.no_grad():
            scale = loss_scale(self.optimizer)
            clipped = run.clipped(grads[: len(variables)], scale)
            self.optimizer.apply(clipped, variables)
            if carried:
                new = [run.carry(carried[0], grads[-1], step)]
        return [loss.detach(), correct.detach(), *new]

    def _gradients(
        self, part: Placed, step: int, carried: tuple, number: int
    ) -> list[Tensor]:
        import torch

        run = self.run
        images, labels, indices = part
        with torch.no_grad():  # Attacks enable gradients themselves.
            clean, crafted = run.prepare(
                images, labels, indices, step, _only(carried), number
            )
        if carried:
            crafted.requires_grad_(True)
        batch = clean, crafted, labels
        values = self._perturbed(batch, step) if run.options.config.awp else []
        with _weights_at(run.perturbable, values) as scope:
            loss, correct = run.loss(*batch, run.options.grad_accumulation)
        extra = [crafted] if carried else []
        grads = torch.autograd.grad(
            self.optimizer.scale_loss(loss), [*self._points(values), *extra]
        )
        with torch.no_grad():
            _keep_updates(scope, self.model)
        return [loss, correct, *grads]

    def _perturbed(self, batch: tuple, step: int) -> list[Tensor]:
        import torch

        run = self.run
        with keras.StatelessScope():
            mean, _ = run.mean_loss(*batch)
        weights = [v.value for v in run.perturbable]
        grads = torch.autograd.grad(
            mean, weights, allow_unused=True, materialize_grads=True
        )
        with torch.no_grad():
            values = run.perturbed_weights(weights, grads, step)
        return [value.requires_grad_(True) for value in values]


def _only(values: tuple[Tensor, ...]) -> Tensor | None:
    """The single value of a tuple; None if it is empty."""
    return values[0] if values else None


def loss_scale(optimizer: keras.optimizers.Optimizer) -> Tensor | None:
    """Returns the factor of the loss under float16; None without one."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return ops.convert_to_tensor(optimizer.dynamic_scale)
    return None


@contextlib.contextmanager
def _weights_at(
    variables: Sequence[keras.Variable],
    values: Sequence[Tensor],
    always: bool = False,
) -> Iterator[keras.StatelessScope | None]:
    """Makes the model compute with `values`; [] changes nothing.

    A scope keeps the updates of the variables and the losses of the layers;
    with `always` there is one even for [].
    """
    if not values and not always:
        yield None
        return
    pairs = zip(variables, values, strict=True) if values else ()
    with keras.StatelessScope(pairs, collect_losses=True) as scope:
        yield scope


def _keep_updates(
    scope: keras.StatelessScope | None, model: keras.Model
) -> None:
    """Assigns the batch statistics and seed states that a scope collected."""
    if scope is None:
        return
    for variable in model.non_trainable_variables:
        value = scope.get_current_value(variable)
        if value is not None:
            variable.assign(value)
