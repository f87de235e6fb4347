"""Runs an attack over many examples in chunks of steps, dropping the fallen.

`attack_rounds.Attack` says what a round and a step are; here they are run on
batches that are packed anew after every chunk: an example whose goal is
reached, and confirmed by the model's own float32 verdict, is not attacked on.
What an example gets does not depend on it, for no attack lets one example see
another, and a success is final (`keep="first"`).

The state between two chunks is a dict of NumPy arrays with one row an example,
so that an evaluation can write it to a file and go on from there.
"""

import dataclasses
import weakref

import numpy as np
from keras import ops

import losses
import model_backbone
import model_registry
import numerics

# Compiled functions by model; none of them keeps its model alive.
_COMPILED = weakref.WeakKeyDictionary()
# Rows of a state that no step changes; they are not copied back.
_FIXED = ("images", "labels", "keys", "targets")
_LONGEST = 25  # Steps of a chunk.
_VERDICT = 2**20  # The round whose noise a stochastic model is judged with.


@dataclasses.dataclass(frozen=True)
class Reading:
    """How a model's answers are read.

    Attributes:
        draws: Draws of a stochastic model whose logits are averaged for the
            verdict and whose losses are averaged for the gradient
            (expectation over transformation); None for a deterministic model.
        read_outs: `"last"`, or `"all"` for the mean loss over every read-out
            step of a recurrent model (the verdict is that of the last).
        shown: Whether to pass on where the model looks.
        seed: Seed of a stochastic model's noise.
    """

    draws: int | None = None
    read_outs: str = "last"
    shown: bool = False
    seed: int = 0


class _LogitsFn:
    """A `logits_fn` on a model, its noise bound to a round and a step."""

    def __init__(self, model, generators, reading, place=(_VERDICT, 0)):
        self.model, self.generators = model, generators
        self.reading, self.place = reading, place

    def at(self, number, index):
        """See `attack_rounds.at`."""
        return _LogitsFn(
            self.model, self.generators, self.reading, (number, index)
        )

    def __call__(self, images):
        reading = self.reading
        if reading.draws is None:
            return self._outputs(images)
        number, index = (ops.cast(n, "int32") for n in self.place)
        # A prime to tell the rounds apart; the sum may wrap.
        model_backbone.key_generators(
            self.generators, reading.seed, number * 100_003 + index
        )
        # One call a draw: a layer may draw once a batch.
        outputs = [
            losses.outputs_of(self._outputs(images))
            for _ in range(reading.draws)
        ]
        stacked = ops.stack([o.logits for o in outputs], axis=1)
        answers = [
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
            ops.mean(stacked, axis=1), ops.concatenate(answers, axis=1), shown
        )

    def _outputs(self, images):
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


def compiled(model, key, make, reading=None):
    """Returns the compiled function `key` of a model, made at first use.

    Args:
        model: The model.
        key: Hashable name of the function.
        make: Callable that takes a `logits_fn` and returns the function.
        reading: A `Reading`; the default is the deterministic one.
    """
    reading = reading or Reading()
    functions = _COMPILED.setdefault(model, {})
    # The read-out step is fixed when a function is traced.
    key = (key, model_registry.read_out(model))
    if (key, reading) not in functions:
        if reading.shown or reading.read_outs == "all":
            read = model_backbone.shown(model)
        else:
            # A closure over the model itself would keep it for ever.
            reference = weakref.ref(model)

            def read(images, training):
                return reference()(images, training=training)

        found = model_backbone.generators(model)
        functions[key, reading] = numerics.compile_call(
            make(_LogitsFn(read, found, reading)), model.variables, rows=True
        )
    return functions[key, reading]


def logits(model, images, size, reading=None):
    """Runs a model over images, `size` at a time; float32 NumPy."""
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


def pad(values, size):
    """Repeats the last row until the batch has a size that is compiled.

    Args:
        values: Array of 1 to `size` rows.
        size: The largest batch size.

    Returns:
        Array of `numerics.row_count` rows, the first of them `values`.
    """
    missing = numerics.row_count(len(values), size) - len(values)
    if not missing:
        return values
    return np.concatenate([values, np.repeat(values[-1:], missing, axis=0)])


