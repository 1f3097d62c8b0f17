"""A folder for temporary files of its own, so that what a test leaves in it can be told from what others have."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session", autouse=True)
def _private_temporary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    tmp_path_factory.getbasetemp()  # outside, as what failed can be looked at there afterwards
    with tempfile.TemporaryDirectory(prefix="own-") as folder, pytest.MonkeyPatch.context() as patch:
        os.chmod(folder, 0o711)  # a test may become another user
        Path(folder, f"sage-{os.geteuid()}").mkdir(mode=0o700)  # where guardians of all jobs have their files
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", folder)
        yield
