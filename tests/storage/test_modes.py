"""Files come out as readable as the umask lets them be, whoever wrote them."""

from __future__ import annotations

import os
from pathlib import Path
from stat import S_IMODE

import pytest

from lamina.storage.atomic import atomic_directory


@pytest.mark.skipif(os.name == "nt", reason="modes are a matter of POSIX")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_private_files_of_a_writer_follow_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        with atomic_directory(tmp_path / "chat") as staging:
            (staging / "adapter_model.safetensors").write_bytes(b"x")
            (staging / "adapter_model.safetensors").chmod(0o600)
    finally:
        os.umask(before)
    written = tmp_path / "chat" / "adapter_model.safetensors"
    assert S_IMODE(written.stat().st_mode) == mode
