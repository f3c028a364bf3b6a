"""Clips a second: this library's pipeline beside OpenCV, torchcodec, and nothing but PyAV's decoder.

    python -m benchmarks.video        # results/video/cpu.json, 6 minutes on 2 CPU cores

32 frames of 64 (32×2) of H.264 videos with a shorter side of 256 pixels, decoded, cropped and scaled to 224×224 as the paper's
training does, in batches of 8: the same clips and windows for all. The videos pan and zoom over scikit-learn's two photographs,
with noise; once with a keyframe every 250 frames, as x264 has it, and once every 32, as `nonlocal_jax.data transcode`.

Each competitor is a process of its own, stopped while the others have their turn, and decodes as many clips at a time as there
are cores, with decoders of one thread. Numbers are medians over the rounds.
"""

import dataclasses
import importlib.metadata
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks.machine import cpu_model, git_commit
from benchmarks.video_worker import BATCH, FRAMES, HEIGHT, RATE, WIDTH
from nonlocal_jax import files, training
from nonlocal_jax.data import stand_in

FOLDER = Path(__file__).parent / "results" / "video"
ENCODINGS = {"a keyframe in 250": "250", "a keyframe in 32": "32"}
COMPETITORS = (
    "pipeline",
    "decoder alone",
    "decoder and colours",
    "opencv",
    "torchcodec, exact",
    "torchcodec, approximate",
)
VIDEOS = 16
LONG = 18_000  # frames, ten minutes


@dataclasses.dataclass(frozen=True)
class Config:
    """The video pipeline beside OpenCV, torchcodec and the bare decoder."""

    rounds: int = 12  # turns of each competitor
    batches: int = 3  # of 8 clips, in a turn
    output: Path = FOLDER  # folder of the JSON

    def __post_init__(self) -> None:
        for name in ("rounds", "batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")


class Worker:
    """The process of one competitor; it sleeps but for its turn."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        command = [sys.executable, "-m", "benchmarks.video_worker", name, str(folder)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.missing = self._read().removeprefix("ready").strip()  # why it cannot run
        self._process.send_signal(signal.SIGSTOP)

    def seconds(self, batches: int) -> float:
        """Of so many batches."""
        assert self._process.stdin
        self._process.send_signal(signal.SIGCONT)
        print(batches, file=self._process.stdin, flush=True)
        found = float(self._read())
        self._process.send_signal(signal.SIGSTOP)
        return found

    def _read(self) -> str:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {self.name} ended.")
        return line

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def photographs() -> list[np.ndarray]:
    """Two, of 427×640 pixels."""
    from sklearn.datasets import load_sample_images

    return [np.asarray(image) for image in load_sample_images().images]


def write_video(file: Path, number: int, keyframes: str, frames: int = FRAMES) -> None:
    """A walk over one of the photographs."""
    photograph, rng = photographs()[number % 2], np.random.default_rng(number)
    phase, speed = rng.uniform(0, 2 * np.pi, 2), rng.uniform(0.01, 0.05, 2)
    noise = rng.normal(0, 3, (8, HEIGHT, WIDTH, 1))
    rooms = np.array(photograph.shape[:2]) - (HEIGHT, WIDTH)

    def walk() -> Iterator[np.ndarray]:
        for t in range(frames):
            row, column = np.rint(rooms * (0.5 + 0.5 * np.sin(phase + speed * t))).astype(int)
            part = photograph[row : row + HEIGHT, column : column + WIDTH]
            yield np.clip(part + noise[t % len(noise)], 0, 255).astype(np.uint8)

    options = {"g": keyframes, "preset": "ultrafast" if frames > FRAMES else "medium"}
    stand_in.write(file, walk(), rate=RATE, options=options)


def memory(folder: Path) -> dict[str, float]:
    """Megabytes that reading a clip at the end takes at the peak, each in a process of its own, by the length of the video."""
    found = {}
    for frames in (FRAMES, LONG):
        file = folder / f"{frames}.mp4"
        write_video(file, 0, "32", frames)
        command = [sys.executable, "-m", "benchmarks.video_worker", "memory", str(file)]
        found[f"{frames:,} frames"] = float(
            subprocess.run(command, check=True, capture_output=True, text=True).stdout
        )
    return found


def side_by_side(config: Config, folder: Path) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Clips a second of each competitor, by round; and why some could not run."""
    workers = [Worker(name, folder) for name in COMPETITORS]
    rounds: dict[str, list[float]] = {worker.name: [] for worker in workers if not worker.missing}
    try:
        able = [worker for worker in workers if not worker.missing]
        for turn in range(config.rounds + 1):
            for worker in able[:: -1 if turn % 2 else 1]:
                rounds[worker.name].append(BATCH * config.batches / worker.seconds(config.batches))
    finally:
        for worker in workers:
            worker.close()
    warm = {name: values[1:] for name, values in rounds.items()}
    return warm, {worker.name: worker.missing for worker in workers if worker.missing}


def ratios(rounds: dict[str, list[float]]) -> dict[str, float]:
    """Of the pipeline to the faster of the two libraries, and what it takes beyond the decoder, as a share."""
    peers = [values for name, values in rounds.items() if name.startswith(("opencv", "torchcodec"))]
    best: Sequence[float] = (
        max(peers, key=statistics.median) if peers else [float("nan")] * len(rounds["pipeline"])
    )
    pairs = list(
        zip(
            rounds["pipeline"],
            best,
            rounds["decoder alone"],
            rounds["decoder and colours"],
            strict=True,
        )
    )
    return {
        "over the faster library": statistics.median(ours / peer for ours, peer, _, _ in pairs),
        "beyond the decoder": statistics.median(alone / ours - 1 for ours, _, alone, _ in pairs),
        "beyond the decoder and colours": statistics.median(
            colours / ours - 1 for ours, _, _, colours in pairs
        ),
    }


def main(config: Config) -> None:
    """Measure, write the JSON, print it."""
    results: dict[str, Any] = {}
    missing: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for encoding, keyframes in ENCODINGS.items():
            of_encoding = folder / keyframes
            of_encoding.mkdir()
            for number in range(VIDEOS):
                write_video(of_encoding / f"{number}.mp4", number, keyframes)
            rounds, missing = side_by_side(config, of_encoding)
            medians = {who: statistics.median(values) for who, values in rounds.items()}
            results[encoding] = {
                "clips_per_second": medians,
                "ratios": ratios(rounds),
                "rounds": rounds,
            }
        peaks = memory(folder)
    versions = {
        package: importlib.metadata.version(package)
        for package in ("av", "grain", "opencv-python", "torchcodec")
        if _there(package)
    }
    record = {
        "environment": {
            "backend": "cpu",
            "versions": versions,
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "commit": git_commit(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": shlex.join(["python", "-m", "benchmarks.video", *sys.argv[1:]]),
        },
        "missing": missing,
        "encodings": results,
        "peak_megabytes": peaks,
    }
    config.output.mkdir(parents=True, exist_ok=True)
    files.write_text(config.output / "cpu.json", json.dumps(record, indent=1) + "\n")
    shown = {
        encoding: {k: v for k, v in found.items() if k != "rounds"}
        for encoding, found in results.items()
    }
    print(json.dumps({"missing": missing, "encodings": shown, "peak_megabytes": peaks}, indent=1))


def _there(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main(tyro.cli(Config))
