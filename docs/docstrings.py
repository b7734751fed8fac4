"""How mkdocstrings reads the docstrings of the package (mkdocs.yml names this file)."""

import re

import griffe


class Extension(griffe.Extension):
    """Classes are described by their own docstrings; types are those of the signature."""

    def on_object(self, *, obj, **kwargs):
        """Called for every object of the package that was read."""
        if obj.name == "__init__":
            obj.docstring = None  # what it does; what it takes is said by its class
        if not obj.docstring:
            return
        text = obj.docstring.value
        # ruff and Google's style know the singular, griffe does not.
        text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
        if obj.is_function and obj.returns is not None:  # a colon in the text is none of a type's
            text = re.sub(r"^(Returns:\n +)", rf"\g<1>{obj.returns}: ", text, flags=re.MULTILINE)
        obj.docstring.value = text
