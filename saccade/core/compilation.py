"""Compiles functions on each Keras backend; batch sizes that suit it."""

import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import keras
import numpy as np
from keras import ops

from saccade.core import devices, keras_settings
from saccade.core.arrays import Tensor

keras_settings.set_up_keras()


def concrete(values: Tensor) -> np.ndarray | None:
    """Returns values as a NumPy array, or None inside a compiled function."""
    try:
        return ops.convert_to_numpy(values)
    except (NotImplementedError, TypeError):  # TensorFlow, JAX.
        return None


def keep_compiled(folder: pathlib.Path) -> None:
    """Keeps what JAX compiles in a folder, for later processes.

    The environment variable JAX_COMPILATION_CACHE_DIR, if it is set, names
    another folder. Other backends keep nothing.

    Args:
        folder: The folder, which is made when it is needed.
    """
    if keras.config.backend() != "jax":
        return
    import jax

    if not getattr(jax.config, "jax_compilation_cache_dir", None):
        jax.config.update("jax_compilation_cache_dir", str(folder))


def compile_call(
    fn: Callable[..., Any],
    variables: Iterable[keras.Variable] = (),
    rows: bool = False,
) -> Callable[..., Any]:
    """Compiles an inference function, which leaves all variables unchanged.

    TensorFlow compiles a graph, with XLA only on an accelerator, because on
    the CPU XLA runs convolutional nets several times slower. JAX compiles a
    jit function that takes the variables as arguments. Torch runs the function
    itself, without gradients other than those of `value_and_grad`.

    Args:
        fn: Callable from tensors to a nest of tensors. It may read Keras
            variables. Values that it assigns to them (batch statistics, seed
            states) are visible inside the call and discarded afterwards, so
            that an evaluation does not change the model.
        variables: Every Keras variable that `fn` reads (`model.variables`).
            On JAX, a variable that is not listed keeps its current value.
        rows: Whether every argument other than a scalar has one row for each
            example. TensorFlow without an accelerator then traces once for all
            batch sizes, instead of once for the first and once for the rest.

    Returns:
        Callable with the arguments of `fn`, as NumPy arrays or tensors. It is
        traced once for each combination of shapes and dtypes. TensorFlow
        without an accelerator traces at most twice for all batch sizes.

    Raises:
        NotImplementedError: If the active backend is none of the three.
    """
    backend = keras.config.backend()
    variables = list(variables)

    def stateless(args: tuple) -> Any:
        with keras.StatelessScope():
            return fn(*args)

    if backend == "tensorflow":
        import tensorflow as tf

        on_accelerator = accelerated()
        if rows and devices.count() > 1:
            compiled = _on_replicas(stateless)
        elif rows and not on_accelerator:
            compiled = _for_any_size(stateless)
        else:
            compiled = tf.function(
                stateless,
                autograph=False,
                jit_compile=on_accelerator or None,
                # From the second batch size on, one graph serves all sizes.
                reduce_retracing=not on_accelerator,
            )
    elif backend == "jax":
        import jax

        def pure(values: list, args: tuple) -> Any:
            mapping = list(zip(variables, values, strict=True))
            with keras.StatelessScope(state_mapping=mapping):
                return fn(*args)

        if rows and devices.count() > 1:
            return _on_mesh(pure, variables)
        jitted = jax.jit(pure)

        def compiled(args: tuple) -> Any:
            return jitted([v.value for v in variables], args)

    elif backend == "torch":
        import torch

        compiled = torch.no_grad()(stateless)
    else:
        raise NotImplementedError(
            "Compiled calls need the tensorflow, jax or torch backend. "
            f"Received: keras.config.backend()={backend!r}"
        )
    return lambda *args: compiled(
        keras.tree.map_structure(ops.convert_to_tensor, args)
    )


def _on_mesh(
    fn: Callable[..., Any], variables: list[keras.Variable]
) -> Callable[..., Any]:
    """Compiles a JAX function whose rows are divided among the devices."""
    import jax

    jitted = jax.jit(fn, out_shardings=devices.everywhere())
    # Variables are copied to the devices again only when they have changed.
    copied: tuple[list[Any], list[Any]] = ([], [])

    def call(*args: Any) -> Any:
        nonlocal copied
        values = [v.value for v in variables]
        same = len(values) == len(copied[0]) and all(
            a is b for a, b in zip(values, copied[0], strict=True)
        )
        if not same:
            copied = values, [devices.replicate(value) for value in values]
        placed = keras.tree.map_structure(devices.shard_whole, args)
        found = jitted(copied[1], placed)
        return keras.tree.map_structure(devices.local, found)

    return call


