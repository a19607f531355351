"""What an offline run of W&B wrote: its framing (LevelDB's log format) read here, its records by wandb's own types."""

import json
import struct
from pathlib import Path

from wandb.proto import wandb_internal_pb2

BLOCK = 32768


def read_run(folder: Path) -> "Run":
    """The one run of W&B in the folder of a run."""
    [file] = folder.glob("wandb/offline-run-*/run-*.wandb")
    return Run(file)


class Run:
    """Config, figures by key in the order of logging, artifacts and the run's own record."""

    def __init__(self, file: Path) -> None:
        self.files = file.parent / "files"
        self.config, self.history, self.artifacts, self.run = {}, [], [], None
        self.axes = {}
        for data in frames(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            kind = record.WhichOneof("record_type")
            if kind == "run":
                self.run = record.run
                self.config |= nested(record.run.config.update)
            elif kind == "config":
                self.config |= nested(record.config.update)
            elif kind == "history":
                self.history.append(nested(record.history.item))
            elif kind == "artifact":
                self.artifacts.append(record.artifact)
            elif kind == "metric":
                self.axes[record.metric.name or record.metric.glob_name] = record.metric.step_metric

    def logged(self, key: str) -> list:
        """All values of a key."""
        return [row[key] for row in self.history if key in row]

    def images(self, key: str) -> list[list[Path]]:
        """Files of the images that were logged, a list each time."""
        found = []
        for value in self.logged(key):
            names = value.get("filenames") or [value["path"]]
            found.append([self.files / name for name in names])
        return found


def nested(items) -> dict:
    """Items with a key each, or the keys that lead to them, as one dictionary."""
    whole = {}
    for item in items:
        *above, last = [item.key] if item.key else item.nested_key
        place = whole
        for key in above:
            place = place.setdefault(key, {})
        place[last] = json.loads(item.value_json)
    return whole


def frames(data: bytes):
    """The records of a log: pieces of at most a block, put together."""
    assert data[:4] == b":W&B"
    place, held = 7, b""
    while place + 7 <= len(data):
        left = BLOCK - place % BLOCK
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        if kind == 0:
            place += left
            continue
        held += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or its last piece
            yield held
            held = b""
