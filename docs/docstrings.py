"""How mkdocstrings reads the docstrings of the package (mkdocs.yml names this file)."""

import re

import griffe


class Extension(griffe.Extension):
    """Take "Example:", as Google's style and ruff do, for what griffe knows as "Examples:"."""

    def on_object(self, *, obj, **kwargs):
        """Called for every object of the package that was read."""
        if obj.docstring:
            text = obj.docstring.value
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
