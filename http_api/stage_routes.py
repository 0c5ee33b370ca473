"""What each route with a form does: a file and options -> an answer."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from starlette.responses import Response

from http_api import answers
from http_api.answers import FLAC, JSON, MIDI, MP3, WAV, ZIP
from remix.composer import Composer
from remix.options import ConvertOptions, GenerateOptions, Options, RemixOptions, SeparateOptions
from remix.stages import STAGES, Progress, Stage

AnyOptions = TypeVar("AnyOptions", bound=Options)

AUDIO = (WAV, FLAC, MP3)
NOTES = (MIDI, JSON)

SONG = "A song: WAV, FLAC, MP3, OGG (Vorbis, Opus), M4A or AAC."
NOTES_FILE = "Notes: a MIDI file, or JSON as /v1/transcribe answers it."


@dataclass(frozen=True)
class FormRoute(Generic[AnyOptions]):
    """A route that takes a form.

    Args:
        path: of the route.
        summary: one line for OpenAPI.
        description: more of it.
        part: name of the form's file.
        takes: what that file is.
        options: what can be chosen.
        example: options, for OpenAPI.
        answer: what comes back, for OpenAPI.
        offers: media types of the answer, the default first.
        work: does it: (composer, file, options, media type, progress) -> answer.
        stages: whose runners it needs.
    """

    path: str
    summary: str
    description: str
    part: str
    takes: str
    options: type[AnyOptions]
    example: Mapping[str, Any]
    answer: str
    offers: tuple[str, ...]
    stages: tuple[Stage, ...]
    work: Callable[[Composer, Path, AnyOptions, str, Progress], Coroutine[Any, Any, Response]]


async def _remix(
    composer: Composer, song: Path, options: RemixOptions, media_type: str, progress: Progress
) -> Response:
    made = await composer.remix(song, options, progress)
    return await answers.of_remix(made, composer, media_type)


async def _separate(
    composer: Composer, song: Path, options: SeparateOptions, media_type: str, progress: Progress
) -> Response:
    return await answers.of_stems(await composer.separate(song, options, progress))


async def _transcribe(
    composer: Composer, song: Path, options: Options, media_type: str, progress: Progress
) -> Response:
    return answers.of_notes(await composer.transcribe(song, progress), media_type)


async def _generate(
    composer: Composer, notes: Path, options: GenerateOptions, media_type: str, progress: Progress
) -> Response:
    return answers.of_notes(await composer.generate(notes, options, progress), media_type)


async def _convert(
    composer: Composer, vocals: Path, options: ConvertOptions, media_type: str, progress: Progress
) -> Response:
    return await answers.of_audio(await composer.convert(vocals, options, progress), media_type)


async def _synthesize(
    composer: Composer, notes: Path, options: Options, media_type: str, progress: Progress
) -> Response:
    return await answers.of_audio(await composer.synthesize(notes, progress), media_type)


FORM_ROUTES: tuple[FormRoute[Any], ...] = (
    FormRoute(
        path="/v1/remix",
        summary="Song -> remix",
        description="The whole flow. As application/zip: remix.wav, stems/*.wav, notes.mid (what "
        "was heard), generated.mid (what was written), voice.wav, report.json, report.png.",
        part="song",
        takes=SONG,
        options=RemixOptions,
        example={"voice": "", "seed": 1, "temperature": 0.9},
        answer="The remix, stereo at 44.1 kHz, as long as the song; or all there is of it.",
        offers=(*AUDIO, ZIP),
        stages=STAGES,
        work=_remix,
    ),
    FormRoute(
        path="/v1/separate",
        summary="Song -> stems",
        description="Stems as WAV files of 32-bit floats: they are not clipped.",
        part="song",
        takes=SONG,
        options=SeparateOptions,
        example={},
        answer="A ZIP of stems/*.wav.",
        offers=(ZIP,),
        stages=("separate_stems",),
        work=_separate,
    ),
    FormRoute(
        path="/v1/transcribe",
        summary="Song -> notes",
        description="Every pitched sound in the file is transcribed, a voice too: for the notes of "
        "an instrument, separate first.",
        part="song",
        takes=SONG,
        options=Options,
        example={},
        answer="The notes that were heard.",
        offers=NOTES,
        stages=("transcribe_notes",),
        work=_transcribe,
    ),
    FormRoute(
        path="/v1/generate",
        summary="Notes -> new music",
        description="Writes drums, bass, guitar, piano and strings from the notes it is given.",
        part="notes",
        takes=NOTES_FILE,
        options=GenerateOptions,
        example={"seed": 1, "mode": "accompany", "tracks": ["drums", "bass", "piano"]},
        answer="The notes that were written, by track.",
        offers=NOTES,
        stages=("generate_notes",),
        work=_generate,
    ),
    FormRoute(
        path="/v1/convert",
        summary="Vocal -> the same by another voice",
        description="Melody, words and timing stay. Unless told otherwise the vocal is "
        "transposed by whole octaves into the voice's range.",
        part="vocals",
        takes="A voice alone, sung or spoken: WAV, FLAC, MP3, OGG, M4A or AAC.",
        options=ConvertOptions,
        example={"octaves": 0},
        answer="The vocal, as long as it was.",
        offers=AUDIO,
        stages=("convert_voice",),
        work=_convert,
    ),
    FormRoute(
        path="/v1/synthesize",
        summary="Notes -> sound",
        description="Plays the notes with a SoundFont, each track by its instrument.",
        part="notes",
        takes=NOTES_FILE,
        options=Options,
        example={},
        answer="The sound of the notes, stereo at 44.1 kHz.",
        offers=AUDIO,
        stages=("synthesize_audio",),
        work=_synthesize,
    ),
)
