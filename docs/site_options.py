"""Shows the help of options, `option(default, "help")`, as their documentation: an extension of griffe."""

from __future__ import annotations

import ast
from typing import Any

import griffe


class OptionHelp(griffe.Extension):
    """Gives dataclass fields that are made by `option` or `path_option` a docstring and their default."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **kwargs: Any) -> None:
        call = attr.value
        if isinstance(call, griffe.ExprCall) and str(call.function) in ("option", "path_option"):
            default, help_text = call.arguments[:2]
            attr.docstring = griffe.Docstring(ast.literal_eval(str(help_text)), parent=attr)
            attr.value = None if str(default) == "MISSING" else default
