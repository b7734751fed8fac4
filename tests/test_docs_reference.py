"""docs/reference has every public name on one page; docstrings name their arguments."""

import importlib
import inspect
import re
from pathlib import Path
from types import ModuleType

PAGES = Path(__file__).parent.parent / "docs" / "reference"
PACKAGES = [
    "perturbed",
    "perturbed._ops",
    "perturbed.checkpoint",
    "perturbed.nn",
    "perturbed.noise",
    "perturbed.optim",
    "perturbed.optim.minimize",
    "perturbed.optim.pso",
    "perturbed.optim.zeroth",
    "perturbed.particles",
    "perturbed.reference",
    "perturbed.rl",
]
NAMES = [
    (name, page.name)
    for page in sorted(PAGES.glob("*.md"))
    for name in re.findall(r"^::: (\S+)", page.read_text(), re.MULTILINE)
]


def resolve(identifier):
    module, _, name = identifier.rpartition(".")
    return getattr(importlib.import_module(module), name)


def test_every_public_name_is_on_one_page():
    pages = {}  # an object has several names: perturbed.NES is perturbed.optim.NES
    for identifier, page in NAMES:
        pages.setdefault(id(resolve(identifier)), []).append(f"{page}: {identifier}")
    assert [where for where in pages.values() if len(where) > 1] == []
    missing = []
    for package in map(importlib.import_module, PACKAGES):
        for name in package.__all__:
            value = getattr(package, name)
            if not isinstance(value, ModuleType) and id(value) not in pages:
                missing.append(f"{package.__name__}.{name}")
    assert missing == [], "write ::: NAME on a page of docs/reference"


def public_functions():
    """Functions, classes and their public methods: pairs of a name and the object."""
    for identifier, _ in NAMES:
        value = resolve(identifier)
        if not isinstance(value, type):
            if inspect.isfunction(value):
                yield identifier, value
            continue
        yield identifier, value
        for name, member in vars(value).items():
            if inspect.isfunction(member) and not name.startswith("_"):
                yield f"{identifier}.{name}", member


def described(docstring):
    """Names of the section Args; "device, dtype: ..." are two."""
    section = re.search(r"^Args:\n((?: {4}.*\n?|\n)*)", inspect.cleandoc(docstring), re.MULTILINE)
    if not section:
        return None
    entries = re.findall(r"^ {4}(\S.*?):(?:\s|$)", section[1], re.MULTILINE)
    return [name.strip(" *") for entry in entries for name in entry.split(",")]


def test_docstrings_name_the_arguments_that_there_are():
    wrong = []
    for identifier, value in public_functions():
        names = described(value.__doc__ or "")
        if names is None:
            continue
        there = [n for n in inspect.signature(value).parameters if n not in ("self", "cls")]
        if sorted(names) != sorted(there):
            wrong.append(f"{identifier}: Args has {names}, the signature {there}")
    assert wrong == []
