"""Model names → directories: what is installed, what is built in, what is the default."""

from __future__ import annotations

import os
from pathlib import Path

from edgevlm import hub, paths
from edgevlm.bundle import MANIFEST, Bundle, open_bundle, read_manifest
from edgevlm.errors import BundleError

BUILT_IN = "nano"


def installed() -> list[Bundle]:
    """Models in `paths.models()`, largest first; damaged manifests are left out."""
    bundles = []
    for manifest in sorted(paths.models().glob(f"[!.]*/{MANIFEST}")):
        try:
            bundles.append(Bundle(manifest.parent, read_manifest(manifest)))
        except BundleError:
            continue  # `edgevlm info NAME` says what is wrong with it
    return sorted(bundles, key=lambda bundle: -bundle.n_bytes)


def known() -> list[Bundle]:
    """Installed models, and the built-in one even if it was not fetched yet."""
    bundles = installed()
    if BUILT_IN not in [bundle.path.name for bundle in bundles]:
        bundles.append(hub.packaged(BUILT_IN))
    return bundles


def default() -> str:
    """$EDGEVLM_MODEL, else the largest installed model, else the built-in one."""
    chosen = os.environ.get("EDGEVLM_MODEL")
    if chosen:
        return chosen
    largest = installed()
    return str(largest[0].path.name) if largest else BUILT_IN


def resolve(model: str | Path | None) -> Path:
    """The directory of a model; the built-in one is completed first if need be.

    Raises:
        BundleError: there is no such model.
        HubError: the built-in model's language file could not be fetched.
    """
    wanted = default() if model is None else model
    if wanted == BUILT_IN:
        return hub.built_in(BUILT_IN)
    for directory in (Path(wanted), paths.models() / wanted):
        if directory.is_dir():
            return directory
    names = ", ".join(bundle.path.name for bundle in known())
    raise BundleError(
        f"there is no model {str(wanted)!r}: give the directory of a bundle or one of {names}"
    )


def look_up(model: str | Path | None) -> Bundle:
    """A model's manifest, without fetching anything: the built-in one may not be there yet.

    Raises:
        BundleError: there is no such model, or it is damaged.
    """
    wanted = default() if model is None else model
    if wanted == BUILT_IN and not hub.is_complete(BUILT_IN):
        return hub.packaged(BUILT_IN)
    return open_bundle(resolve(wanted))
