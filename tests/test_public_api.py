"""The face of the package: exact names, loaded lazily."""

from __future__ import annotations

import ast
import importlib
import json
from pathlib import Path

import pytest

import tfspark


def test_all_is_exactly_what_the_table_holds():
    assert sorted([*tfspark._MODULE_OF, "errors"]) == sorted(tfspark.__all__)
    assert len(set(tfspark.__all__)) == len(tfspark.__all__)


def test_type_checkers_see_the_same_names_from_the_same_modules():
    tree = ast.parse(Path(tfspark.__file__).read_text(encoding="utf-8"))
    (block,) = (
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    seen = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == {**tfspark._MODULE_OF, "errors": "tfspark"}


@pytest.mark.parametrize("name", sorted(tfspark.__all__))
def test_every_name_resolves(name):
    value = getattr(tfspark, name)
    if name != "errors":
        assert value is getattr(importlib.import_module(tfspark._MODULE_OF[name]), name)
    assert name in dir(tfspark)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Adamant'"):
        tfspark.Adamant  # noqa: B018


def test_the_version_is_that_of_the_package():
    setup = Path(tfspark.__file__).parent.parent / "setup.py"
    assert f'VERSION = "{tfspark.__version__}"' in setup.read_text(encoding="utf-8")


def test_importing_tfspark_brings_no_framework_along(run_python):
    source = """
        import json, sys
        import tfspark
        from tfspark import MaxEpoch, SeveralIteration, errors
        print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
    """
    modules = set(json.loads(run_python(source).stdout))
    assert "tfspark" in modules
    assert not modules & {"tensorflow", "keras", "pyspark", "numpy", "pandas", "pyarrow"}
