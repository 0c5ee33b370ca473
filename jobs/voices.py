"""Revoke an enrolled voice: everything that is of it goes, and what went is listed.

    python -m jobs.voices remove NAME      (`philharmonics voices remove NAME`)

Gone are its folder (model, samples, statement, training), the windows that it sang in the stage
cache, and the jobs that it sang in, with their files. The running service lets the model go within
a second; its name stays in that process's metrics and in logs. Not reached: results that somebody
has fetched, and backups.
"""

from __future__ import annotations

import asyncio
import shutil
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path

import click
import sqlalchemy as sa

from jobs.database import Database, open_database
from jobs.files import Files
from jobs.job import ENDED
from jobs.rows import EVENTS, JOBS, PLAYED, Row, Rows, row_of
from jobs.stage_cache import folder_of
from jobs.workflow import forget_workflows
from remix.errors import NotFound, RemixError
from remix.manifest import VOICE_FILE, VOICES_DIR
from remix.settings import Settings, read_settings

SETTLE_S = 3.0
"""A runner lets a revoked voice go within a second; what it still sang is in the cache by then."""


def revoke(name: str, settings: Settings, settle_s: float = SETTLE_S) -> list[str]:
    """Delete a voice; what was deleted, a line each.

    Args:
        name: of the voice.
        settings: where the service keeps things.
        settle_s: how long a service that runs is given to let it go.

    Raises:
        NotFound: no such voice is enrolled.
        StorageUnavailable: the cache or the database cannot be reached; call it again then.
    """
    folder = settings.models_dir / VOICES_DIR / name
    known = sorted(path.name for path in folder.parent.glob("*") if path.is_dir())
    if name not in known:
        raise NotFound(
            f"No voice {name!r} is enrolled in {folder.parent}; there are "
            f"{', '.join(known) or 'none'}.",
            value=name,
            limit=known,
            remedy="Use one of these names." if known else "Nothing is left to revoke.",
        )
    models = _models(folder / VOICE_FILE)
    deleted = []
    if models:  # its folder goes last: who is cut off begins again, and still finds it
        (folder / VOICE_FILE).rename(folder / f"{VOICE_FILE}.revoked")
        deleted.append(f"manifest entry of {', '.join(models)}")
        time.sleep(settle_s)
    else:
        models = _models(folder / f"{VOICE_FILE}.revoked")
    deleted += asyncio.run(_forget_jobs(name, settings))
    deleted += _empty_cache(models, settings)
    deleted += [str(path) for path in sorted(folder.rglob("*")) if path.is_file()]
    shutil.rmtree(folder)
    return deleted


def _models(entry: Path) -> list[str]:
    return list(tomllib.loads(entry.read_text())) if entry.is_file() else []


def _empty_cache(models: Sequence[str], settings: Settings) -> list[str]:
    files = Files(settings.cache_url)
    try:
        found = [file.path for model in models for file in files.find(folder_of(model))]
        files.delete([folder_of(model).rstrip("/") for model in models])
        return [f"cached {path}" for path in found]
    finally:
        files.close()


async def _forget_jobs(name: str, settings: Settings) -> list[str]:
    """Delete the voice's ended jobs; stop the others, which the service then deletes."""
    database = Database(open_database(settings.database_url))
    files = Files(settings.artifacts_url)
    rows = Rows(database, retention_s=0.0)

    def find(db: sa.Connection) -> list[Row]:
        found = [row_of(row) for row in db.execute(sa.select(JOBS))]
        return [row for row in found if row.job.options.voice == name]

    def stop(db: sa.Connection, uids: Sequence[str]) -> list[str]:
        for uid in uids:
            rows.end_in(db, uid, "cancelled", JOBS.c.state.not_in(ENDED))
        # Those at work are stopped by their composer, which deletes them at its next sweep.
        db.execute(sa.update(JOBS).where(JOBS.c.uid.in_(uids)).values(expires_s=0.0))
        of_these = sa.and_(JOBS.c.uid.in_(uids), JOBS.c.is_closed)
        return list(db.execute(sa.select(JOBS.c.uid).where(of_these)).scalars())

    def forget(db: sa.Connection, uids: Sequence[str]) -> None:
        for table in (PLAYED, EVENTS, JOBS):
            db.execute(sa.delete(table).where(table.c.uid.in_(uids)))

    try:
        jobs: list[Row] = await database.call(find)
        uids = [row.uid for row in jobs]
        closed = await database.call(lambda db: stop(db, uids))
        await files.run(files.delete, uids)
        if closed:
            await asyncio.to_thread(forget_workflows, settings.database_url, closed)
            await database.call(lambda db: forget(db, closed))
        return [f"job {row.job.id} ({row.job.state}) and its files" for row in jobs]
    finally:
        files.close()
        database.close()


@click.group()
def main() -> None:
    """Voices that were enrolled on this machine."""


@main.command()
@click.argument("name")
def remove(name: str) -> None:
    """Revoke the voice NAME, and list what was deleted."""
    try:
        deleted = revoke(name, read_settings())
    except RemixError as error:
        raise click.ClickException(str(error)) from error
    for line in deleted:
        click.echo(f"deleted: {line}")
    click.echo(f"{name} is revoked: {len(deleted)} deleted.")


if __name__ == "__main__":
    main()
