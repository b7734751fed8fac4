"""The build says what is wrong, the module is what it claims to be, and the report is whole."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import perturbed
import perturbed.__main__

ROOT = Path(__file__).resolve().parent.parent


def python(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_import_without_the_extension_tells_the_fix(tmp_path):
    shutil.copytree(
        ROOT / "perturbed",
        tmp_path / "perturbed",
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
    )
    done = python("-c", "import perturbed", cwd=tmp_path)
    assert done.returncode != 0
    message = done.stderr.rpartition("\nImportError: ")[2]
    assert message.startswith("perturbed: the compiled extension is missing"), done.stderr
    assert "\n  pip install --no-build-isolation -e ." in message
    assert "make build" in message


def facts_of(report: str) -> dict[str, str]:
    return dict(re.split(r"  +", line, maxsplit=1) for line in report.splitlines())


def test_environment_report(capsys):
    perturbed.__main__.main()
    facts = facts_of(capsys.readouterr().out)
    build = perturbed._C.build_info()
    assert facts["perturbed"].startswith(f"{perturbed.__version__}, noise contract")
    assert facts["torch"] == torch.__version__
    assert facts["built for"] == "torch 2.11 and newer"
    assert facts["cpu kernels"].split(";")[0] == perturbed._C.cpu_capability()
    assert facts["cuda kernels"].startswith("built in" if build["cuda"] else "not built in")
    assert "device" in facts
    assert build["compiler"] in facts["compiler"]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "portable" else pytest.mark.slow)
        for name in perturbed._C.cpu_capabilities()
    ],
)
def test_forced_cpu_kernels_show_in_the_report_of_the_command(name):
    done = python("-m", "perturbed", PERTURBED_CPU=name)
    assert done.returncode == 0, done.stderr
    assert facts_of(done.stdout)["cpu kernels"].startswith(f"{name}; PERTURBED_CPU")


def test_unknown_cpu_kernels_are_an_error():
    done = python("-c", "import perturbed", PERTURBED_CPU="avx1024")
    assert done.returncode != 0
    assert "PERTURBED_CPU must be one of" in done.stderr
    assert "'avx1024'" in done.stderr


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
def test_extension_needs_only_the_stable_abi_of_torch():
    done = subprocess.run(
        ["nm", "-D", "--undefined-only", "-C", perturbed._C.__file__],
        capture_output=True,
        text=True,
        check=True,
    )
    names = [line.split(maxsplit=1)[-1].removeprefix("U ") for line in done.stdout.splitlines()]
    assert any(name.startswith(("aoti_torch_", "torch_")) for name in names), (
        "nm saw no torch at all"
    )
    unstable = [name for name in names if re.match(r"(\w+ for )?(at|c10|torch)::", name)]
    assert not unstable


def test_one_stable_target_everywhere():
    target = f"TORCH_TARGET_VERSION={perturbed._C.build_info()['torch_target']:#018x}"
    for file in ("setup.py", "tests/check_cuda.sh"):
        assert target in (ROOT / file).read_text(), file


# One process asks for all wishes: most of its time is the import of torch.
WISHES = """
import os, runpy, sys
sys.argv = ["setup.py", "--version"]
for wish in "1", "maybe":
    os.environ["PERTURBED_CUDA"] = wish
    try:
        runpy.run_path("setup.py")
    except SystemExit as error:
        print(wish, error.code, sep=": ")
"""


def test_wishes_for_cuda_that_are_errors():
    done = python("-c", WISHES)
    assert "maybe: perturbed: PERTURBED_CUDA must be 0 or 1, got 'maybe'" in done.stdout, (
        done.stderr
    )
    if torch.version.cuda is None:
        refused = f"1: perturbed: PERTURBED_CUDA=1, but torch {torch.__version__} is a CPU build"
        assert refused in done.stdout


def test_build_without_torch_tells_the_fix(tmp_path):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module\", name='torch')\n")
    done = python("setup.py", "--version", PYTHONPATH=str(tmp_path))
    assert done.returncode != 0
    assert "needs 'torch'" in done.stderr
    assert "pip install --no-build-isolation" in done.stderr


def test_installed_version_matches_the_package():
    text = (ROOT / "pyproject.toml").read_text()
    assert f'\nversion = "{perturbed.__version__}"\n' in text


def test_citation_is_of_this_version():
    text = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {perturbed.__version__}\n" in text
    assert "\nlicense: MIT\n" in text
    assert re.search(r"^cff-version: 1\.2\.0$", text, re.MULTILINE)


def test_extra_of_the_toolkit_names_all_its_packages():
    lines = (ROOT / "pyproject.toml").read_text().partition("\ncuda-build = [")[2].splitlines()
    listed = {line.strip(' ",').partition("==")[0] for line in lines[1 : lines.index("]")]}
    parts = (ROOT / "cuda_toolkit.py").read_text().partition("PARTS = {")[2].partition("}")[0]
    assert listed == set(re.findall(r'"(nvidia-[\w-]+)":', parts))


def test_stub_names_what_the_extension_has():
    tree = ast.parse((ROOT / "perturbed" / "_C.pyi").read_text())
    stub = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert stub == {name for name in vars(perturbed._C) if not name.startswith("__")}
    info = next(node for node in tree.body if isinstance(node, ast.ClassDef))
    fields = {node.target.id: node.annotation.id for node in info.body}
    build = perturbed._C.build_info()
    assert fields == {name: type(value).__name__ for name, value in build.items()}
