"""What runs on a GPU is compiled as users have it."""

import pytest


@pytest.fixture(autouse=True)
def as_users_have_it(optimized):
    """See `optimized` in tests/conftest.py."""
