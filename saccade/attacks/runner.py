"""Runs an attack on many examples, in chunks of steps.

`base.Attack` defines rounds and steps. This module runs them on
batches that are formed again after every chunk: an example on which the attack
has succeeded, confirmed by a forward pass in float32, leaves the batch. That
does not change any result, because attacks treat examples independently and a
success is final (`keep="first"`).

The state between two chunks is a dict of NumPy arrays with one row for each
example, so that an evaluation can save it to a file and resume from it.
"""

import dataclasses
import functools
import weakref
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeAlias

import keras
import numpy as np
from keras import ops

from saccade.attacks import losses
from saccade.attacks.base import Attack
from saccade.attacks.losses import Outputs, State
from saccade.core import compilation, devices, gradients
from saccade.core.arrays import Tensor
from saccade.models import inspect as model_inspect

# The state of an attack in NumPy, as the runner keeps it between chunks.
Rows: TypeAlias = dict[str, Any]
# Images, labels and targets (or None) to booleans: which attacks succeed.
Confirm: TypeAlias = Callable[
    [np.ndarray, np.ndarray, np.ndarray | None], np.ndarray
]
# Compiled functions by model. They hold no strong reference to the model.
_COMPILED: weakref.WeakKeyDictionary[keras.Model, dict[Hashable, Any]] = (
    weakref.WeakKeyDictionary()
)
# Entries of a state that no step changes, so that they are not copied back.
_CONSTANT = ("images", "labels", "keys", "targets")
_MAX_CHUNK = 25  # In steps.
# The round index of the noise with which a stochastic model is evaluated.
_VERDICT_ROUND = 2**20


@dataclasses.dataclass(frozen=True)
class Reading:
    """How the logits of a model are computed.

    Attributes:
        draws: Number of draws of a stochastic model (expectation over
            transformation): predictions use the mean of their logits, and
            gradients the mean of their losses. None: the model is
            deterministic.
        read_outs: `"last"`, or `"all"` for the mean loss over all read-out
            steps of a recurrent model. Predictions always use the last one.
        shown: Whether to also return the model's attention.
        seed: Seed of a stochastic model's noise.
    """

    draws: int | None = None
    read_outs: str = "last"
    shown: bool = False
    seed: int = 0


class _LogitsFn:
    """A `logits_fn` of a model, with the noise of one round and step."""

    def __init__(
        self,
        model: keras.Model,
        generators: list[keras.random.SeedGenerator],
        reading: Reading,
        noise: tuple[Tensor, Tensor] = (_VERDICT_ROUND, 0),
    ) -> None:
        self.model, self.generators = model, generators
        self.reading, self.noise = reading, noise

    def at_step(
        self, round_index: int | Tensor, step_index: int | Tensor
    ) -> "_LogitsFn":
        """See `base.at_step`."""
        return _LogitsFn(
            self.model, self.generators, self.reading, (round_index, step_index)
        )

    def __call__(self, images: Tensor) -> Tensor | Outputs:
        reading = self.reading
        if reading.draws is None:
            return self._outputs(images)
        round_index, step_index = (ops.cast(n, "int32") for n in self.noise)
        # The factor is a prime above any number of steps; the sum may wrap.
        model_inspect.key_generators(
            self.generators, reading.seed, round_index * 100_003 + step_index
        )
        # One call for each draw: a layer may draw once for the whole batch.
        outputs = [
            losses.outputs_of(self._outputs(images))
            for _ in range(reading.draws)
        ]
        stacked = ops.stack([o.logits for o in outputs], axis=1)
        head_logits = [
            ops.expand_dims(o.logits, 1)
            if o.head_logits is None
            else o.head_logits
            for o in outputs
        ]
        shown = {
            key: sum(o.shown[key] for o in outputs) / len(outputs)
            for key in outputs[0].shown
        }
        return losses.Outputs(
            ops.mean(stacked, axis=1),
            ops.concatenate(head_logits, axis=1),
            shown,
        )

    def _outputs(self, images: Tensor) -> Tensor | Outputs:
        reading = self.reading
        values = self.model(images, training=False)
        if not isinstance(values, dict):
            return ops.cast(values, "float32")
        values = {k: ops.cast(v, "float32") for k, v in values.items()}
        logits = values.pop("logits")
        steps = values.pop("step_logits", None)
        return losses.Outputs(
            logits,
            steps if reading.read_outs == "all" else None,
            values if reading.shown else {},
        )


