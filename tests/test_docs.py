"""Examples run: those of docstrings, and the ``python`` blocks of README.md and docs/*.md.

The blocks of a page run in order, as one program. A block that is not meant to run is fenced with
another word (``text``, ``pycon``).
"""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import perturbed

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("README.md"), *sorted(ROOT.glob("docs/*.md"))]
# Modules whose examples need what is not always installed.
OPTIONAL = {
    "perturbed.rl.gym": "gymnasium",
    "perturbed.rl.gym_lane": "gymnasium",
    "perturbed.rl.mujoco": "mujoco",
}
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages(page, tmp_path, monkeypatch):
    """Errors name the page and the line."""
    monkeypatch.chdir(tmp_path)  # what an example writes
    text = page.read_text()
    namespace = {"__name__": "__example__"}
    for block in BLOCK.finditer(text):
        line = text.count("\n", 0, block.start(1))
        code = compile("\n" * line + block[1], str(page), "exec")
        exec(code, namespace)
