"""Fixtures that several tests share; every test has a cache directory of its own."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"

# Who starts pytest in the background of a shell script leaves it, and all its children, deaf to
# Ctrl-C, which several tests press.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Verdicts and models stay out of the user's cache, child processes out of the source tree."""
    directory = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(directory))
        patch.chdir(tmp_path_factory.mktemp("working-directory"))
        patch.delenv("EDGEVLM_MODEL", raising=False)
        yield directory


@pytest.fixture(autouse=True)
def nothing_cached(home: Path) -> None:
    """No test finds the embeddings that another one left."""
    shutil.rmtree(home / "edgevlm" / "embeddings", ignore_errors=True)


@pytest.fixture
def picture() -> Image.Image:
    """A smooth, colourful 130 × 90 picture that no resize leaves unchanged."""
    y, x = np.mgrid[0:90, 0:130].astype(np.float64)
    channels = [np.sin(x / 9) * np.cos(y / 13), np.cos(x * y / 900), np.sin((x - y) / 17)]
    return Image.fromarray(np.uint8(127.5 + 127.5 * np.stack(channels, axis=-1)))
