"""Check what is in a source distribution and a wheel: python contents.py SDIST WHEEL."""

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SINGLE = ["CHANGELOG.md", "CITATION.cff", "LICENSE", "README.md", "pyproject.toml", "setup.py"]
BUILT = r"perturbed/_C\.[\w-]+\.so"


def tracked(*paths: str) -> set[str]:
    """Return the files of git in folders, or such files."""
    done = subprocess.run(
        ["git", "ls-files", "-z", *paths], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return set(done.stdout.split("\0")) - {""}


def check_sdist(path: str) -> None:
    with tarfile.open(path) as archive:
        names = {n.partition("/")[2] for n in archive.getnames() if not n.endswith("/")}
    wanted = tracked("csrc", "perturbed", "cuda_toolkit.py", *SINGLE)
    assert len(wanted) > 200, "git knows too few files"
    missing = wanted - names
    assert not missing, f"{path} lacks {sorted(missing)}"
    extra = [n for n in names if re.match(r"(tests|bench|docs|build|runs|\.venv)/|.*\.so$", n)]
    assert not extra, f"{path} has {sorted(extra)}"


def check_wheel(path: str) -> None:
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        own = {n for n in names if ".dist-info/" not in n}
        extensions = [n for n in own if re.fullmatch(BUILT, n)]
        assert len(extensions) == 1, f"{path} has the extensions {extensions}"
        assert own - set(extensions) == tracked("perturbed"), (
            f"{path}: {sorted((own - set(extensions)) ^ tracked('perturbed'))} differ from git"
        )
        code = archive.read(extensions[0])
        info = next(n for n in names if n.endswith(".dist-info/METADATA"))
        metadata = archive.read(info).decode()
    assert "perturbed/py.typed" in own
    assert "perturbed/_C.pyi" in own
    assert any(n.endswith(".dist-info/licenses/LICENSE") for n in names), f"{path}: no licence"
    for field in ("Requires-Python: >=3.10", "Requires-Dist: torch>=2.11", "License-Expression"):
        assert field in metadata, f"{path}: METADATA lacks {field!r}"
    # Where it was compiled: the folder itself, or the temporary one of a build from the sdist.
    for folder in (str(ROOT), "/tmp/", str(Path.home()) + "/"):
        place = re.search(re.escape(folder.encode()) + rb"[\w./-]*", code)
        assert place is None, f"{extensions[0]} names {place[0].decode()}"
    assert b"csrc/schema.cpp" in code, "errors do not name their source file"


if __name__ == "__main__":
    check_sdist(sys.argv[1])
    check_wheel(sys.argv[2])
    print(
        *(f"check-wheel: {Path(p).name} {Path(p).stat().st_size:,} bytes" for p in sys.argv[1:]),
        sep="\n",
    )
