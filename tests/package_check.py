"""The package as a stranger gets it: ``python tests/package_check.py`` builds a wheel and an sdist and tries the wheel.

Builds both in an isolated environment, looks at what is in them, installs the wheel and the pins of constraints.txt into an empty environment,
and there runs the demo from another directory, a type checker over a file that uses gradloc, and the wheel made from the sdist.
Takes several minutes and asks the package registry, so that it isn't part of the tests; `make package` runs it.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
import textwrap
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
IN_SDIST = {
    "CHANGELOG.md", "LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "constraints-lowest.txt", "constraints.txt", "examples", "gradloc",
    "gradloc.egg-info", "pyproject.toml", "setup.cfg",
}  # fmt: skip
"""What lies at an sdist's top; tests, documentation and benchmarks are in the repository."""
USES_TYPES = textwrap.dedent(
    """
    import gradloc

    run: gradloc.Run = gradloc.load_run("runs/a")
    masks: gradloc.MaskSet = gradloc.find_masks(run, density=0.5)
    kept: float = masks.density
    gradloc.load_run(1.5)  # type: ignore[arg-type]
    masks.nothing  # type: ignore[attr-defined]
    """
)
"""Where a type weren't seen, its ``ignore`` would be unused, which strict mypy refuses."""


def said(*command: str | Path, cwd: Path) -> str:
    """What a command prints; its error ends the check."""
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(
            f"{' '.join(map(str, command))} exited {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        )
    return done.stdout


def sources() -> set[str]:
    """Files of the package that belong into a wheel."""
    return {
        str(path.relative_to(ROOT)) for path in (ROOT / "gradloc").rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }  # fmt: skip


def check_contents(wheel: Path, sdist: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        packed = {name for name in opened.namelist() if ".dist-info/" not in name}
    assert packed == sources(), f"wheel: {sorted(packed ^ sources())}"
    with tarfile.open(sdist) as opened_tar:
        names = {name.split("/", 1)[1] for name in opened_tar.getnames() if "/" in name}
    top = {name.split("/")[0] for name in names}
    assert top == IN_SDIST, f"sdist: {sorted(top ^ IN_SDIST)}"
    assert sources() <= names, f"sdist lacks {sorted(sources() - names)}"


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="gradloc-package-") as place:
        folder, elsewhere = Path(place), Path(place) / "elsewhere"
        elsewhere.mkdir()
        print(
            said(sys.executable, "-m", "build", "--outdir", folder / "dist", ROOT, cwd=folder).splitlines()[-1]
        )  # the wheel from the sdist
        (wheel,), (sdist,) = (list((folder / "dist").glob(kind)) for kind in ("*.whl", "*.tar.gz"))
        check_contents(wheel, sdist)
        print(f"wheel {wheel.stat().st_size / 1e3:.0f} kB, sdist {sdist.stat().st_size / 1e3:.0f} kB")
        venv.create(folder / "empty", with_pip=True)
        python, install = (
            folder / "empty/bin/python",
            ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", ROOT / "constraints.txt"),
        )
        said(python, *install, wheel, cwd=elsewhere)
        where = said(python, "-c", "import gradloc; print(gradloc.__file__)", cwd=elsewhere).strip()
        assert where.startswith(str(folder / "empty")), where
        print("\n".join(said(folder / "empty/bin/gradloc", "demo", "quick=true", cwd=elsewhere).splitlines()[-12:]))
        assert (elsewhere / "runs/demo/report.html").stat().st_size > 100_000
        said(python, *install, "mypy", "pandas-stubs", cwd=elsewhere)
        (elsewhere / "user.py").write_text(USES_TYPES)
        print(said(python, "-m", "mypy", "--strict", "user.py", cwd=elsewhere).strip())


if __name__ == "__main__":
    main()
