"""The peer of part `dcp`: torch.distributed.checkpoint saves the same state and flushes it. Prints one JSON line."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
import warnings
from pathlib import Path

import torch
from safetensors import safe_open
from torch.distributed.checkpoint import HuggingFaceStorageWriter, save


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state", required=True, help="folder of a state that we have saved")
    parser.add_argument("--folder", required=True, help="where to save; emptied")
    parser.add_argument("--saves", type=int, required=True)
    options = parser.parse_args()

    state = {}
    for path in sorted(Path(options.state).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            state |= {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    seconds = [one_save(state, Path(options.folder)) for _ in range(options.saves)]
    print(json.dumps({"seconds": seconds}))


def one_save(state: dict[str, torch.Tensor], folder: Path) -> float:
    """Seconds until the state is on the disk. There are no hashes in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save(state, storage_writer=HuggingFaceStorageWriter(path=str(folder)), no_dist=True)
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    shutil.rmtree(folder)
    return seconds


if __name__ == "__main__":
    main()
