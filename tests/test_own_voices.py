"""Enrolled voices: consent, how they come and go, and that revoking leaves nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
import tomli_w

from jobs.database import Database, open_database
from jobs.estimate import Estimator, read_cost_model
from jobs.files import Files
from jobs.jobs import Jobs
from jobs.rows import JOBS
from jobs.stage_cache import StageCache
from jobs.voices import revoke
from remix.consent import consent_of, read_consent
from remix.errors import NoConsent, NotFound
from remix.manifest import OwnVoices, TensorSpec, read_manifest, stage_of
from remix.models import choose_models, installed_voices
from remix.options import RemixOptions
from remix.settings import Settings, read_settings
from runners.convert_voice import VoiceModel
from tests.fakes import CountingInfer, FakeComposer, no_infer
from tests.test_http_api import wav

TODAY = datetime.now(UTC).date()
CONSENT: Mapping[str, Any] = {
    "who": "June",
    "statement": "statement.wav",
    "purpose": "tests",
    "given": TODAY - timedelta(days=9),
    "until": TODAY + timedelta(days=9),
}


def write_voice(models_dir: Path, name: str, consent: Mapping[str, Any] | None = CONSENT) -> str:
    """As enrolment leaves it, with an empty graph; the name of its model."""
    folder, model = models_dir / "voices" / name, f"voice-{name}-0123abcd"
    (folder / "samples").mkdir(parents=True)
    (folder / "samples" / "0000.flac").write_bytes(b"said")
    (folder / "statement.wav").write_bytes(b"allowed")
    (folder / f"{model}.onnx").write_bytes(b"")
    starter = read_manifest()["voice-starter"]
    facts = {**starter.facts, "voices": {name: {"speaker": 0, "low_hz": 90.0, "high_hz": 300.0}}}
    if consent is not None:
        facts["consent"] = dict(consent)
    entry = {
        **{key: getattr(starter, key) for key in ("stage", "weights", "licence", "source")},
        **{key: getattr(starter, key) for key in ("quality", "sample_rate_hz", "max_batch")},
        "rank": 5,
        "origin": {"kind": "enrolment"},
        "facts": facts,
        "files": [{"path": f"voices/{name}/{model}.onnx", "sha256": "0" * 64}],
    }
    (folder / "voice.toml").write_text(tomli_w.dumps({model: entry}))
    return model


# --- consent ----------------------------------------------------------------------------------


def test_consent_file_is_read_with_its_statement(tmp_path: Path) -> None:
    (tmp_path / "statement.wav").write_bytes(b"")
    (tmp_path / "consent.toml").write_text(tomli_w.dumps(CONSENT))
    assert read_consent(tmp_path / "consent.toml") == consent_of(CONSENT)


def test_no_consent_file_is_no_consent(tmp_path: Path) -> None:
    for path in (None, tmp_path / "none.toml"):
        with pytest.raises(NoConsent, match="no consent file") as caught:
            read_consent(path)
        assert caught.value.remedy and caught.value.limit


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"who": ""}, "who is empty"),
        ({"until": "tomorrow"}, "until is 'tomorrow'"),
        ({"until": datetime(2030, 1, 1, tzinfo=UTC)}, "until"),
        ({"purpose": None}, "purpose"),
    ],
)
def test_consent_that_lacks_something_is_none(change: dict[str, Any], words: str) -> None:
    with pytest.raises(NoConsent, match=words):
        consent_of({**CONSENT, **change})


@pytest.mark.parametrize("statement", ["gone.wav", "../statement.wav", "/etc/hostname"])
def test_consent_whose_statement_is_not_beside_it_is_none(tmp_path: Path, statement: str) -> None:
    (tmp_path / "statement.wav").write_bytes(b"")
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "consent.toml"
    path.write_text(tomli_w.dumps({**CONSENT, "statement": statement}))
    with pytest.raises(NoConsent, match="no such file"):
        read_consent(path)


def test_consent_holds_from_its_first_to_its_last_day() -> None:
    consent = replace(consent_of(CONSENT), given=date(2026, 1, 2), until=date(2026, 3, 4))
    for day in (date(2026, 1, 2), date(2026, 3, 4)):
        consent.require_valid(day)
    for day, words in ((date(2026, 1, 1), "begins on"), (date(2026, 3, 5), "ended on")):
        with pytest.raises(NoConsent, match=words) as caught:
            consent.require_valid(day)
        assert caught.value.value == str(day)


# --- coming and going -------------------------------------------------------------------------


def test_voice_comes_and_goes_while_the_manifest_is_in_use(tmp_path: Path) -> None:
    manifest = dict(read_manifest())
    voices = OwnVoices(manifest, tmp_path)
    assert voices.refresh() == ([], [])
    model = write_voice(tmp_path, "june")
    new, gone = voices.refresh()
    assert ([entry.name for entry in new], gone) == ([model], [])
    assert stage_of(manifest, model) == "convert_voice"
    assert ("june", manifest[model]) in installed_voices(manifest, tmp_path)
    assert voices.refresh() == ([], [])
    entry = tmp_path / "voices/june/voice.toml"
    entry.write_text(entry.read_text().replace('"tests"', '"fewer tests"'))
    assert voices.refresh() == ([], [])  # the same model, of which something else is said
    assert manifest[model].facts["consent"]["purpose"] == "fewer tests"
    entry.unlink()
    assert voices.refresh() == ([], [model])
    assert manifest == read_manifest()
    with pytest.raises(NotFound, match=model):
        stage_of(manifest, model)


def test_voice_without_consent_or_with_a_damaged_entry_is_left_out(tmp_path: Path) -> None:
    write_voice(tmp_path, "nobody", consent=None)
    write_voice(tmp_path, "broken")
    (tmp_path / "voices/broken/voice.toml").write_text("[broken")
    model = write_voice(tmp_path, "june")
    new, _ = OwnVoices(dict(read_manifest()), tmp_path).refresh()
    assert [entry.name for entry in new] == [model]


def with_installed_models(tmp_path: Path) -> Path:
    """Empty files for all that the manifest names: nothing here reads them."""
    for entry in read_manifest().values():
        for file in entry.files:
            (tmp_path / file.path).parent.mkdir(exist_ok=True, parents=True)
            (tmp_path / file.path).touch()
    return tmp_path


def test_voice_whose_consent_ended_does_not_convert(tmp_path: Path) -> None:
    models_dir = with_installed_models(tmp_path)
    write_voice(models_dir, "june")
    write_voice(models_dir, "carla", {**CONSENT, "until": TODAY - timedelta(days=1)})
    manifest = dict(read_manifest())
    OwnVoices(manifest, models_dir).refresh()
    assert choose_models(manifest, models_dir, RemixOptions(voice="june")).voice.name == "june"
    with pytest.raises(NoConsent, match="ended on"):
        choose_models(manifest, models_dir, RemixOptions(voice="carla"))
    assert choose_models(manifest, models_dir, RemixOptions()).voice.name == "allison"


def test_voice_that_is_let_go_sings_no_more() -> None:
    class Graph:
        def __init__(self) -> None:
            self.facts: dict[str, str] = {}
            self.inputs: tuple[TensorSpec, ...] = ()
            self.outputs: tuple[TensorSpec, ...] = ()

        def __call__(self, inputs: Any) -> Any:
            return {"audio": np.zeros(1)}

    model = VoiceModel(read_manifest()["voice-starter"], Graph(), "cpu")
    inputs = {"speaker": np.zeros((1, 1), np.int64)}
    assert list(model(inputs)) == ["audio"]
    model.let_go()
    with pytest.raises(NotFound, match="revoked"):
        model(inputs)


# --- revocation -------------------------------------------------------------------------------


def test_revocation_leaves_nothing_and_lists_what_went(tmp_path: Path) -> None:
    models_dir, name = (
        with_installed_models(tmp_path / "models"),
        "allison",
    )  # whom the fake composer can sing with
    settings = replace(read_settings(), models_dir=models_dir, data_dir=tmp_path / "data")
    model = write_voice(models_dir, name)
    window = {"content": np.ones((1, 4), np.float32)}
    manifest = dict(read_manifest())
    OwnVoices(manifest, models_dir).refresh()

    async def use() -> None:
        cache = StageCache(Files(settings.cache_url), 10**9, manifest, models_dir)
        infer = cache.for_song(CountingInfer())
        await infer(model, window)
        await infer("voice-starter", window)
        await cache.close()
        await make_jobs(settings, tmp_path, name)

    asyncio.run(use())
    with open_database(settings.database_url).connect() as db:
        uid = db.execute(sa.select(JOBS.c.uid).where(JOBS.c.id == "sung")).scalar_one()
    assert {"jobs", "workflow_status"} <= set(rows_with(settings, uid))
    before = files_below(tmp_path)
    deleted = revoke(name, settings, settle_s=0.0)
    left = files_below(tmp_path)
    assert not [path for path in left if model in path or "voices/" in path]
    went = {path for path in before - left if path.startswith("models/")}
    assert all(any(path in line for line in deleted) for path in went if "voice.toml" not in path)
    assert [line.split()[0] for line in deleted].count("cached") == 1
    assert len(list((tmp_path / "data/cache").rglob("*/*"))) == 1  # what the starter sang
    assert [line for line in deleted if line.startswith("job")] == ["job sung (done) and its files"]
    assert rows_with(settings, "sung") == rows_with(settings, uid) == []
    assert "jobs" in rows_with(settings, "others")
    assert len(list((tmp_path / "data/artifacts").glob("*"))) == 1
    with pytest.raises(NotFound, match="allison"):
        revoke(name, settings)


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


async def make_jobs(settings: Settings, folder: Path, name: str) -> None:
    """Two jobs, done: one in the voice, one in the other."""
    (folder / "song.wav").write_bytes(wav())
    database = Database(open_database(settings.database_url))
    composer = FakeComposer(settings, dict(read_manifest()), no_infer)
    jobs = Jobs(settings, composer, Estimator(read_cost_model()), database)
    await jobs.start()
    try:
        for job_id, voice in (("sung", name), ("others", "carlo")):
            await jobs.submit(folder / "song.wav", RemixOptions(voice=voice), "ann", job_id)
            async for _ in jobs.events(job_id, "ann"):
                pass
        while not all(await closed(database)):
            await asyncio.sleep(0.02)
    finally:
        await jobs.stop()
        database.close()


async def closed(database: Database) -> list[bool]:
    return await database.call(lambda db: list(db.execute(sa.select(JOBS.c.is_closed)).scalars()))


def rows_with(settings: Settings, text: str) -> list[str]:
    """The tables, dbos's too, of which some row has the text in any column."""
    engine = open_database(settings.database_url)
    found = []
    with engine.connect() as db:
        for table in sa.inspect(engine).get_table_names():
            rows = db.execute(sa.select(sa.text("*")).select_from(sa.table(table))).all()
            found += [table] if any(text in str(row) for row in rows) else []
    return found
