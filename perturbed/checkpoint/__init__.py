"""Checkpoints that survive anything: written atomically, checked when read.

``save_checkpoint`` and ``load_checkpoint`` take whatever has a ``state_dict``; :class:`Checkpoints`
keeps the last few of a run and finds the newest good one. A process killed at any moment leaves the
previous file, whole; a file that was cut or changed is noticed when it is read.

The file is what ``torch.load(weights_only=True)`` reads: a dictionary of plain values and tensors.
docs/checkpoints.md has the rest.
"""

from .file import DamagedCheckpointError, load_checkpoint, read_checkpoint, save_checkpoint
from .folder import Checkpoints
from .parts import CheckpointError

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "DamagedCheckpointError",
    "load_checkpoint",
    "read_checkpoint",
    "save_checkpoint",
]