def compiled(
    model: keras.Model,
    key: Hashable,
    make: Callable[[_LogitsFn], Callable[..., Any]],
    reading: Reading | None = None,
) -> Callable[..., Any]:
    """Returns the compiled function `key` of a model.

    It is compiled at the first call and reused afterwards.

    Args:
        model: The model.
        key: Hashable name of the function.
        make: Callable that takes a `logits_fn` and returns the function.
        reading: A `Reading`; by default that of a deterministic model.
    """
    reading = reading or Reading()
    functions = _COMPILED.setdefault(model, {})
    # The read-out step is fixed when a function is traced.
    key = (key, model_inspect.read_out(model), devices.count())
    if (key, reading) not in functions:
        if reading.shown or reading.read_outs == "all":
            read = model_inspect.shown(model)
        else:
            # A closure over the model would keep it alive: `_COMPILED` holds
            # the function.
            reference = weakref.ref(model)

            def read(images: Tensor, training: bool) -> Tensor:
                return reference()(  # type: ignore[misc]  # Alive in a call.
                    images, training=training
                )

        if model_inspect.computes_in_float16(model):
            read = _without_underflow(read)
        found = model_inspect.generators(model)
        functions[key, reading] = compilation.compile_call(
            make(_LogitsFn(read, found, reading)), model.variables, rows=True
        )
    return functions[key, reading]


def _without_underflow(read: Callable[..., Any]) -> Callable[..., Any]:
    def scaled(images: Tensor, training: bool) -> Tensor:
        fn = functools.partial(read, training=training)
        return gradients.without_underflow(fn)(images)

    return scaled


def logits(
    model: keras.Model,
    images: np.ndarray,
    size: int,
    reading: Reading | None = None,
) -> np.ndarray:
    """Returns logits in float32 NumPy, with `size` images in a batch."""
    reading = dataclasses.replace(
        reading or Reading(), read_outs="last", shown=False
    )
    forward = compiled(
        model,
        "logits",
        lambda fn: lambda x: losses.outputs_of(fn(x)).logits,
        reading,
    )
    parts = [
        ops.convert_to_numpy(forward(pad(images[i : i + size], size)))[
            : len(images[i : i + size])
        ]
        for i in range(0, len(images), size)
    ]
    return np.concatenate(parts).astype("float32")


def pad(values: np.ndarray, size: int) -> np.ndarray:
    """Repeats the last row until the batch has a size of `row_count`.

    Args:
        values: Array of 1 to `size` rows.
        size: The largest batch size.

    Returns:
        Array of `compilation.row_count` rows, of which the first are `values`.
    """
    missing = compilation.row_count(len(values), size) - len(values)
    if not missing:
        return values
    return np.concatenate([values, np.repeat(values[-1:], missing, axis=0)])


