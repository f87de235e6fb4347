"""Keras in the tests: TensorFlow unless KERAS_BACKEND says otherwise.

The image layout and float type are the project's, also in tests that import
nothing of it.
"""

import gc
import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("MPLBACKEND", "Agg")

from saccade.core import keras_settings  # noqa: E402

keras_settings.set_up_keras()

# The libraries and compiled functions are many objects that live on. With the
# default thresholds, one second in fifteen goes into looking for garbage there.
gc.set_threshold(50_000, 20, 50)
