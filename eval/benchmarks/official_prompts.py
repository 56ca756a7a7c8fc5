"""Prompt texts out of another project's Python file, so that its wording is asked without standing here.

    prompts(path, "create_prompt")          the texts that are assigned to that name, or that a function of that name
                                            returns, in the order of the file
    prompts(...)[0].fill({"view": "front", "data['caption']": "A ball"})        values by the expression between braces

The file is parsed, never run. Strings, f-strings and sums of them are read; anything else in their place is a blank to
be filled, called by its source text.
"""

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Prompt:
    place: str  # file and line, for messages
    parts: tuple[tuple[str, bool], ...]  # (text, False), or (source of an expression, True)

    def fill(self, values: Mapping[str, str]) -> str:
        """ValueError for a blank that `values` does not know: the file is another version than the one meant."""
        for text, blank in self.parts:
            if blank and text not in values:
                raise ValueError(f"{self.place}: the prompt has the blank {text!r}, which is not known here")
        return "".join(values[text] if blank else text for text, blank in self.parts)


def prompts(path: Path, name: str, remedy: str) -> list[Prompt]:
    """ValueError, with the remedy, for a file that is no Python or has no text under that name."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read as Python ({error}): {remedy}") from error
    values: list[ast.expr] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and any(isinstance(one, ast.Name) and one.id == name for one in node.targets):
            values.append(node.value)
        elif isinstance(node, ast.FunctionDef) and node.name == name:
            values += [one.value for one in ast.walk(node) if isinstance(one, ast.Return) and one.value is not None]
    found = [value for value in values if _is_text(value)]
    if not found:
        raise ValueError(f"{path} has no text {name!r}: {remedy}")
    found.sort(key=lambda value: value.lineno)
    return [Prompt(f"{path}, line {value.lineno}", tuple(_parts(value))) for value in found]


def _is_text(node: ast.expr) -> bool:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _is_text(node.left) or _is_text(node.right)
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _parts(node: ast.expr) -> list[tuple[str, bool]]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [(node.value, False)]
    if isinstance(node, ast.JoinedStr):
        return [part for value in node.values for part in _parts(value)]
    if isinstance(node, ast.FormattedValue):
        return [(ast.unparse(node.value), True)]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _parts(node.left) + _parts(node.right)
    return [(ast.unparse(node), True)]
