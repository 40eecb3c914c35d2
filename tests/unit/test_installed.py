"""The version of an installed package."""

from __future__ import annotations

import torch

from torchprime.installed import installed_version, installed_versions


def test_the_version_of_a_package_and_of_a_missing_one() -> None:
    found = installed_version("torch")
    assert found is not None and torch.__version__.startswith(found.split("+")[0])
    assert installed_version("no-such-package-here") is None
    assert installed_versions(("torch", "no-such-package-here")) == {"torch": found}
