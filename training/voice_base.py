"""the starter voice's training -> the weights that an enrolment starts from, fp16 safetensors.

    python -m training.voice_base --checkpoint FOLDER --out starter/voice-base.safetensors

FOLDER is one of `training.convert_voice`. The served starter graph does not do: it lacks the
posterior encoder, without which there is no KL, and its weight norms are fused. Left out is what
is not trained (the fork's pitch predictor) and the optimizer's state.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from remix.errors import InvalidModel

BASE = Path(__file__).resolve().parent.parent / "starter" / "voice-base.safetensors"

NOT_TRAINED = ("net.f0_decoder.", "mel_loss.")
SPEAKERS = "net.emb_g.weight"


def write_base(folder: Path, out: Path) -> None:
    """The base out of a training folder."""
    description = json.loads((folder / "model.json").read_text())
    checkpoint = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
    weights = {
        name: tensor.to(torch.float16).contiguous()
        for name, tensor in checkpoint["trainer"].items()
        if not name.startswith(NOT_TRAINED)
    }
    said = {
        "network": json.dumps(description["options"]["network"]),
        "speakers": json.dumps(description["speakers"]),
        "step": str(checkpoint["step"]),
        "training_command": "python -m training.convert_voice",
        "licence": "CC-BY-SA-3.0",
        "source": "Debian asterisk-core-sounds-en-g722 and -it-g722 1.6.1-1",
    }
    save_file(weights, out, metadata=said)


def load_base(trainer: Any, path: Path) -> None:
    """Start a trainer of one or more new speakers from a base: each as the mean of its speakers.

    Args:
        trainer: a `training.convert_voice.VoiceTrainer`.
        path: of the base.

    Raises:
        InvalidModel: the base is of another network.
    """
    with safe_open(path, "pt") as file:
        names: list[str] = list(file.keys())
        weights: dict[str, Tensor] = {name: file.get_tensor(name).float() for name in names}
        network = json.loads(file.metadata()["network"])
    if network != json.loads(json.dumps(trainer.options.network)):
        raise InvalidModel(f"{path} is of another network than the one to be trained.")
    n_speakers = trainer.net.emb_g.num_embeddings
    weights[SPEAKERS] = weights[SPEAKERS].mean(0, keepdim=True).repeat(n_speakers, 1)
    missing, unknown = trainer.load_state_dict(weights, strict=False)
    wanting = [name for name in missing if not name.startswith(NOT_TRAINED)]
    if wanting or unknown:
        raise InvalidModel(f"{path} lacks {wanting[:3]}, and has {unknown[:3]} for nothing.")


def base_licence(path: Path = BASE) -> str:
    """Of the base, which a voice that is made of it is a derivative of."""
    with safe_open(path, "pt") as file:
        return str(file.metadata()["licence"])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=BASE)
    parsed = parser.parse_args()
    write_base(parsed.checkpoint, parsed.out)
    print(f"{parsed.out}: {parsed.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
