"""Command lines of the tests. Nothing here is a test."""

import os
import pathlib
import subprocess
import sys

from runs import TINY

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIG = f"--config={ROOT / 'configs' / 'digits.py'}"
TINY_FLAGS = [CONFIG, "--config.checkpoint_every=1", *(f"--config.{key}={value}" for key, value in TINY.items())]


def in_a_process(*arguments, **variables):
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | variables
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
