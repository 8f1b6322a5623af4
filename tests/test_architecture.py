"""The arrows of import, read from the source with `ast`: also those inside functions."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "tfspark"

# What each layer may import of tfspark, besides itself. Public names of the face (`__init__`) are
# for users; inside the package nothing imports them.
BELOW = {
    "errors": set(),
    "_aligned": set(),
    "_optional": {"errors"},
    "slots": {"errors"},
    "ahead": set(),  # by the process that Spark waits for: nothing that takes time
    "jvm_classes": set(),
    "executors": {"errors", "slots"},
    "context": {"errors", "slots", "ahead", "jvm_classes", "executors"},
    "daemon": {"ahead"},  # names modules of all layers, and imports them for others
    "graphdef": {"errors"},
    "data": {"errors", "_aligned", "graphdef"},
    "graph": {"errors", "graphdef", "data"},
    "inference": {"errors", "_aligned", "_optional", "slots", "graphdef", "data", "graph"},
    "sync": {"errors", "_aligned", "_optional", "slots", "graphdef", "data", "graph"},
    "train": {"errors", "_optional", "slots", "graphdef", "data", "graph", "inference", "sync"},
}
BELOW["nnframes"] = {"errors", "graphdef", "data", "graph", "inference", "train"}
BELOW["doctor"] = set(BELOW) - {"daemon"}
BELOW["__main__"] = {"doctor"}
FRAMEWORKS = {
    "pyspark": {
        "context",
        "executors",
        "slots",
        "daemon",
        "doctor",
        "data",
        "inference",
        "sync",
        "train",
    },
    "py4j": {"executors", "data", "sync", "train"},
    "tensorflow": {"graphdef", "data", "graph", "inference", "sync", "train", "doctor"},
    "keras": {"graphdef", "graph", "inference", "sync", "train"},
}
for _layers in FRAMEWORKS.values():
    _layers.add("nnframes")  # stages of Spark ML with models of Keras: all of them
# Imported by every Python worker that writes data, where TensorFlow would cost seconds.
WITHOUT_TENSORFLOW = {"data/spec.py", "data/store.py", "data/order.py"}

FILES = sorted(PACKAGE.rglob("*.py"))


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path, *, module_level: bool = False) -> set[str]:
    """Every module that a file imports, at run time: `tfspark.data` for `from tfspark import data`.

    A `TYPE_CHECKING` block imports nothing.
    """
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if module_level and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                package = path.relative_to(PACKAGE.parent).with_suffix("").parts[: -node.level]
                module = ".".join([*package, *filter(None, [module])])
            if module == "tfspark":
                found.update(f"tfspark.{alias.name}" for alias in node.names)
            else:
                found.add(module)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def roots(modules: set[str]) -> set[str]:
    return {module.partition(".")[0] for module in modules}


@pytest.fixture
def source(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "module.py"
        path.write_text(text)
        return path

    return write


def test_the_reader_of_imports_sees_them_all(source):
    text = (
        "import a.b, c\n"
        "from tfspark import errors\n"
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import never\n"
        "def f():\n    from tfspark.data import spec\n"
    )
    always = {"a.b", "c", "tfspark.errors", "typing"}
    assert imports(source(text)) == always | {"tfspark.data"}
    assert imports(source(text), module_level=True) == always


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
class TestArrows:
    def test_imports_run_downwards_only(self, path):
        layer = layer_of(path)
        if layer == "__init__":
            assert not {module for module in imports(path) if module.startswith("tfspark")}
            return
        assert layer in BELOW, f"tfspark.{layer} has no place among the layers"
        own = {module.split(".")[1] for module in imports(path) if module.startswith("tfspark.")}
        assert own <= BELOW[layer] | {layer}

    def test_frameworks_are_imported_only_where_they_are_meant(self, path):
        layer = layer_of(path)
        used = roots(imports(path))
        for framework, layers in FRAMEWORKS.items():
            assert framework not in used or layer in layers

    def test_files_of_data_writing_workers_do_not_bring_tensorflow(self, path):
        if str(path.relative_to(PACKAGE)) in WITHOUT_TENSORFLOW:
            assert not roots(imports(path, module_level=True)) & {"tensorflow", "keras"}


def test_every_folder_is_a_package():
    folders = {path.parent for path in FILES}
    assert not {folder for folder in folders if not (folder / "__init__.py").exists()}


def test_data_writing_workers_do_not_import_tensorflow(run_python):
    modules = [
        "tfspark." + name.removesuffix(".py").replace("/", ".") for name in WITHOUT_TENSORFLOW
    ]
    run_python(f"""
        import importlib, sys
        for module in {modules!r}:
            importlib.import_module(module)
        assert not {{"tensorflow", "keras", "pyspark"}} & set(sys.modules), sorted(sys.modules)
    """)
