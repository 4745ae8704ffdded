"""Whether the stub of a compiled extension tells the truth."""

import ast
import re
from pathlib import Path

import isobn_kernels


def stub_of(name):
    """The names of every function's arguments in ``name``.pyi, and the names of its constants."""
    tree = ast.parse((Path(isobn_kernels.__file__).parent / f"{name}.pyi").read_text())
    functions = {node.name: [a.arg for a in node.args.args] for node in tree.body if isinstance(node, ast.FunctionDef)}
    return functions, {node.target.id for node in tree.body if isinstance(node, ast.AnnAssign)}


def contents_of(extension):
    """The same of the extension; pybind11 writes a signature into each docstring."""
    public = {name: value for name, value in vars(extension).items() if not name.startswith("_")}
    functions = {
        name: re.findall(r"(\w+): ", value.__doc__.split(" ->")[0]) for name, value in public.items() if callable(value)
    }
    return functions, set(public) - set(functions)
