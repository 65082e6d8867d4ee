"""The text under each field of a class, as the class's source has it: Python itself does not keep it."""

from __future__ import annotations

import ast
import inspect
import sys
from itertools import pairwise


def field_texts(kind: type) -> dict[str, str]:
    """Each documented field's docstring, as one line. Fields without one are left out."""
    module = ast.parse(inspect.getsource(sys.modules[kind.__module__]))
    (body,) = (node.body for node in module.body if isinstance(node, ast.ClassDef) and node.name == kind.__name__)
    texts: dict[str, str] = {}
    for field, text in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and _is_text(text):
            texts[field.target.id] = " ".join(ast.literal_eval(text.value).split())  # type: ignore[attr-defined]
    return texts


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
