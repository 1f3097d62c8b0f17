"""Marks for tests that need a package, which not every environment has."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

needs_parquet = pytest.mark.skipif(find_spec("pyarrow") is None, reason="the package pyarrow is not installed")