class Crafter:
    """One attack on one model, compiled in pieces.

    Args:
        model: The model that is attacked (or a surrogate of it).
        attack: An `attack_rounds.Attack` that is no ensemble.
        reading: A `Reading`.
        size: Most rows of a batch.
        confirm: Callable from images, labels and targets (or None) to whether
            each reaches its goal in the model's own eyes.
    """

    def __init__(self, model, attack, reading, size, confirm):
        self.model, self.attack, self.size = model, attack, size
        self.confirm = confirm
        self.reading = dataclasses.replace(
            reading, shown=bool(getattr(attack, "distraction", 0))
        )
        late = {*attack.RUNTIME_PARAMETERS, "step_size"}
        self.key = (
            type(attack),
            *(
                (field.name, getattr(attack, field.name))
                for field in dataclasses.fields(attack)
                if field.name not in late
            ),
        )

    def run(self, rows, saved=None, save=None):
        """Attacks rows to the end.

        Args:
            rows: Dict of arrays: "images", "labels", "keys", and "targets" if
                the attack is a targeted one.
            saved: Where to go on: what `save` was called with.
            save: Callable of a dict of arrays, called between chunks.

        Returns:
            Dict of arrays: the state, with "best" and "success".
        """
        if saved is not None:
            state = {k: v for k, v in saved.items() if not k.startswith("at_")}
            begun, first = int(saved["at_round"]), int(saved["at_step"])
        else:
            state, begun, first = dict(rows), 0, -1
            everyone = np.arange(len(rows["labels"]))
            self._apply("open", state, everyone)
            self._check(state, everyone)
        total = int(self.attack.steps_a_round)
        for number in range(begun, int(self.attack.rounds)):
            if first < 0:
                self._apply("begin", state, self._alive(state), number)
                first = 0
            while first < total and len(active := self._alive(state)):
                count = min(_chunk(first), total - first)
                self._apply("advance", state, active, number, first, count)
                self._check(state, active)
                first += count
                if save is not None and first < total:
                    save({**state, "at_round": number, "at_step": first})
            active = self._alive(state)
            self._apply("end", state, active, number)
            self._check(state, active)
            first = -1
            if save is not None:
                save({**state, "at_round": number + 1, "at_step": first})
        return state

    def _alive(self, state):
        """Rows to attack on; those that must run to the end are all alive."""
        if self.attack.keep == "best":
            return np.arange(len(state["labels"]))
        return np.flatnonzero(~state["success"])

    def _check(self, state, active):
        """Takes back a success that the verdict does not share."""
        if self.attack.keep == "best":
            return
        fallen = active[state["success"][active]]
        if not len(fallen):
            return
        targets = state.get("targets")
        sure = self.confirm(
            state["best"][fallen],
            state["labels"][fallen],
            None if targets is None else targets[fallen],
        )
        doubted = fallen[~sure]
        state["success"][doubted] = False
        state["wrong"][doubted] = False
        state["loss"][doubted] = -np.inf

    def _apply(self, piece, state, active, *scalars):
        """Runs a compiled piece on some rows, in full batches."""
        run = self._piece(piece)
        numbers = self.attack.numbers()
        for start in range(0, len(active), self.size):
            index = active[start : start + self.size]
            take = pad(index, self.size)
            batch = {k: v[take] for k, v in state.items()}
            for name, value in run(batch, numbers, *scalars).items():
                value = ops.convert_to_numpy(value)[: len(index)]
                if name not in state:
                    shape = (len(state["labels"]), *value.shape[1:])
                    state[name] = np.zeros(shape, value.dtype)
                state[name][index] = value

    def _piece(self, piece):
        attack = self.attack

        def make(logits_fn):
            def opening(rows, numbers):
                state = attack.bind(numbers).open(
                    logits_fn.at(_VERDICT - 1, 0),
                    rows["images"],
                    rows["labels"],
                    rows["keys"],
                    rows.get("targets"),
                )
                return {k: v for k, v in state.items() if k not in _FIXED}

            def later(rows, numbers, *scalars):
                bound = attack.bind(numbers)
                if piece == "advance":
                    state = bound.advance(logits_fn, rows, *scalars)
                else:
                    index = 0 if piece == "begin" else attack.steps_a_round
                    fn = logits_fn.at(scalars[0], index)
                    state = getattr(bound, piece)(fn, rows, *scalars)
                return {
                    k: v
                    for k, v in state.items()
                    if k not in _FIXED and not k.startswith("clean_")
                }

            return opening if piece == "open" else later

        return compiled(self.model, (piece, self.key), make, self.reading)


def _chunk(first):
    """How many steps to take before looking who has fallen.

    Most fall early: the chunks grow with the steps taken.
    """
    return min(max(2, first // 2), _LONGEST)
