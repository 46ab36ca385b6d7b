"""Reads back what an offline W&B run wrote: a log of checksummed records, each a protocol buffer."""

import json
import struct
import zlib
from pathlib import Path

BLOCK, HEADER = 32768, 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(path):
    """The records of a ``.wandb`` file, up to where its writer was killed."""
    data = Path(path).read_bytes()
    assert data.startswith(b":W&B"), f"{path} is no .wandb file"
    at, record = HEADER, b""
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:  # what is left of a block is padding
            at += BLOCK - at % BLOCK
            continue
        checksum, length, kind = struct.unpack_from("<IHB", data, at)
        part = data[at + HEADER : at + HEADER + length]
        if kind not in (FULL, FIRST, MIDDLE, LAST) or len(part) < length:
            return
        assert zlib.crc32(bytes([kind]) + part) == checksum
        at += HEADER + length
        record = part if kind in (FULL, FIRST) else record + part
        if kind in (FULL, LAST):
            yield record


class WandbRun:
    """``id``, ``config``, ``history``, ``summary``, ``x_axes`` by metric, ``files``, ``artifacts`` and ``exit_code`` of a run."""

    def __init__(self, path):
        from wandb.proto.wandb_internal_pb2 import Record

        self.config, self.summary, self.x_axes = {}, {}, {}
        self.history, self.files, self.artifacts = [], [], []
        self.exit_code = None
        for raw in records(path):
            record = Record.FromString(raw)
            kind = record.WhichOneof("record_type")
            if kind == "run":
                self.id, self.project, self.group = record.run.run_id, record.run.project, record.run.run_group
                self.name, self.entity, self.tags = record.run.display_name, record.run.entity, list(record.run.tags)
                self.config |= _values(record.run.config.update)
            elif kind == "config":
                self.config |= _values(record.config.update)
            elif kind == "history":
                self.history.append(_values(record.history.item))
            elif kind == "summary":
                self.summary |= _values(record.summary.update)
            elif kind == "metric":
                self.x_axes[record.metric.name or record.metric.glob_name] = record.metric.step_metric
            elif kind == "files":
                self.files += [file.path for file in record.files.files]
            elif kind == "artifact":
                artifact = record.artifact
                self.artifacts.append((artifact.type, artifact.name, [e.path for e in artifact.manifest.contents]))
            elif kind == "exit":
                self.exit_code = record.exit.exit_code

    def curve(self, name):
        """``{training step: value}``."""
        return {line["trainer/global_step"]: line[name] for line in self.history if name in line}


def _values(items):
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
