"""The code blocks of the pages that take extras to run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.docs_pages import PAGES_WITH_EXTRAS, check_blocks

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("page", PAGES_WITH_EXTRAS, ids=lambda page: page.name)
def test_the_code_blocks_run(page: Path, tmp_path: Path) -> None:
    check_blocks(page, tmp_path)
