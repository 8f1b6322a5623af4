from __future__ import annotations

import json
import pickle

import pytest

from tfspark._optional import MissingExtraError, import_optional


def test_what_is_installed_is_imported():
    assert import_optional("json", "plots", "Plotting") is json


def test_what_is_missing_names_the_extra_to_install():
    with pytest.raises(
        ImportError, match=r"Plotting needs the package 'no_such_package'.*tfspark\[plots\]"
    ) as caught:
        import_optional("no_such_package.pyplot", "plots", "Plotting")
    assert isinstance(pickle.loads(pickle.dumps(caught.value)), MissingExtraError)


def test_a_package_that_is_there_but_broken_keeps_its_own_error(tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text("import what_it_needs\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="what_it_needs") as caught:
        import_optional("broken_package", "plots", "Plotting")
    assert not isinstance(caught.value, MissingExtraError)
