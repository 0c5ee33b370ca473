"""installed models -> the largest batch that is worth making on this machine, for models.toml.

    philharmonics tune [MODEL ...] [--write]

A song is remixed once by the models themselves, in this process, and their windows are kept. Then
each model computes its own windows as its runner would: batches of 1, 2, 4 … on as many threads as
the runner has workers, one size after the other, round by round, so that whatever else the machine
does falls on all sizes alike. A larger batch is worth making if a window takes less than `WORTH` of
what it takes in the batch that is worth making so far: in larger ones lone callers wait longer.

The device is that of PHILHARMONICS_DEVICE, the threads of a call those of PHILHARMONICS_THREADS.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.demo_song import write_demo_song
from remix.composer import Composer
from remix.errors import InvalidModel, NotFound
from remix.manifest import MANIFEST_PATH, read_manifest
from remix.options import RemixOptions
from remix.report import StageTime
from remix.settings import Settings, read_settings
from remix.stages import STAGES, Stage, Tensors
from runners.inference_protocol import ServedModel
from runners.runner import Runner

DEMO_SONG = MANIFEST_PATH.parent / ".cache/demo_song.mp3"

BATCHES = (1, 2, 4, 8, 16, 32)

WORTH = 0.95
"""The exporter's measure too (`export/report.py`)."""

HOPELESS = 1.3
"""Of the time of a window by itself: what takes more, and takes it twice, is not tried again."""

TWICE = 2

LONGEST_S = 20.0
"""Of a batch: a cancelled song's compute ends with its batch."""

Windows = list[dict[str, NDArray[Any]]]
"""Each with the batch axis, of one row."""


class Recorder:
    """`remix.composer.TimedInfer` by the models themselves; keeps what they were given.

    Args:
        models: by name.
    """

    def __init__(self, models: Mapping[str, ServedModel]) -> None:
        self.times: dict[Stage, StageTime] = {}
        self.windows: dict[str, Windows] = defaultdict(list)
        self._models = models

    async def __call__(self, model: str, inputs: Tensors) -> dict[str, NDArray[Any]]:
        """See `remix.stages.Infer`."""
        rows = len(next(iter(inputs.values())))
        self.windows[model] += [
            {name: array[row : row + 1] for name, array in inputs.items()} for row in range(rows)
        ]
        return await asyncio.to_thread(self._models[model], inputs)


def load_models(settings: Settings) -> dict[str, ServedModel]:
    """Every installed model, as the runners load them."""
    models: dict[str, ServedModel] = {}
    for stage in STAGES:
        name = "".join(word.title() for word in stage.split("_"))
        runner: Runner = getattr(import_module(f"runners.{stage}"), name).inner()
        models |= {model.name: model for model in runner.load(settings)}
    return models


def windows_of_a_song(
    song: Path, models: Mapping[str, ServedModel], settings: Settings
) -> dict[str, Windows]:
    """What each model that works on a song is given of it."""
    recorder = Recorder(models)
    composer = Composer(settings, read_manifest(), lambda: recorder)
    asyncio.run(composer.remix(song, RemixOptions(seed=1), lambda stage, fraction: None))
    return recorder.windows


def batches_of(windows: Windows, rows: int, count: int) -> list[dict[str, NDArray[Any]]]:
    """So many batches of the windows that can share one, again from the first where they end."""
    shapes = [tuple((n, a.shape) for n, a in sorted(window.items())) for window in windows]
    [(commonest, _)] = Counter(shapes).most_common(1)
    alike = [window for window, shape in zip(windows, shapes, strict=True) if shape == commonest]
    return [
        {
            name: np.concatenate(
                [alike[(index * rows + row) % len(alike)][name] for row in range(rows)]
            )
            for name in alike[0]
        }
        for index in range(count)
    ]


