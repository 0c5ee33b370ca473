"""The runners that `bentoml serve service:Remix` starts beside the composer, and where they listen.

BentoML starts a service's dependencies as its children, on unix sockets of their own; the
composer calls them over theirs, by the Open Inference Protocol.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import bentoml

from remix.settings import PREFIX, Settings, read_settings
from remix.stages import Stage
from runners.processes import be_first, keep_and_sweep

RUNTIME_DIR = PREFIX + "RUNTIME_DIR"


def settings_with_runtime_dir() -> Settings:
    """This process's settings, with a folder for sockets that no other server uses.

    BentoML imports the service first in the process that starts the others: that one makes the
    folder, names it in the environment that they inherit, and removes it when it ends. The folder
    that a killed one left is removed by the next.
    """
    if bentoml.server_context.worker_index is None:
        be_first()
        parent = os.environ.get(RUNTIME_DIR)
        if parent:
            Path(parent).mkdir(parents=True, exist_ok=True, mode=0o700)
        # The path of a socket may have 107 characters: a short name where the folder is ours.
        prefix = "" if parent else "philharmonics-"
        os.environ[RUNTIME_DIR] = own = tempfile.mkdtemp(prefix=prefix, dir=parent)
        atexit.register(shutil.rmtree, own, ignore_errors=True)
        keep_and_sweep(Path(own), prefix)
    return read_settings()


def beside(stage: Stage, settings: Settings) -> Any:
    """The stage's runner as a dependency; None where somebody else started it."""
    if stage in settings.remote_runners:
        return None
    name = "".join(word.title() for word in stage.split("_"))
    return bentoml.depends(getattr(import_module(f"runners.{stage}"), name))
