"""The code blocks of the pages on ready-made services."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from pages import PAGES_WITH_CODE, check_blocks

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    "page", [page for page in PAGES_WITH_CODE if page.parent.name == "ready-made"], ids=lambda page: page.name
)
def test_the_code_blocks_run(page: Path, tmp_path: Path) -> None:
    check_blocks(page, tmp_path)
