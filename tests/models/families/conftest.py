"""What the families' tests of layouts share."""

import functools

import pytest


@pytest.fixture(scope="module")
def checks(request, tmp_path_factory):
    """Twin -> the LayoutCheck that ``make_check(name, directory)`` of the test's file makes, when first asked for."""
    return functools.cache(lambda name: request.module.make_check(name, tmp_path_factory.mktemp(name or "twin")))
