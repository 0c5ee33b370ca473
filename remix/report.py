"""remix -> its report: what made it, how long that took, how it compares with the song."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from remix.manifest import Manifest, ModelEntry, expected_sha256
from remix.models import Models
from remix.options import RemixOptions
from remix.pipeline import Remix
from remix.similarity import report_similarity
from remix.stages import STAGES, Stage


class StageTime(Protocol):
    """Where the calls of one stage's runner spent their time, summed over its windows.

    `windows` were computed; `cached` were there from before, and cost neither.
    """

    queue_s: float
    compute_s: float
    transfer_s: float
    windows: int
    cached: int

    @property
    def wall_s(self) -> float:
        """From the first call's start to the last one's end."""
        ...


@dataclass(frozen=True)
class MadeRemix:
    """A remix, and how it was made.

    Args:
        remix: the music.
        options: as they were understood, defaults and all.
        models: that worked.
        times: of the runners' calls.
        decode_s: from the uploaded file to the song.
        wall_s: from the song to the remix.
        trace_id: names the work in logs and traces; empty for none.
    """

    remix: Remix
    options: RemixOptions
    models: Models
    times: Mapping[Stage, StageTime]
    decode_s: float
    wall_s: float
    trace_id: str = ""


def report(made: MadeRemix, manifest: Manifest, models_dir: Path) -> tuple[dict[str, Any], bytes]:
    """Everything that can be said of a remix, as JSON has it, and its picture, PNG."""
    remix = made.remix
    evaluation, picture = report_similarity(remix.song, remix.audio)
    facts = {
        "trace_id": made.trace_id,
        "song": {"duration_s": round(remix.song.duration_s, 3)},
        "voice": made.models.voice.name,
        "options": made.options.model_dump(mode="json"),
        "models": [_model(manifest[name], models_dir) for name in made.models.names()],
        "music": _music(remix),
        "mix": _rounded({k: v for k, v in asdict(remix.mix).items() if k != "warnings"}),
        "evaluation": evaluation,
        "times": _times(made),
        "warnings": [
            *_weights_warnings(made, manifest),
            *remix.band.warnings,
            *remix.mix.warnings,
        ],
    }
    return facts, picture


def _weights_warnings(made: MadeRemix, manifest: Manifest) -> list[str]:
    return [
        f"{name} has random weights: what it makes is noise, good for measurements only."
        for name in made.models.names()
        if manifest[name].weights == "random"
    ]


def _model(entry: ModelEntry, models_dir: Path) -> dict[str, Any]:
    return {
        "name": entry.name,
        "stage": entry.stage,
        "weights": entry.weights,
        "licence": entry.licence,
        "source": entry.source,
        "files": [
            {"path": file.path, "sha256": expected_sha256(models_dir, file)} for file in entry.files
        ],
    }


def _music(remix: Remix) -> dict[str, Any]:
    grid = remix.band.grid
    return {
        "tempo_bpm": round(grid.tempo_bpm, 2),
        "beats_per_bar": grid.beats_per_bar,
        "tonic": grid.tonic,
        "mode": grid.mode,
        "notes_heard": {name: len(notes) for name, notes in remix.band.heard.items()},
        "notes_written": {name: len(notes) for name, notes in remix.band.written.items()},
        "voice_octaves": remix.voice.melody.octaves,
        "vocal_voiced_share": round(remix.voice.melody.voiced_share, 3),
    }


def _times(made: MadeRemix) -> dict[str, Any]:
    """Stages in their order, and the sum of their compute and transfer times, `sum_s`.

    These are measured while the stages overlap, when shared cores make each slower: the sum is not
    what they would take one after the other. What the overlap gains, `benchmarks/remix.py`
    measures. Windows of a stage may wait at the same time, so its `queue_s` can exceed the wall
    time and is not summed.
    """
    stages = {
        stage: {
            "queue_s": round(time.queue_s, 3),
            "compute_s": round(time.compute_s, 3),
            "transfer_s": round(time.transfer_s, 3),
            "wall_s": round(time.wall_s, 3),
            "windows": time.windows,
            "cached": time.cached,
        }
        for stage in STAGES
        if (time := made.times.get(stage)) is not None
    }
    return {
        "decode_s": round(made.decode_s, 3),
        "wall_s": round(made.wall_s, 3),
        "sum_s": round(sum(s["compute_s"] + s["transfer_s"] for s in stages.values()), 3),
        "stages": stages,
    }


def _rounded(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: round(value, 4) if isinstance(value, float) else value
        for name, value in values.items()
    }