def time_batches(
    compute: Callable[[Tensors], object], windows: Windows, workers: int, rounds: int
) -> dict[int, float]:
    """Median seconds of a window, by the size of the batch that it is in.

    Args:
        compute: the model.
        windows: that it computes.
        workers: batches at once, as in the runner.
        rounds: each size is timed so often.
    """
    work = {rows: batches_of(windows, rows, workers) for rows in BATCHES}
    times: dict[int, list[float]] = {rows: [] for rows in BATCHES}
    slow = Counter[int]()
    with ThreadPoolExecutor(workers) as threads:
        for _ in range(rounds + 1):  # the first counts for nothing
            for rows in list(work):
                start_s = time.perf_counter()
                list(threads.map(compute, work[rows]))
                batch_s = time.perf_counter() - start_s
                times[rows].append(batch_s / (workers * rows))
                if times[rows][-1] > HOPELESS * times[1][-1] or batch_s > LONGEST_S:
                    slow[rows] += 1
                    if slow[rows] == TWICE:
                        for larger in [size for size in work if size >= rows > 1]:
                            del work[larger]
                    break
    return {rows: statistics.median(times[rows][1:]) for rows in work if times[rows][1:]}


def worth_making(window_s: Mapping[int, float]) -> int:
    """The batch limit.

    >>> worth_making({1: 1.0, 2: 0.9, 4: 0.89, 8: 0.6}), worth_making({1: 1.0, 2: 0.99})
    (8, 1)
    """
    worth = 1
    for rows, seconds in sorted(window_s.items()):
        if seconds < WORTH * window_s[worth]:
            worth = rows
    return worth


def write_limit(manifest: str, model: str, device: str, rows: int) -> str:
    """A manifest with another batch limit of one model; everything else stays as it was.

    Raises:
        InvalidModel: it has no such limit.

    >>> write_limit("[a]\\nmax_batch = { cpu = 1, cuda = 8 } # seen\\n[b]\\n", "a", "cpu", 4)
    '[a]\\nmax_batch = { cpu = 4, cuda = 8 } # seen\\n[b]\\n'
    """
    section = rf"(^\[{re.escape(model)}\]\n(?:(?!\[)[^\n]*\n)*?max_batch = \{{[^}}]*\b{device} = )"
    written, count = re.subn(section + r"\d+", rf"\g<1>{rows}", manifest, flags=re.MULTILINE)
    if count != 1:
        raise InvalidModel(f"models.toml: {model} has no max_batch for {device}: write it first.")
    return written


def tune(
    names: Sequence[str], song: Path, settings: Settings, rounds: int
) -> Iterator[tuple[str, dict[int, float]]]:
    """Seconds of a window by the size of its batch, model by model.

    Raises:
        NotFound: a name that no model has that works on the song.
    """
    models = load_models(settings)
    windows = windows_of_a_song(song, models, settings)
    if unknown := sorted(set(names) - set(windows)):
        raise NotFound(
            f"{', '.join(unknown)} does not work on the song; {', '.join(sorted(windows))} do."
        )
    for name in names or sorted(windows):
        yield name, time_batches(models[name], windows[name], Runner.workers, rounds)


def main() -> int:
    """Measure, print, and write if told to."""
    parser = argparse.ArgumentParser(prog="philharmonics tune", description=__doc__)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="all that work, if unset")
    parser.add_argument("--song", type=Path, help="whose windows are computed; the demo song")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="the limits into models.toml")
    options = parser.parse_args()
    settings = read_settings()
    try:
        if options.song is None:
            write_demo_song(DEMO_SONG, DEMO_SONG.parent / "sources")
        manifest = MANIFEST_PATH.read_text()
        song = options.song or DEMO_SONG
        for name, window_s in tune(options.models, song, settings, options.rounds):
            limit, known = worth_making(window_s), read_manifest()[name].max_batch[settings.device]
            told = "  ".join(f"{rows}: {1000 * s:.1f} ms" for rows, s in window_s.items())
            print(f"{name}: {limit} on {settings.device} (models.toml has {known});  {told}")
            manifest = write_limit(manifest, name, settings.device, limit)
    except (InvalidModel, NotFound) as error:
        print(error, file=sys.stderr)
        return 1
    if options.write:
        partial = MANIFEST_PATH.with_suffix(".partial")
        partial.write_text(manifest)
        partial.replace(MANIFEST_PATH)
        print(f"Written into {MANIFEST_PATH.name}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
