"""The flags of the settings of a training run, by what they override.

An option is the name of a field: of `recipes.Recipe`, of
`training_step.StepConfig`, of `losses.AdversarialConfig`. A flag that is not
given keeps what the recipe, or the data set's adversarial training, has.
"""

from model_flags import Row

RECIPE = (
    Row("epochs", "integer", "Passes over the training images.", 1),
    Row("batch_size", "integer", "Images a training step.", 1),
    Row("optimizer", "string", "adam or sgd."),
    Row("learning_rate", "float", "First rate."),
    Row("schedule", "string", "steps, cosine, cyclic or constant."),
    Row("warmup", "float", "Epochs of linear rise."),
    Row("momentum", "float", "Momentum of sgd."),
    Row("weight_decay", "float", "Decoupled weight decay of kernels."),
    Row(
        "l2",
        "float",
        "L2 loss of the kernels of convolutions and dense layers.",
    ),
    Row("ema", "float", "Momentum of the averaged weights; 0 is none."),
    Row("label_smoothing", "float", "Part of a label that all classes share."),
    Row("augmentation", "string", "Which augmentation; see the README."),
)


def _adversarial(option, *row):
    """A row whose flag begins with `adv_`."""
    return Row(option, *row, flag=f"adv_{option}")


STEP = (
    _adversarial(
        "epsilon_warmup", "float", "Epochs in which epsilon grows from 0."
    ),
    _adversarial(
        "craft_dtype",
        "string",
        "Of the model while crafting: float32, bfloat16.",
    ),
    _adversarial("awp", "float", "Adversarial weight perturbation; 0 is none."),
    _adversarial("awp_warmup", "float", "Epochs before it begins."),
    _adversarial(
        "replays", "integer", "Free training: times each batch is taken."
    ),
)
ADVERSARIAL = (
    _adversarial(
        "objective",
        "string",
        "madry, fast, trades, mart, alp, llr or noise; implies adv_train.",
    ),
    _adversarial("attack", "string", "pgd, fgsm, bim, mim or pgd_adam."),
    _adversarial("norm", "string", "linf, l2 or l1."),
    _adversarial(
        "epsilon", "string", "Radius in units of the pixel range: 8/255, say."
    ),
    _adversarial(
        "epsilon_per_image", "boolean", "Each image draws a radius up to it."
    ),
    _adversarial("steps", "integer", "Gradient steps of the attack.", 1),
    _adversarial(
        "step_size", "string", "Length of one step, in the units of epsilon."
    ),
    _adversarial("step_rule", "string", "fixed, at_least or decayed."),
    _adversarial("momentum", "float", "Of the attack's gradients."),
    _adversarial(
        "l1_fraction", "float", "Part of the coordinates of an L1 step."
    ),
    _adversarial(
        "random_start", "float", "Chance of a random start in the ball."
    ),
    _adversarial("target", "string", "none, random, next or least_likely."),
    _adversarial(
        "loss", "string", "What it ascends: cross_entropy, margin or dlr."
    ),
    _adversarial("train_mode", "boolean", "Attack the model in training mode."),
    _adversarial(
        "clean_weight", "float", "Weight of the clean images, below 1."
    ),
    _adversarial(
        "weight", "float", "Of the second term of trades, mart, alp, llr."
    ),
    _adversarial("slope_weight", "float", "Weight of the slope in llr."),
    _adversarial("sigma", "string", "Standard deviation of noise: 8/255, say."),
)
