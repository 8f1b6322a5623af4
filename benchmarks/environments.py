"""Virtual environments of the peers, made once under `benchmarks/.venvs`.

python benchmarks/environments.py horovod  # make these; without a name, all
"""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
VENVS = HERE / ".venvs"
REQUIREMENTS = HERE / "sides" / "requirements"
_LIMIT_S = 3600


class CannotMakeError(Exception):
    """An environment cannot be made; the message says why."""


@dataclass(frozen=True)
class Environment:
    """A peer's packages.

    Attributes:
        name: of its folder and of its requirements `NAME.txt`. What stands in `NAME.build.txt`
            is compiled afterwards, against the packages that are there then.
        python: the version it needs, such as `"3.7"`; None: that of this interpreter.
        variables: for the installation.
    """

    name: str
    python: str | None = None
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def interpreter(self) -> Path:
        """Its Python."""
        return VENVS / self.name / "bin" / "python"

    def make(self) -> Path:
        """Makes it where it is missing or out of date.

        Returns:
            Its interpreter.

        Raises:
            CannotMakeError: it cannot be made.
        """
        folder, log = VENVS / self.name, VENVS / f"{self.name}.log"
        stamp, wanted = folder / ".ready", self._digest()
        if stamp.exists() and stamp.read_text() == wanted:
            return self.interpreter
        base = find_python(self.python) if self.python else sys.executable
        shutil.rmtree(folder, ignore_errors=True)
        VENVS.mkdir(exist_ok=True)
        pip = [str(self.interpreter), "-m", "pip", "install", "--quiet"]
        print(f"Making {folder.relative_to(HERE.parent)} …", file=sys.stderr, flush=True)
        commands = [
            [base, "-m", "venv", str(folder)],
            # Old packages build with what old versions of setuptools have.
            [*pip, "wheel", "setuptools==65.5.0"],
            [*pip, "--requirement", str(self._file())],
        ]
        if self._file(".build").exists():
            commands.append([*pip, "--no-build-isolation", "-r", str(self._file(".build"))])
        with log.open("w") as output:
            for command in commands:
                self._run(command, output, log)
        stamp.write_text(wanted)
        return self.interpreter

    def _run(self, command: list[str], output, log: Path) -> None:
        environment = {**os.environ, **self.variables}
        # Of the environment that runs this file, and wrong in another.
        for name in ("PYTHONPATH", "PYTHONHOME"):
            environment.pop(name, None)
        try:
            done = subprocess.run(
                command, env=environment, stdout=output, stderr=output, timeout=_LIMIT_S
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise CannotMakeError(f"{self.name}: {error}") from error
        if done.returncode:
            lines = [
                line
                for line in log.read_text(errors="replace").splitlines()
                if line.strip() and not line.startswith("WARNING")
            ]
            end = "\n".join(line[:300] for line in lines[-6:])
            raise CannotMakeError(f"The environment {self.name} cannot be made.\n{end}")

    def _file(self, kind: str = "") -> Path:
        return REQUIREMENTS / f"{self.name}{kind}.txt"

    def _digest(self) -> str:
        texts = [self.python or sys.version]
        texts += [f.read_text() for f in (self._file(), self._file(".build")) if f.exists()]
        return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def find_python(version: str) -> str:
    """An interpreter of that version: `$PYTHON37` for `"3.7"`, on the PATH, or of pyenv.

    Raises:
        CannotMakeError: there is none.
    """
    for path in _candidates(version):
        # On the PATH there may be a shim that only says that the version was not chosen.
        code = "import sys; print('%d.%d' % sys.version_info[:2], sys.executable)"
        try:
            said = subprocess.run([path, "-c", code], capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if said.returncode == 0 and said.stdout.split()[0] == version:
            return said.stdout.split()[1]
    variable = "PYTHON" + version.replace(".", "")
    raise CannotMakeError(
        f"No Python {version} was found on the PATH nor in pyenv. Set {variable} to one."
    )


def _candidates(version: str) -> Iterator[str]:
    chosen = os.environ.get("PYTHON" + version.replace(".", ""))
    if chosen:
        yield chosen
    yield from filter(None, [shutil.which(f"python{version}")])
    root = os.environ.get("PYENV_ROOT") or os.path.expanduser("~/.pyenv")
    yield from sorted(glob.glob(f"{root}/versions/{version}.*/bin/python"), reverse=True)


ENVIRONMENTS = {
    environment.name: environment
    for environment in (
        Environment("multiworker"),
        Environment("elephas"),
        Environment("tensorflowonspark"),
        Environment("spark-tensorflow-distributor"),
        Environment("torch"),
        Environment(
            "horovod",
            variables={
                "HOROVOD_WITH_TENSORFLOW": "1",
                "HOROVOD_WITH_GLOO": "1",
                "HOROVOD_WITHOUT_PYTORCH": "1",
                "HOROVOD_WITHOUT_MXNET": "1",
                "HOROVOD_WITHOUT_MPI": "1",
            },
        ),
        Environment("bigdl", python="3.7"),
    )
}


def main() -> None:
    """Makes those that are named."""
    for name in sys.argv[1:] or ENVIRONMENTS:
        try:
            print(ENVIRONMENTS[name].make())
        except CannotMakeError as error:
            print(error, file=sys.stderr)


if __name__ == "__main__":
    main()
