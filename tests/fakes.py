"""Fakes, written by hand: what stands in for the models where a test is about something else.

`python -m bentoml serve tests.fakes:FakeRemix` is the HTTP and gRPC face over a fake composer.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from pathlib import Path
from typing import Any, cast

import bentoml
import numpy as np
from numpy.typing import NDArray

from grpc_service import GrpcService
from http_api.app import build_app
from http_api.guard import Guard
from http_api.observed import Observed
from jobs.database import Database, open_database
from jobs.desk import Desk
from jobs.jobs import Jobs
from jobs.keys import KeyStore
from remix.audio import Audio
from remix.composer import Composer, NotesOnGrid, TimedInfer, read_notes
from remix.convert_voice import ConvertedVocal, Melody, Voice, voice_names
from remix.manifest import read_manifest
from remix.mix_tracks import MixReport
from remix.models import Models
from remix.notes import BeatGrid, Note, Tracks
from remix.options import ConvertOptions, GenerateOptions, RemixOptions, SeparateOptions
from remix.pipeline import Listen, NewBand, Remix, to_mixture
from remix.report import MadeRemix
from remix.settings import read_settings
from remix.stages import Progress, Stage, Tensors
from runners.remote_stages import StageTimes
from runners.runner import SERVICE
from telemetry.composer import ObservedComposer
from telemetry.logs import start_logging
from telemetry.process import ProcessWatch
from telemetry.traces import start_tracing
from tests.conftest import CRASH_SEED

STEP_S = 0.1
"""A fake stage takes ten of these, or as many as the seed says."""

GRID = BeatGrid(np.arange(-2.0, 700.0, 0.5), 0, 4, 120.0, 0, "major")
NOTES: Tracks = {"piano": [Note(0.0, 0.25, 60, 80)]}


class NoVoice:
    """Nobody sings."""

    name = "nobody"


class NoModels:
    """Stands for `remix.models.Models`: none."""

    voice = NoVoice()

    def names(self) -> list[str]:
        """No names."""
        return []


def no_infer() -> TimedInfer:
    """The fake composer has no use for one."""
    raise AssertionError("The fake composer runs no model.")


class CountingInfer:
    """`remix.composer.TimedInfer` whose outputs follow from its inputs, and that is told of."""

    def __init__(self) -> None:
        self.calls = 0
        self.times: dict[Stage, StageTimes] = defaultdict(StageTimes)
        self.was_called = asyncio.Event()
        self.gate = asyncio.Event()
        """Shut, it holds up every call."""
        self.gate.set()

    async def __call__(self, model: str, inputs: Tensors) -> dict[str, NDArray[Any]]:
        """Twice the first input, once the gate is open."""
        self.calls += 1
        self.was_called.set()
        await self.gate.wait()
        return {"out": 2 * next(iter(inputs.values()))}


class FakeComposer(Composer):
    """Decodes as the real one does; whatever a model would do takes a second and does nothing."""

    async def remix(
        self,
        song: Path,
        options: RemixOptions,
        progress: Progress,
        listen: Listen | None = None,
    ) -> MadeRemix:
        """The song itself, in every part."""
        if options.voice:
            # The models may not be installed here, the manifest's voices are always known.
            Voice.of(next(e for e in self.manifest.values() if voice_names(e)), options.voice)
        if options.seed == CRASH_SEED:
            raise RuntimeError("the secret of the fake")
        mixture = to_mixture(await self.decode(song))
        steps = max(10, options.seed)
        for step, stretch in enumerate(np.array_split(mixture.samples, steps, axis=1)):
            await asyncio.sleep(STEP_S)
            progress("separate_stems", (step + 1) / steps)
            if listen and stretch.shape[1]:
                listen(stretch)
        band = NewBand({"other": NOTES["piano"]}, GRID, NOTES, ("Nobody plays: a fake.",))
        made = Remix(
            audio=mixture,
            song=mixture,
            stems={"vocals": mixture.samples},
            band=band,
            voice=ConvertedVocal(mixture, Melody()),
            mix=MixReport(0.0, 0.0, None, None, None, None),
        )
        return MadeRemix(made, options, cast(Models, NoModels()), {}, 0.0, 1.0)

    async def separate(
        self, song: Path, options: SeparateOptions, progress: Progress
    ) -> dict[str, Audio]:
        """The song itself as its only stem."""
        return {"vocals": await self.decode(song)}

    async def transcribe(self, song: Path, progress: Progress) -> NotesOnGrid:
        """One note."""
        audio = await self.decode(song)
        return NotesOnGrid(NOTES, GRID, audio.duration_s)

    async def generate(
        self, notes: Path, options: GenerateOptions, progress: Progress
    ) -> NotesOnGrid:
        """The notes that were given."""
        return NotesOnGrid(read_notes(notes), GRID, 600.0)

    async def convert(self, vocals: Path, options: ConvertOptions, progress: Progress) -> Audio:
        """The vocal that was given."""
        return await self.decode(vocals)

    async def synthesize(self, notes: Path, progress: Progress) -> Audio:
        """A second of silence."""
        read_notes(notes)
        return Audio(np.zeros((2, 44_100), np.float32), 44_100)


class ObservedFake(ObservedComposer, FakeComposer):
    """The fake, as its calls are seen from outside."""


_settings = read_settings()
_desk = Desk(_settings)


@bentoml.service(
    name="fake_remix",
    workers=1,
    traffic={"timeout": 6_000},
    endpoints={"livez": "/livez", "readyz": "/readyz"},
    metrics=SERVICE["metrics"],
    tracing=SERVICE["tracing"],
    logging=SERVICE["logging"],
)
@bentoml.asgi_app(build_app(_desk))
class FakeRemix:
    """`service.Remix` over a fake composer."""

    @bentoml.on_startup  # type: ignore[untyped-decorator]
    async def open(self) -> None:
        """Take requests."""
        start_logging("composer", _settings)
        self._end_tracing = start_tracing("composer", _settings)
        self._watch = ProcessWatch("composer")
        self._watch.start()
        database = Database(open_database(_settings.database_url))
        _desk.keys = KeyStore(database)
        if _desk.door.asks_for_keys:
            await _desk.door.open(_desk.keys.list)
        composer = ObservedFake(_settings, read_manifest(), no_infer)
        self._jobs = Jobs(_settings, composer, _desk.estimator, database)
        await self._jobs.start()
        _desk.open(composer, self._jobs)
        self._grpc = GrpcService(_desk, _settings, lambda: True)
        await self._grpc.start()

    @bentoml.on_shutdown  # type: ignore[untyped-decorator]
    async def close(self) -> None:
        """Let what runs over gRPC end."""
        await self._grpc.drain()
        await self._jobs.stop()
        await self._watch.stop()
        self._end_tracing()


# `bentoml.service` makes a Service of the class; its stub says it leaves it a class.
cast(Any, FakeRemix).add_asgi_middleware(Observed)
cast(Any, FakeRemix).add_asgi_middleware(
    Guard, door=_desk.door, max_body_bytes=_settings.max_upload_bytes
)
