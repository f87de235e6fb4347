"""The flags of the settings of a training run.

An option is the name of a field of `recipes.Recipe`,
`training_config.StepConfig` or `objectives.AdversarialConfig`. A flag that is
not given keeps the value of the recipe or of the data set's adversarial
training.
"""

from saccade.cli.model_flags import Row

RECIPE = (
    Row(
        "epochs",
        "integer",
        "Passes over the training images. By default the recipe's. The epochs "
        "of learning rate drops, warm-up and read-outs scale with it.",
        1,
    ),
    Row(
        "batch_size",
        "integer",
        "Images in a training step. By default the recipe's.",
        1,
    ),
    Row(
        "optimizer",
        "string",
        "Optimizer: adam or sgd. By default the recipe's.",
    ),
    Row(
        "learning_rate",
        "float",
        "Learning rate that the schedule multiplies. By default the recipe's.",
    ),
    Row(
        "schedule",
        "string",
        "Schedule of the learning rate: steps, cosine, cyclic or constant. By "
        "default the recipe's.",
    ),
    Row(
        "warmup",
        "float",
        "Epochs in which the learning rate rises linearly at the start. By "
        "default the recipe's.",
    ),
    Row("momentum", "float", "Momentum of sgd. By default the recipe's."),
    Row(
        "weight_decay",
        "float",
        "Decoupled weight decay of the kernels. By default the recipe's.",
    ),
    Row(
        "l2",
        "float",
        "Coefficient of the L2 loss on the kernels of convolutions and dense "
        "layers. By default the recipe's.",
    ),
    Row(
        "ema",
        "float",
        "Momentum of a running average of the weights, which is validated and "
        "saved; 0 for no average. By default the recipe's.",
    ),
    Row(
        "label_smoothing",
        "float",
        "Part of each label that is spread over all classes, in [0, 1). By "
        "default the recipe's.",
    ),
)
AUGMENTATION = (
    Row(
        "augmentation",
        "string",
        "Augmentation of the training images: none, photographs (flips and "
        "crops of 300/320), small_photographs (30/32), strong_photographs "
        "(0.6), resized_crops (8 to 100% of the area), digits (crops and "
        "rotations up to 45 degrees) or upright_digits (up to 15). By default "
        "the recipe's.",
    ),
)


def _adversarial(option, *row):
    """Returns a row whose flag begins with `adv_`."""
    return Row(option, *row, flag=f"adv_{option}")


STEP = (
    _adversarial(
        "epsilon_warmup",
        "float",
        "Epochs in which the radius grows linearly from 0 to --adv_epsilon. "
        "By default 0.",
    ),
    _adversarial(
        "craft_dtype",
        "string",
        "Dtype in which the model computes while images are crafted: float32 "
        "or bfloat16. By default float32.",
    ),
    _adversarial(
        "awp",
        "float",
        "Size of the adversarial weight perturbation relative to each weight "
        "tensor (in the paper 0.01, and 0.005 with trades). By default 0: no "
        "perturbation.",
    ),
    _adversarial(
        "awp_warmup",
        "float",
        "Epochs before the weight perturbation begins. By default 0.",
    ),
    _adversarial(
        "replays",
        "integer",
        "Free adversarial training: number of times that each batch is "
        "repeated; the epochs are divided by it. By default 0: no free "
        "training.",
    ),
)
OBJECTIVE = (
    _adversarial(
        "objective",
        "string",
        "Objective: madry, fast, trades, mart, alp, llr or noise; implies "
        "--adv_train=1. By default madry.",
    ),
    _adversarial(
        "weight",
        "float",
        "Weight of the second term of trades, mart, alp or llr. By default "
        "that of its paper: 6, 5, 0.5 and 4.",
    ),
    _adversarial(
        "slope_weight",
        "float",
        "Weight of the slope in llr. By default 3, as in the paper.",
    ),
    _adversarial(
        "sigma",
        "string",
        "Standard deviation of the noise of the objective noise, in units of "
        "the pixel range: 0.1 or 8/255, for example. By default the radius of "
        "the data set.",
    ),
    _adversarial(
        "clean_weight",
        "float",
        "Weight of the clean images in the loss of madry, fast and alp, in [0, "
        "1). By default 0, and 0.5 for alp.",
    ),
)
ATTACK = (
    _adversarial(
        "attack",
        "string",
        "Attack: pgd, fgsm, bim, mim or pgd_adam. By default that of the "
        "objective, usually pgd.",
    ),
    _adversarial(
        "norm",
        "string",
        "Norm of the perturbation: linf, l2 or l1. By default linf.",
    ),
    _adversarial(
        "epsilon",
        "string",
        "Largest norm of the perturbation, in units of the pixel range: 0.1 or "
        "8/255, for example. By default that of the data set or the recipe.",
    ),
    _adversarial(
        "epsilon_per_image",
        "boolean",
        "Whether each image draws its own radius, uniformly up to "
        "--adv_epsilon. By default 0.",
    ),
    _adversarial(
        "steps",
        "integer",
        "Gradient steps of the attack. By default that of the data set or the "
        "objective (10 for trades, mart and llr).",
        1,
    ),
    _adversarial(
        "step_size",
        "string",
        "Length of one step, in the units of --adv_epsilon. By default that "
        "of the objective, usually 2.5 * epsilon / steps.",
    ),
    _adversarial(
        "step_rule",
        "string",
        "Rule of the step size: fixed, at_least (no shorter than epsilon / "
        "steps) or decayed. By default fixed.",
    ),
    _adversarial(
        "momentum",
        "float",
        "Momentum of the attack's gradients. By default 0, and 1 for mim.",
    ),
    _adversarial(
        "l1_fraction",
        "float",
        "Part of the coordinates that an L1 step changes, in (0, 1]. By "
        "default 0.01.",
    ),
    _adversarial(
        "random_start",
        "float",
        "Probability that the attack starts at a random point of the norm "
        "ball. By default that of the objective, usually 1.",
    ),
    _adversarial(
        "target",
        "string",
        "Target class of the attack: none, random, next or least_likely. By "
        "default none.",
    ),
    _adversarial(
        "loss",
        "string",
        "Loss that the attack ascends: cross_entropy, margin or dlr. By "
        "default cross_entropy.",
    ),
    _adversarial(
        "train_mode",
        "boolean",
        "Whether the attack sees the model in training mode, with the batch "
        "statistics. By default 0.",
    ),
)
ADVERSARIAL = (*OBJECTIVE, *ATTACK)
