"""Lp norms in float64 NumPy, the reference for projections and attacks."""

import numpy as np
from keras import ops


def array(x):
    """Returns a tensor of any backend as a NumPy array."""
    return ops.convert_to_numpy(x)


def norm_of(x, norm):
    """Returns the norm of each row, shape `(batch,)`."""
    flat = np.abs(np.asarray(x, "float64")).reshape(len(x), -1)
    return {
        "l1": flat.sum(-1),
        "l2": np.sqrt((flat**2).sum(-1)),
        "linf": flat.max(-1),
    }[norm]