class Crafter:
    """Runs one attack on one model.

    Each method of the attack (`open`, `begin`, ...) is compiled separately.

    Args:
        model: The model on which images are crafted: the attacked model, or a
            surrogate of it.
        attack: A `base.Attack` that is not an ensemble.
        reading: A `Reading`.
        size: The largest batch size.
        confirm: Callable from images, labels and targets (or None) to booleans:
            whether the attack succeeds on the attacked model.
    """

    def __init__(
        self,
        model: keras.Model,
        attack: Attack,
        reading: Reading,
        size: int,
        confirm: Confirm,
    ) -> None:
        self.model, self.attack, self.size = model, attack, size
        self.confirm = confirm
        self.reading = dataclasses.replace(
            reading, shown=bool(getattr(attack, "distraction", 0))
        )
        runtime = {*attack.RUNTIME_PARAMETERS, "step_size"}
        self.key = (
            type(attack),
            *(
                (field.name, getattr(attack, field.name))
                for field in dataclasses.fields(attack)
                if field.name not in runtime
            ),
        )

    def run(
        self,
        rows: Rows,
        saved: Rows | None = None,
        save: Callable[[Rows], Any] | None = None,
    ) -> Rows:
        """Runs the whole attack.

        Args:
            rows: Dict of arrays: "images", "labels", "keys", and "targets" if
                the attack is targeted.
            saved: Optional state to resume from: an argument of `save`.
            save: Callable that takes a dict of arrays, called between chunks.

        Returns:
            The final state, a dict of arrays, with "best" and "success".
        """
        if saved is not None:
            state = {k: v for k, v in saved.items() if not k.startswith("at_")}
            first_round = int(saved["at_round"])
            first = int(saved["at_step"])
        else:
            # A negative step means that the round has not begun.
            state, first_round, first = dict(rows), 0, -1
            all_rows = np.arange(len(rows["labels"]))
            self.apply("open", state, all_rows)
            self._confirm_successes(state, all_rows)
        total = int(self.attack.steps_a_round)
        for round_index in range(first_round, int(self.attack.rounds)):
            if first < 0:
                self.apply("begin", state, self._remaining(state), round_index)
                first = 0
            while first < total and len(active := self._remaining(state)):
                count = min(_chunk(first), total - first)
                self.apply("advance", state, active, round_index, first, count)
                self._confirm_successes(state, active)
                first += count
                if save is not None and first < total:
                    save({**state, "at_round": round_index, "at_step": first})
            active = self._remaining(state)
            self.apply("end", state, active, round_index)
            self._confirm_successes(state, active)
            first = -1
            if save is not None:
                save({**state, "at_round": round_index + 1, "at_step": first})
        return state

    def _remaining(self, state: Rows) -> np.ndarray:
        """Rows still to attack; all rows if the attack keeps the best."""
        if self.attack.keep == "best":
            return np.arange(len(state["labels"]))
        return np.flatnonzero(~state["success"])

    def _confirm_successes(self, state: Rows, active: np.ndarray) -> None:
        """Clears each success among `active` that `confirm` rejects."""
        if self.attack.keep == "best":
            return
        succeeded = active[state["success"][active]]
        if not len(succeeded):
            return
        targets = state.get("targets")
        confirmed = self.confirm(
            state["best"][succeeded],
            state["labels"][succeeded],
            None if targets is None else targets[succeeded],
        )
        unconfirmed = succeeded[~confirmed]
        state["success"][unconfirmed] = False
        state["wrong"][unconfirmed] = False
        state["loss"][unconfirmed] = -np.inf

    def apply(
        self, method: str, state: Rows, active: np.ndarray, *scalars: int
    ) -> None:
        """Runs a method of the attack on some rows, in batches.

        Args:
            method: `"open"`, `"begin"`, `"advance"` or `"end"`.
            state: The state, whose rows are changed in place.
            active: Indices of the rows.
            *scalars: Further arguments of the method, such as the round.
        """
        run = self._compiled(method)
        parameters = self.attack.runtime_parameters()
        for start in range(0, len(active), self.size):
            index = active[start : start + self.size]
            take = pad(index, self.size)
            batch = {k: v[take] for k, v in state.items()}
            for name, value in run(batch, parameters, *scalars).items():
                value = ops.convert_to_numpy(value)[: len(index)]
                if name not in state:
                    shape = (len(state["labels"]), *value.shape[1:])
                    state[name] = np.zeros(shape, value.dtype)
                state[name][index] = value

    def _compiled(self, method: str) -> Callable[..., Any]:
        attack = self.attack

        def make(logits_fn: _LogitsFn) -> Callable[..., Any]:
            def open_rows(rows: State, parameters: Mapping[str, Any]) -> State:
                state = attack.bind(parameters).open(
                    logits_fn.at_step(_VERDICT_ROUND - 1, 0),
                    rows["images"],
                    rows["labels"],
                    rows["keys"],
                    rows.get("targets"),
                )
                return {k: v for k, v in state.items() if k not in _CONSTANT}

            def run_method(
                rows: State, parameters: Mapping[str, Any], *scalars: Tensor
            ) -> State:
                bound = attack.bind(parameters)
                if method == "advance":
                    state = bound.advance(logits_fn, rows, *scalars)
                else:
                    step_index = (
                        0 if method == "begin" else attack.steps_a_round
                    )
                    fn = logits_fn.at_step(scalars[0], step_index)
                    state = getattr(bound, method)(fn, rows, *scalars)
                return {
                    k: v
                    for k, v in state.items()
                    if k not in _CONSTANT and not k.startswith("clean_")
                }

            return open_rows if method == "open" else run_method

        return compiled(self.model, (method, self.key), make, self.reading)


def _chunk(first: int) -> int:
    """The number of steps in the chunk that starts at step `first`.

    Most examples are misclassified after few steps, so that the first chunks
    are short.
    """
    return min(max(2, first // 2), _MAX_CHUNK)
