"""Install the wheel into environments of its own and run README.md there: `python tests/install/environments.py PYTHON ...`.

For each Python there is one environment with the package alone, and on top of it one per extra, with that extra alone. An environment on
top reads the packages below it, so torch is installed once per Python.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.install.build import ROOT, build

WHERE = ROOT / ".venv-install"
SITE = "import sysconfig; print(sysconfig.get_path('purelib'))"
COMMANDS = {
    "": ["--version"],
    "cli": ["compare", "--help"],
    "cli,data,report": ["compare", "--methods=softmax", "--seeds=1", "--max-epochs=1", "--out=runs"],
}
"""A command that has to work with these extras, beside README.md's examples."""


def call(*arguments: str | Path) -> str:
    """Run a command in WHERE, outside the repository's package, and return what it prints.

    Raises:
        SystemExit: It fails; its output is printed.
    """
    done = subprocess.run(
        list(map(str, arguments)), cwd=WHERE, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    if done.returncode:
        print(done.stdout, done.stderr, sep="\n")
        raise SystemExit(f"failed: {' '.join(map(str, arguments))}")
    return done.stdout.strip()


def make(python: str | Path, folder: Path, wheel: Path, extras: str = "", below: Path | None = None) -> Path:
    """The interpreter of a new environment with the wheel and some extras, on top of another environment.

    Args:
        python: The interpreter that makes it.
        folder: Where it is made. An earlier one is removed.
        wheel: The wheel.
        extras: Names separated by commas.
        below: The interpreter of the environment below.
    """
    shutil.rmtree(folder, ignore_errors=True)
    call(python, "-m", "venv", folder)
    found = folder / "bin" / "python"
    if below is not None:
        (Path(call(found, "-c", SITE)) / "below.pth").write_text(call(below, "-c", SITE))
    call(found, "-m", "pip", "install", "--quiet", f"{wheel}[{extras}]" if extras else wheel)
    return found


def check(python: Path, extras: str) -> None:
    """Run README.md's examples, and the command that has to work with these extras."""
    print(f"  {extras or 'no extras'}:", call(python, "-I", ROOT / "tests" / "readme.py").splitlines()[-1], flush=True)
    if extras in COMMANDS:
        call(python, "-I", "-m", "lightning_uq", *COMMANDS[extras])
        print(f"    lightning-uq {' '.join(COMMANDS[extras])}", flush=True)


def runs(python: str) -> bool:
    """Whether an interpreter is there and runs; pyenv has stand-ins for some that do not."""
    found = shutil.which(python)
    return found is not None and subprocess.run([found, "--version"], capture_output=True).returncode == 0


def extras_of(wheel: Path) -> list[str]:
    """The names of a wheel's extras."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_bytes(archive.read(name)).get_all("Provides-Extra", [])


def main(pythons: list[str]) -> None:
    """Check all environments of each Python; the ones on top are removed again."""
    missing = [python for python in pythons if not runs(python)]
    if missing:
        raise SystemExit(
            f"These do not run: {', '.join(missing)}. Choose others: make test-install PYTHONS='python3.11'"
        )
    shutil.rmtree(WHERE / "dist", ignore_errors=True)
    wheel, _ = build(WHERE / "dist")
    for python in pythons:
        print(call(python, "--version"), flush=True)
        bare = make(python, WHERE / Path(python).name / "bare", wheel)
        check(bare, "")
        for extras in [*extras_of(wheel), "cli,data,report"]:
            folder = WHERE / Path(python).name / "extra"
            check(make(python, folder, wheel, extras, bare), extras)
            shutil.rmtree(folder)


if __name__ == "__main__":
    main(sys.argv[1:])
