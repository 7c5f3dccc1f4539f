"""Which environment is made, where it lies, and from what."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Stack:
    """An environment that the set-up can make.

    Attributes:
        folder: Its virtual environment, in the project's folder.
        requirements: The file that lists what is in it.
        mmcv: The distribution that is mmcv there.
        torch: The torch that it gets where none is asked for.
    """

    folder: str
    requirements: str
    mmcv: str
    torch: str


#: Named exactly, as the newest torch may be a CUDA build of several GB where this one has a small
#: CPU build. Where it is not to be had, any torch of the second form does.
DEFAULT_TORCH = 'torch==2.13.0'
FALLBACK_TORCH = 'torch>=2.1'
STACKS = {
    'openmmlab': Stack('.venv', 'requirements.txt', 'mmcv', DEFAULT_TORCH),
    # The maintained forks.
    'onedl': Stack('.venv-onedl', 'requirements-onedl.txt', 'onedl-mmcv', DEFAULT_TORCH),
    # The oldest torch that setup.cfg promises.
    'oldest': Stack('.venv-oldest', 'requirements.txt', 'mmcv', 'torch==2.1.*'),
}
STACK_NAME = os.environ.get('SLOPE_STACK') or 'openmmlab'
if STACK_NAME not in STACKS:
    sys.exit(f'SLOPE_STACK={STACK_NAME} is none of {", ".join(STACKS)}')
STACK = STACKS[STACK_NAME]

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / STACK.folder
PYTHON = VENV / 'bin' / 'python'
STATE = VENV / 'slope-setup.json'
CONSTRAINTS = VENV / 'constraints.txt'
SETUP_LOG = VENV / 'setup.log'
MMCV_LOG = VENV / 'mmcv-build.log'
REQUIREMENTS = ROOT / STACK.requirements
PROOF = ROOT / 'slope_mm' / 'environment' / 'operators.py'


class SetupError(Exception):
    """The set-up cannot go on; the message says why and what to do."""


def requirements() -> list[str]:
    """The requirements of requirements.txt without its comments."""
    lines = (line.partition('#')[0].strip() for line in REQUIREMENTS.read_text().splitlines())
    return [line for line in lines if line]