def _on_replicas(fn: Callable[..., Any]) -> Callable[[tuple], Any]:
    """Compiles a TensorFlow function whose rows are divided among replicas."""
    import tensorflow as tf

    strategy = tf.distribute.get_strategy()
    count = strategy.num_replicas_in_sync

    def on_replica(*args: Any) -> Any:
        context = tf.distribute.get_replica_context()
        replica = context.replica_id_in_sync_group

        def part(value: Any) -> Any:
            if not value.shape.rank:
                return value
            size = tf.shape(value)[0] // count
            return value[replica * size : (replica + 1) * size]

        return fn(keras.tree.map_structure(part, args))

    @tf.function(autograph=False, reduce_retracing=True)
    def call(args: tuple) -> Any:
        found = strategy.run(on_replica, args)

        def whole(value: Any) -> Any:
            parts = strategy.experimental_local_results(value)
            if not parts[0].shape.rank:
                return parts[0]
            if devices.process()[1] == 1:
                return tf.concat(parts, axis=0)
            dtype = parts[0].dtype
            if dtype == tf.bool:  # Cannot be gathered.
                value = strategy.run(tf.cast, (value, tf.int32))
            return tf.cast(strategy.gather(value, axis=0), dtype)

        return tf.nest.map_structure(whole, found)

    return call


def _for_any_size(fn: Callable[..., Any]) -> Callable[[tuple], Any]:
    """Compiles a TensorFlow function with one graph for all batch sizes."""
    import tensorflow as tf

    functions = {}

    def spec(value: Any) -> Any:
        if not value.shape.rank:
            return tf.TensorSpec([], value.dtype)
        return tf.TensorSpec([None, *value.shape[1:]], value.dtype)

    def call(args: tuple) -> Any:
        specs = keras.tree.map_structure(spec, args)
        key = repr(specs)
        if key not in functions:
            functions[key] = tf.function(
                fn, autograph=False, input_signature=[specs]
            )
        return functions[key](args)

    return call


def row_count(rows: int, limit: int) -> int:
    """Returns the batch size to which `rows` rows are padded.

    Padding costs time, and so does compiling a new batch size. Where each size
    is compiled, the sizes are `limit` and its repeated halves; elsewhere they
    are multiples of `limit` / 32, since a new size has a small cost too.

    The size is a multiple of `row_multiple` even if `limit` is not. Kernels
    sum in another order for fewer rows, so that the logits of an image would
    depend on the batch size.

    Args:
        rows: The number of rows, from 1 to `limit`.
        limit: The largest batch size.

    Returns:
        Integer from `rows` to `limit`, rounded up to the multiple.
    """
    multiple = row_multiple()
    if _compiles_sizes():
        size = limit
        while size % 2 == 0 and rows <= size // 2 and size > limit // 8:
            size //= 2
    else:
        part = max(1, limit // 32)
        size = min(limit, -(-rows // part) * part)
    return -(-size // multiple) * multiple


def row_multiple() -> int:
    """Returns the number of which every batch size is a multiple.

    It is at least two: a dense layer on a single row is a matrix-vector
    product, which every backend sums in another order than a matrix product.
    Torch needs four, because it also sums the one to three rows beyond a
    multiple of four in another order. Devices that share the rows have equally
    many of them.
    """
    multiple = 4 if keras.config.backend() == "torch" else 2
    return multiple * devices.count()


def _compiles_sizes() -> bool:
    backend = keras.config.backend()
    if backend == "tensorflow":
        return accelerated()
    return backend == "jax"


def accelerated() -> bool:
    """Returns whether TensorFlow has a GPU or a TPU."""
    import tensorflow as tf

    return any(map(tf.config.list_physical_devices, ("GPU", "TPU")))


def fuse(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles a small function as one kernel, on every device.

    It is meant for index arithmetic and gathers. TensorFlow's graph runs them
    operation by operation, which makes the bilinear sampler four times slower
    on two CPU cores. XLA compiles the function inside any graph that calls it.
    JAX compiles the whole step anyway, and Torch has no cheap equivalent.

    Args:
        fn: Callable from tensors to a nest of tensors. It reads no variables.

    Returns:
        Callable with the same arguments and results.
    """
    if keras.config.backend() != "tensorflow":
        return fn
    import tensorflow as tf

    return tf.function(fn, jit_compile=True, autograph=False)
