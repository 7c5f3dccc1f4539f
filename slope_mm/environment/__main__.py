"""`python -m slope_mm.environment`: print the versions and prove mmcv's operators."""

import subprocess
import sys
from pathlib import Path

from slope_mm.environment import mmcv_build_command, version_table
from slope_mm.errors import EnvironmentProblem


def prove_operators() -> str:
    """Run the proof of mmcv's operators in a process of its own, as wrong ones may crash it.

    Returns:
        One line that says what was proved.

    Raises:
        EnvironmentProblem: The operators do not belong to the installed torch.
    """
    proof = Path(__file__).with_name('operators.py')
    result = subprocess.run([sys.executable, str(proof)], capture_output=True, text=True)
    if result.returncode != 0:
        complaint = result.stderr.strip().splitlines()
        reason = complaint[-1] if complaint else f'the proof ended with {result.returncode}'
        raise EnvironmentProblem(
            f"mmcv's compiled operators do not work with the installed torch ({reason});"
            f' mend it with: {mmcv_build_command()}'
        )
    return result.stdout.strip().splitlines()[-1]


def main() -> int:
    """Print the table; return the exit status."""
    print(version_table(), flush=True)
    try:
        print(f'{"mmcv operators":<16}{prove_operators()}')
    except EnvironmentProblem as problem:
        print(problem, file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
