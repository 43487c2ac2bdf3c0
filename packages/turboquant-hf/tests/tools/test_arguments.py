"""Wrong arguments of the commands are said before anything is imported that takes seconds."""

import subprocess
import sys

import pytest

CODE = """
import sys
from turboquant_core.cli import main
try:
    main()
except SystemExit as ended:
    print(ended.code, *sys.modules)
"""


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (("plan", "--help"), 0),
        (("plan", "--tensor-parallel", "none"), 2),
        (("plan", "model"), 2),
        (("plan", "model", "--kv-memory", "1", "--json", "/no/such/folder"), 2),
        (("eval", "--help"), 0),
        (("eval", "--tokens", "none"), 2),
        (("eval", "model", "--measure", "taste"), 2),
        (("tune", "model", "--target-bits", "99"), 2),
        (("calibrate", "--tokens", "1"), 2),
        (("demo", "--seed", "1"), 2),
        (("demo", "--json", "/no/such/folder"), 2),
        (("doctor", "--gpus"), 2),
        (("doctor", "--gpu", "H200", "--memory", "80"), 2),
    ],
)
def test_arguments_come_first(arguments, status):
    done = subprocess.run([sys.executable, "-c", CODE, *arguments], capture_output=True, text=True, check=False)
    ended, *modules = done.stdout.splitlines()[-1].split()
    assert int(ended) == status
    assert not {"torch", "transformers", "turboquant_hf"} & set(modules)
