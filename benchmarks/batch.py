"""How many photos a minute are described, several at a time, one by one, and by libmtmd?

The three take turns on the same photos, new ones every turn; answers have the same length. libmtmd
(`--mmproj`, the vision file for it) runs the same language file. Without it the peer is this
program one by one.

    python benchmarks/batch.py [MODEL] [--mmproj FILE] [--photos N] [--parallel N ...]
                               [--max-tokens N] [--rounds N] [--json FILE]
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import common

import edgevlm
from edgevlm.bench import photo
from edgevlm.bench.mtmd import Peer
from edgevlm.bench.run import peer_setup
from edgevlm.many import PARALLEL

ONE_BY_ONE, LIBMTMD = "one by one", "libmtmd, one by one"


def describers(
    vlm: edgevlm.VLM, parallels: Sequence[int], max_tokens: int | None, peer: Peer | None
) -> dict[str, Callable[[list[Path]], list[str]]]:
    """Each gives the texts of all photos; libmtmd's are not looked at."""
    options: dict[str, Any] = {"max_tokens": max_tokens, "repetition_stop": max_tokens is None}

    def one_by_one(files: list[Path]) -> list[str]:
        return [vlm.describe(file, **options).text for file in files]

    def at_a_time(files: list[Path], parallel: int) -> list[str]:
        outcomes = vlm.describe_many(files, parallel=parallel, **options)
        return [outcome.answer.text for outcome in outcomes if outcome.answer is not None]

    def libmtmd(files: list[Path]) -> list[str]:
        assert peer is not None and max_tokens is not None
        for file in files:
            peer.run(file, max_tokens)
        return []

    found: dict[str, Callable[[list[Path]], list[str]]] = {
        f"{n} at a time": partial(at_a_time, parallel=n) for n in parallels
    }
    found[ONE_BY_ONE] = one_by_one
    if peer is not None:
        found[LIBMTMD] = libmtmd
    return found


def main() -> None:
    parser = common.parser(__doc__, rounds=1)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--mmproj", type=Path)
    parser.add_argument("--photos", type=int, default=8)
    parser.add_argument("--parallel", type=int, nargs="+", default=[PARALLEL])
    parser.add_argument("--max-tokens", type=int, help="of every answer [default: it ends itself]")
    options = parser.parse_args()
    if options.mmproj and options.max_tokens is None:
        parser.error("--mmproj needs --max-tokens: libmtmd's answers do not end by themselves")
    seconds: dict[str, list[float]] = {}
    same = total = 0
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        vlm = stack.enter_context(edgevlm.load(options.model, threads=options.threads, cache=False))
        one_view = [size for size in photo.SIZES_PX[1:] if vlm.layout(*size).n_tiles == 1]
        pixels = photo.drawn(*(one_view or photo.SIZES_PX)[0])
        files = [Path(scratch) / f"{n}.jpg" for n in range(options.photos)]
        photo.save_another(pixels, files[0])
        peer = None
        if options.mmproj:
            peer = stack.enter_context(Peer(peer_setup(vlm, options.mmproj, files[0])))
        who = describers(vlm, options.parallel, options.max_tokens, peer)
        for describe in who.values():
            describe(files[:1])  # warms up
        for _ in range(options.rounds):
            for file in files:
                photo.save_another(pixels, file)
            texts = {}
            for name, describe in who.items():
                begin_s = time.perf_counter()
                texts[name] = describe(files)
                seconds.setdefault(name, []).append(time.perf_counter() - begin_s)
            for n in options.parallel:
                pairs = zip(texts[f"{n} at a time"], texts[ONE_BY_ONE], strict=True)
                same += sum(many == one for many, one in pairs)
                total += len(files)
        name = vlm.bundle.name
    times = {
        f"{name}: a photo": {
            who: 1000 * statistics.median(spent) / options.photos for who, spent in seconds.items()
        }
    }
    found = common.result(
        str(__doc__).splitlines()[0],
        LIBMTMD if options.mmproj else ONE_BY_ONE,
        times,
        options,
        photos=options.photos,
        max_tokens=options.max_tokens,
        same_text=f"{same} of {total}",
        photos_per_minute={
            who: round(60_000 / ms, 1) for who, ms in times[f"{name}: a photo"].items()
        },
    )
    common.publish(found, options)
    print(f"\nsame text as one by one: {same} of {total}")


if __name__ == "__main__":
    main()
