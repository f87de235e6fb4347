"""The settings of Keras that every module of the project relies on."""

import keras

# --- Keras's settings ----------------------------------------------------


def set_up_keras() -> None:
    """Sets Keras's image layout, float type and epsilon to the project's.

    Keras reads them from the user's `keras.json`, which may have been written
    for another project. Another image layout changes the network, and float16
    changes the results. This module calls the function when it is imported, as
    does every module that creates layers without importing this one. The
    backend stays the user's choice: `KERAS_BACKEND`, or else `keras.json`.
    """
    keras.config.set_image_data_format("channels_last")
    keras.config.set_floatx("float32")
    keras.config.set_epsilon(1e-7)
    # Keras may have derived its dtype policy from the user's float type.
    if keras.config.dtype_policy().name in ("float16", "float64"):
        keras.config.set_dtype_policy("float32")
