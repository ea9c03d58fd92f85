"""Measure the peak memory of `predict` as a function of the image size.

    python experiments/benchmarks/predict_memory.py [--sizes WxH ...] [--window N]
        [--probabilities]

For each size, the command runs in its own process, with SegFormer-B0 after one training step, on
one smooth random image with sliding windows. The peak is the maximum resident set size reported by
the kernel. The first size is a single window, so it shows the memory of libraries and network.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

from segformer_pl.data import shapes

MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    sizes = ["512x512", "2000x1500", "4000x3000", "8000x6000"]
    parser.add_argument("--sizes", nargs="+", default=sizes, metavar="WxH", help="image sizes")
    parser.add_argument("--window", type=int, default=512, help="side of the windows in pixels")
    parser.add_argument("--probabilities", action="store_true", help="also write probabilities")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_checkpoint(Path(folder))
        sys.stdout.write(
            f"{'image':>12} {'pixels, MiB as RGB':>20} {'peak, MiB':>10} {'seconds':>8}\n"
        )
        for size in options.sizes:
            width, height = map(int, size.split("x"))
            small = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
            image = Path(folder) / f"{size}.png"
            cv2.imwrite(str(image), cv2.resize(small, (width, height)))
            window = f"[{options.window},{options.window}]"
            command = [
                *(sys.executable, "-m", "segformer_pl", "predict", "--device=cpu"),
                *(f"--ckpt={checkpoint}", f"--input={image}", f"--output={folder}/out"),
                *(f"--inference.window={window}", f"--inference.stride={window}"),
                *(["--probabilities"] if options.probabilities else []),
            ]
            began = time.perf_counter()
            peak = peak_memory(command)
            seconds = time.perf_counter() - began
            pixels = 3 * width * height / MIB
            sys.stdout.write(f"{size:>12} {pixels:>20.0f} {peak / MIB:>10.0f} {seconds:>8.0f}\n")
            sys.stdout.flush()


def write_checkpoint(folder: Path) -> Path:
    """Write the checkpoint of a training of one step, with practically random weights."""
    shapes.generate(folder / "data", {"train": 2, "validation": 1})
    settings = {
        "model.network": "segformer_pl.models.segformer_b0",
        "data.path": folder / "data",
        "data.batch_size": 2,
        "data.num_workers": 0,
        "trainer.accelerator": "cpu",
        "trainer.max_steps": 1,
        "trainer.limit_val_batches": 0,
        "trainer.logger.save_dir": folder,
    }
    arguments = [f"--{key}={value}" for key, value in settings.items()]
    command = [sys.executable, "-m", "segformer_pl", "fit", *arguments]
    subprocess.run(command, check=True, capture_output=True)
    (checkpoint,) = folder.rglob("last.ckpt")
    return checkpoint


def peak_memory(command: list[str]) -> int:
    """Run a command and return its peak memory in bytes."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    errors = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed:\n{errors}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
