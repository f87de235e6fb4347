"""Logical devices of the CPU, for scripts that tests start."""

import os


def configure():
    """Makes as many devices as LOGICAL_DEVICES says; call before Keras."""
    count = int(os.environ["LOGICAL_DEVICES"])
    if os.environ["KERAS_BACKEND"] == "tensorflow":
        import tensorflow as tf

        cpu = tf.config.list_physical_devices("CPU")[0]
        one = tf.config.LogicalDeviceConfiguration()
        tf.config.set_logical_device_configuration(cpu, [one] * count)
    else:
        flag = f"--xla_force_host_platform_device_count={count}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
    return count
