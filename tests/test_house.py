"""The house is as the README draws it."""

import ast
import glob
import os
import re

from conftest import ROOT

README = open(os.path.join(ROOT, "README.md"), encoding="utf-8").read()


def test_each_module_imports_only_what_stands_below_it_in_the_readme():
    """So there is no circle, and the engine never imports the story."""
    rooms = re.findall(r"^\| `([\w/]+)\.py` \|", README, re.M)
    paths = [*glob.glob("*.py", root_dir=ROOT), *glob.glob("engine/*.py", root_dir=ROOT)]
    assert sorted(rooms) == sorted({path[:-3] for path in paths} - {"engine/__init__"})
    for place, room in enumerate(rooms):
        tree = ast.parse(open(os.path.join(ROOT, room + ".py"), encoding="utf-8").read())
        nodes = list(ast.walk(tree))
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        upward = {name.replace(".", "/") for name in names} & set(rooms[:place + 1])
        assert not upward, f"{room}.py imports {', '.join(upward)}"
