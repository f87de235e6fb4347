"""The settings of attacks, each declared once.

The attacks, the adversarial training and the flags of both programs share
them. Defaults differ: they belong to the fields of each attack.
"""

from saccade.core.settings import Setting

NORM = Setting(
    "Norm that bounds the perturbation.",
    choices=("linf", "l2", "l1"),
)
EPSILON = Setting(
    "Largest norm of the perturbation, for pixels in [0, 1].",
    ratio=True,
)
STEPS = Setting("Gradient steps of the attack.", word="{}steps")
RESTARTS = Setting(
    "Number of random starts; an attack succeeds if any start does.",
    word="{}restarts",
)
STEP_SIZE = Setting(
    "Step size, in the units of the radius.",
    ratio=True,
    word="step{}",
)
STEP_RULE = Setting(
    "Rule of the step size.",
    "fixed",
    choices={
        "fixed": "",
        "at_least": "no shorter than epsilon / steps",
        "decayed": "divided by 10 after half of the steps, and by 100 in the "
        "last quarter",
    },
    word="{}",
)
MOMENTUM = Setting(
    "Momentum of the gradients of the attack.", "0, and 1 for mim"
)
RANDOM_START = Setting(
    "Probability that the attack starts at a random point within epsilon of "
    "the image.",
    "that of the attack, 1 for pgd",
    word="start{}",
)
KEEP = Setting(
    "Iterate that the attack returns.",
    "first, and last with --eot",
    choices={
        "first": "the first one that succeeds",
        "best": "the one of highest loss",
        "last": "",
    },
    word="{}_iterate",
)
LOSS = Setting(
    "Loss that the attack ascends.",
    "that of the attack, cross_entropy for pgd",
    choices=("cross_entropy", "margin", "dlr"),
    word="{}",
)
L1_FRACTION = Setting(
    "Fraction of the coordinates that an L1 step changes, in (0, 1].",
    "0.01",
    word="fraction{}",
)
SAMPLES = Setting(
    "Number of random directions in a gradient estimate of spsa.",
    "4096",
    minimum=1,
    word="{}samples",
)
QUERIES = Setting(
    "Number of queries of square for each image.",
    "5000",
    minimum=1,
    flag="queries",
    word="{}queries",
)
DISTRACTION = Setting(
    "Weight of the distance by which the attention moves; the distance is "
    "added to the loss of the attack.",
    "0",
)
VERSION = Setting(
    "Version of autoattack.",
    "standard",
    choices={"standard": "", "plus": "", "rand": "for stochastic models"},
    word="{}",
)
# --- Of an evaluation and of a training step ---------------------------------

TARGET = Setting(
    "Target class of the attack.",
    "none",
    choices=("none", "random", "next", "least_likely"),
    word="target_{}",
)
NUM_EXAMPLES = Setting(
    "Number of images, drawn at random from the split.",
    "all",
    word="{}images",
)
INDICES = Setting(
    "Indices of the images in the split.",
    "those of --num_examples",
    flag="examples",
    word="list_of_{}",
)
EOT = Setting(
    "Number of random draws of a stochastic model to average (expectation "
    "over transformation); stochastic models require it.",
    "none",
    word="eot{}",
)
READ_OUTS = Setting(
    "Read-out steps of a recurrent model that are attacked.",
    choices=("last", "all"),
    word="{}_read_outs",
)
CRAFT_DTYPE = Setting(
    "Data type in which the model computes while images are crafted.",
    choices=("float32", "bfloat16"),
    word="{}",
)
