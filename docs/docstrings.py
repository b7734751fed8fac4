"""How mkdocstrings reads the docstrings of the package (mkdocs.yml names this file)."""

import re

import griffe


class Extension(griffe.Extension):
    """Classes are described by their own docstrings, and have the section "Example:"."""

    def on_object(self, *, obj, **kwargs):
        """Called for every object of the package that was read."""
        if obj.name == "__init__":
            obj.docstring = None  # what it does; what it takes is said by its class
        elif obj.docstring:  # ruff and Google's style know the singular, griffe does not
            text = obj.docstring.value
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
