"""The contract holds on one device, which is what most users have.

The other tests run on eight virtual devices, where leaves stay apart because joined
ones would be gathered. A process has one number of devices, so this starts another.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("one_device.py")
TIMEOUT = 900  # seconds; it needs 60 on one core


@pytest.mark.thorough
def test_the_contract_holds_on_one_device():
    # Of the clips those of `table.KINDS`: one device differs from eight in the norms.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, str(SCRIPT)],
        cwd=SCRIPT.parents[2],
        env=os.environ | {"OPTAXCLIP_DEVICES": "1", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
