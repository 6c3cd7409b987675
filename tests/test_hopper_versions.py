"""Where kernels for Hopper can be had: on their architecture, with the versions of Triton that compile them."""

from __future__ import annotations

import pytest

from pageproof.optimized.hopper import why_not_compiled
from pageproof.optimized.tile_table import ARCHITECTURES


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_only_on_hopper(architecture: str) -> None:
    found = why_not_compiled(architecture, "3.6")
    assert found == (None if architecture == "sm_90" else f"architecture {architecture}")


@pytest.mark.parametrize(("version", "is_known"), [("3.5", False), ("3.6", True), ("3.7", True), ("3.60", False)])
def test_only_versions_that_compile_them_are_asked(version: str, is_known: bool) -> None:
    found = why_not_compiled("sm_90", version)
    assert found == (None if is_known else f"Triton {version}, not one of 3.6, 3.7")
