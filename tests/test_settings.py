"""Settings: from variables or from files; a wrong value ends the process with its name."""

from __future__ import annotations

from pathlib import Path

import pytest

from remix.settings import read_settings

URL = "postgresql://jobs@db/jobs"


def test_setting_can_come_from_a_file_and_the_file_wins(tmp_path: Path) -> None:
    (tmp_path / "url").write_text(URL + "\n")
    named = {"PHILHARMONICS_DATABASE_FILE": str(tmp_path / "url")}
    assert read_settings(named).database == URL
    assert read_settings({"PHILHARMONICS_DATABASE": "other", **named}).database == URL


def test_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"PHILHARMONICS_DATABASE_FILE is '.*gone'"):
        read_settings({"PHILHARMONICS_DATABASE_FILE": str(tmp_path / "gone")})


@pytest.mark.parametrize(
    ("name", "value"), [("THREADS", "0"), ("MAX_REMIXES", "many"), ("DEVICE", "tpu")]
)
def test_wrong_value_ends_with_its_name(name: str, value: str) -> None:
    with pytest.raises(SystemExit, match=f"PHILHARMONICS_{name} is '{value}'"):
        read_settings({f"PHILHARMONICS_{name}": value})
