"""The public names: each can be imported and has a docstring; none loads torch before it is used."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest

PACKAGES = ("sdmodule", "sdmodule.callbacks", "sdmodule.data", "sdmodule.evaluation", "sdmodule.sampling")
NAMES = [(package, name) for package in PACKAGES for name in import_module(package).__all__]


@pytest.mark.parametrize(("package", "name"), NAMES, ids=".".join)
def test_every_public_name_resolves_and_is_documented(package, name):
    value = getattr(import_module(package), name)
    assert name in dir(import_module(package))
    if name != "__version__":
        assert value.__name__ == name and value.__module__.startswith(package)
        assert value.__doc__


@pytest.mark.parametrize("package", PACKAGES)
def test_an_unknown_name_is_an_attribute_error(package):
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'Nothing'"):
        import_module(package).Nothing  # noqa: B018


def test_importing_the_packages_loads_neither_torch_nor_lightning():
    code = f"import sys, {', '.join(PACKAGES)}; print({{'torch', 'lightning', 'diffusers'}} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
