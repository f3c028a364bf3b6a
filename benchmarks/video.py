"""Compares the video pipeline with OpenCV, torchcodec and the bare decoder.

    python -m benchmarks.video        # results/video/cpu.json, 6 minutes on 2 CPU cores

Clips of 32 out of 64 frames (32×2) are decoded from H.264 videos with a shorter side of 256 pixels,
cropped and scaled to 224×224 as in the paper's training, in batches of 8. All competitors read the
same clips and windows. The videos pan and zoom over scikit-learn's two photographs, with noise:
once with a keyframe every 250 frames, the default of x264, and once every 32, as `nonlocal_jax.data
transcode` writes them.

Each competitor is a separate process, which is stopped while the others take their turn. It decodes
as many clips at a time as there are cores, with single-threaded decoders. Numbers are medians over
the rounds.
"""

import dataclasses
import json
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks.machine import describe_run
from benchmarks.video_worker import BATCH, FRAMES, HEIGHT, RATE, WIDTH
from nonlocal_jax import files
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
LONG = 18_000  # frames of ten minutes


@dataclasses.dataclass(frozen=True)
class Config:
    """Compare the video pipeline with OpenCV, torchcodec and the bare decoder."""

    # Turns of each competitor.
    rounds: int = 12
    # Batches of 8 clips in a turn.
    batches: int = 3
    # Directory of the JSON.
    output: Path = FOLDER

    def __post_init__(self) -> None:
        for name in ("rounds", "batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")


class Worker:
    """The process of one competitor, which sleeps except during its turn."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        command = [sys.executable, "-m", "benchmarks.video_worker", name, str(folder)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.missing = (
            self._read().removeprefix("ready").strip()
        )  # the reason why it cannot run, or nothing
        self._process.send_signal(signal.SIGSTOP)

    def seconds(self, batches: int) -> float:
        """Returns the seconds that the batches take."""
        assert self._process.stdin
        self._process.send_signal(signal.SIGCONT)
        print(batches, file=self._process.stdin, flush=True)
        seconds = float(self._read())
        self._process.send_signal(signal.SIGSTOP)
        return seconds

    def _read(self) -> str:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the {self.name} process ended.")
        return line

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def photographs() -> list[np.ndarray]:
    """Returns two photographs of 427×640 pixels."""
    from sklearn.datasets import load_sample_images

    return [np.asarray(image) for image in load_sample_images().images]


def write_video(file: Path, number: int, keyframes: str, frames: int = FRAMES) -> None:
    """Writes a video that pans over one of the photographs."""
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
    """Returns the peak megabytes for reading the last clip of a video, by its length.

    Each video is read in a separate process.
    """
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
    """Returns the clips per second of each competitor by round, and why some could not run."""
    workers = [Worker(name, folder) for name in COMPETITORS]
    rounds: dict[str, list[float]] = {worker.name: [] for worker in workers if not worker.missing}
    try:
        available = [worker for worker in workers if not worker.missing]
        for turn in range(config.rounds + 1):
            for worker in available[:: -1 if turn % 2 else 1]:
                rounds[worker.name].append(BATCH * config.batches / worker.seconds(config.batches))
    finally:
        for worker in workers:
            worker.close()
    warm = {name: values[1:] for name, values in rounds.items()}
    return warm, {worker.name: worker.missing for worker in workers if worker.missing}


def ratios(rounds: dict[str, list[float]]) -> dict[str, float]:
    """Compares the pipeline with the faster of the two libraries, and with the decoder alone."""
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
        "over the faster library": statistics.median(
            pipeline / peer for pipeline, peer, _, _ in pairs
        ),
        "beyond the decoder": statistics.median(
            alone / pipeline - 1 for pipeline, _, alone, _ in pairs
        ),
        "beyond the decoder and colours": statistics.median(
            colours / pipeline - 1 for pipeline, _, _, colours in pairs
        ),
    }


def main(config: Config) -> None:
    """Measures, writes the JSON, and prints it."""
    results: dict[str, Any] = {}
    missing: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for encoding, keyframes in ENCODINGS.items():
            encoding_folder = folder / keyframes
            encoding_folder.mkdir()
            for number in range(VIDEOS):
                write_video(encoding_folder / f"{number}.mp4", number, keyframes)
            rounds, missing = side_by_side(config, encoding_folder)
            medians = {worker: statistics.median(values) for worker, values in rounds.items()}
            results[encoding] = {
                "clips_per_second": medians,
                "ratios": ratios(rounds),
                "rounds": rounds,
            }
        peaks = memory(folder)
    packages = ("av", "grain", "opencv-python", "torchcodec")
    record = {
        "environment": describe_run("video", "cpu", packages),
        "missing": missing,
        "encodings": results,
        "peak_megabytes": peaks,
    }
    config.output.mkdir(parents=True, exist_ok=True)
    files.write_text(config.output / "cpu.json", json.dumps(record, indent=1) + "\n")
    shown = {
        encoding: {k: v for k, v in measured.items() if k != "rounds"}
        for encoding, measured in results.items()
    }
    print(json.dumps({"missing": missing, "encodings": shown, "peak_megabytes": peaks}, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Config))
