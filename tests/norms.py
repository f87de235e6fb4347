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


def check_threat_model(adversarial, images, norm, radius):
    """Asserts that images are within the threat model, and have changed."""
    assert adversarial.dtype == np.float32
    assert adversarial.shape == images.shape
    reach = norm_of(adversarial - images, norm)
    assert np.all(reach <= radius * (1 + 1e-5))
    assert reach.max() > 0.5 * radius
    assert adversarial.min() >= 0 and adversarial.max() <= 1
