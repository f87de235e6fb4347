"""A second process that owns a folder, for the tests of locks."""

import contextlib
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


@contextlib.contextmanager
def owning(path):
    """Starts a process that owns a folder; it is killed at the end.

    Yields:
        The `subprocess.Popen`.
    """
    script = (
        "import time\nfrom saccade.core import run_folder\n"
        f"with run_folder.own({str(path)!r}):\n"
        "    print('mine', flush=True)\n"
        "    time.sleep(600)\n"
    )
    command = [sys.executable, "-c", script]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout.readline() == "mine\n"
            yield process
        finally:
            process.kill()
