"""Examples run: those of docstrings, and the ``python`` blocks of README.md and of all of docs.

The blocks of a page run in order, as one program. A block that is not meant to run is fenced with
another word (``text``, ``pycon``). An ``output`` block is what the block before it prints: the same
words and whole numbers, and numbers with a point within 10 %, as sums of floats are rounded in
another way by another processor, and a training run makes more of it.
"""

import contextlib
import doctest
import importlib
import io
import pkgutil
import re
from pathlib import Path

import pytest

import perturbed

ROOT = Path(__file__).parent.parent
SLOW = ("llm.md",)  # imports transformers
# Modules whose examples need what is not always installed.
OPTIONAL = {
    "perturbed.rl.gym": "gymnasium",
    "perturbed.rl.gym_lane": "gymnasium",
    "perturbed.rl.mujoco": "mujoco",
}
BLOCK = re.compile(r"^```(python|output)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = [
    page
    for page in [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
    if BLOCK.search(page.read_text())
]
WORD = re.compile(r"-?\d+\.\d+|[^\s\d]+|\d+")


def modules():
    names = [m.name for m in pkgutil.walk_packages(perturbed.__path__, "perturbed.")]
    return ["perturbed", *(n for n in names if not n.endswith(("._C", ".__main__")))]


@pytest.mark.parametrize("name", modules())
def test_docstrings(name):
    if name in OPTIONAL:
        pytest.importorskip(OPTIONAL[name], reason="needs the extra `rl`")
    module = importlib.import_module(name)
    failures, _ = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failures == 0, "see the output above"


@pytest.mark.parametrize(
    "name", ["PerturbedLinear", "PerturbedModel", "NES", "ARS", "PSO", "Dense", "convert", "revert"]
)
def test_what_users_start_from_has_an_example(name):
    examples = doctest.DocTestFinder(recurse=False).find(getattr(perturbed, name), name)
    assert sum(len(example.examples) for example in examples) > 0


def assert_prints(printed, promised, where):
    """Compare what a block printed with the ``output`` block of its page."""
    got, wanted = WORD.findall(printed), WORD.findall(promised)
    same = len(got) == len(wanted) and all(
        float(g) == pytest.approx(float(w), rel=0.1) if "." in w and w[-1].isdigit() else g == w
        for g, w in zip(got, wanted, strict=True)
    )
    assert same, f"{where} promises\n{promised}\nand it prints\n{printed}"


def test_prints_are_compared():
    assert_prints("loss 0.52, 10 of [3, 4]\n", "loss  0.50, 10 of [3, 4]", "here")
    for other in ("loss 0.60, 10 of 3", "loss 0.50, 11 of 3", "los 0.50, 10 of 3", "loss 0.50"):
        with pytest.raises(AssertionError, match="here promises"):
            assert_prints(other, "loss 0.50, 10 of 3", "here")


@pytest.mark.parametrize(
    "page",
    [pytest.param(p, marks=[pytest.mark.slow] * (p.name in SLOW)) for p in PAGES],
    ids=[str(p.relative_to(ROOT)) for p in PAGES],
)
def test_pages(page, tmp_path, monkeypatch):
    """Errors name the page and the line."""
    monkeypatch.chdir(tmp_path)  # what an example writes
    text = page.read_text()
    namespace = {"__name__": "__example__"}
    printed = None
    for block in BLOCK.finditer(text):
        line = text.count("\n", 0, block.start(2))
        if block[1] == "output":
            assert printed is not None, f"{page}:{line}: no block before this output"
            assert_prints(printed, block[2], f"{page}:{line}")
            continue
        code = compile("\n" * line + block[2], str(page), "exec")
        with contextlib.redirect_stdout(io.StringIO()) as stdout:
            exec(code, namespace)
        printed = stdout.getvalue()


def test_the_comparison_names_tests_that_exist_and_one_for_every_yes():
    page = ROOT / "docs" / "comparison.md"
    rows = re.findall(
        r"^\| ([^|]+) \| ([^|]+) \| ([^|]*) \|(?: \w* \|){14}$", page.read_text(), re.M
    )
    assert len(rows) == 50  # each in the form that is checked
    for capability, ours, shown in rows:
        paths = [page.parent / path for path in re.findall(r"\]\(([\w./-]+)\.py\)", shown)]
        missing = [path for path in paths if not path.with_suffix(".py").is_file()]
        assert not missing, capability
        assert paths or not ours.startswith("**yes**") or capability == "PyTorch"


def test_readme_fits_on_two_screens():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 120
    tables = ("|", "`bench/results/")  # and what bench.docs writes above them
    assert max(len(line) for line in lines if not line.startswith(tables)) <= 120
