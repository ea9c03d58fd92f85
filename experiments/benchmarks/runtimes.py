"""Time SegFormer in the runtimes that a CPU user may choose: torch, ONNX Runtime and OpenVINO.

    python experiments/benchmarks/runtimes.py [--variant b0] [--size H W] [--num_classes N]
        [--dtypes float32 bfloat16] [--runtimes eager ...] [--threads N] [--rounds N]

Question: how many times as fast is the fastest way to run segformer_pl as the fastest way to run
transformers, at equal weights, and how far is torch from the other runtimes? Hardware: CPU,
otherwise idle; 1.5 minutes for B0 at 512x512, and several more with compile. Expectation: the lead
is smaller than in torch alone, since a runtime fuses by itself what segformer_pl avoids.

Networks map normalised images to logits of stride 4. Runtimes:

    eager        torch without gradients
    folded       ours after ``for_inference()``, eager
    compile      torch.compile of the folded network
    onnxruntime  ONNX Runtime (float32 only)
    openvino     OpenVINO

All but eager start from our folded network. Both libraries are exported in the same way, by
``torch.onnx.export`` at this image size, and OpenVINO reads that file, too. In bfloat16, torch's
weights have that type, and OpenVINO is told to prefer it.

Every output is compared with that of transformers in float32, eager, before anything is timed: one
that differs by more than in ``speed.py`` is named and not timed, and the exit status is 1. All ways
are timed in turns; the quoted ratio is the median over rounds.
"""

import argparse
import copy
import importlib
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from speed import TOLERANCE, Call, Ours, Subject, build, check, time_in_turns
from torch import Tensor, nn

from segformer_pl.errors import UserError

RUNTIMES = ("eager", "folded", "compile", "onnxruntime", "openvino")


class Logits(nn.Module):
    """The network of a subject as a function from images to logits."""

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.network = subject.network
        self.logits = subject.logits

    def forward(self, images: Tensor) -> Tensor:
        return self.logits(images)


def folded(subject: Subject) -> Subject:
    """Return our network folded, and any other as it is."""
    return Ours(subject.network.for_inference()) if isinstance(subject, Ours) else subject


def in_torch(subject: Subject, dtype: str, images: Tensor, compiled: bool) -> Call:
    """Return the call of a copy in torch."""
    copied = type(subject)(copy.deepcopy(subject.network).to(getattr(torch, dtype)))
    inputs = images.to(getattr(torch, dtype))
    if compiled:
        copied.compile()

    @torch.inference_mode()
    def call() -> Tensor:
        return copied.logits(inputs)

    return call


def write_onnx(subject: Subject, images: Tensor, file: Path) -> None:
    """Export a network for images of this size."""
    program = torch.onnx.export(Logits(subject).eval(), (images,), dynamo=True, verbose=False)
    assert program is not None
    program.save(file)


def in_onnxruntime(file: Path, images: Tensor, threads: int) -> Call:
    """Return the call of an ONNX file in ONNX Runtime."""
    onnxruntime = importlib.import_module("onnxruntime")
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(file, settings, providers=["CPUExecutionProvider"])
    inputs = {session.get_inputs()[0].name: images.numpy()}
    return lambda: torch.from_numpy(session.run(None, inputs)[0])


def in_openvino(file: Path, images: Tensor, dtype: str, threads: int) -> Call:
    """Return the call of an ONNX file in OpenVINO."""
    openvino = importlib.import_module("openvino")
    precision = {"float32": "f32", "bfloat16": "bf16"}[dtype]
    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads}
    compiled = openvino.Core().compile_model(str(file), "CPU", settings)
    inputs = images.numpy()
    return lambda: torch.from_numpy(compiled(inputs)[0])


def calls_of(
    subject: Subject, images: Tensor, folder: Path, options: argparse.Namespace
) -> dict[tuple[str, str, str], Call]:
    """Return the calls of one library by library, runtime and data type."""
    calls: dict[tuple[str, str, str], Call] = {}
    file = folder / f"{subject.name}.onnx"
    if {"onnxruntime", "openvino"} & set(options.runtimes):
        write_onnx(folded(subject), images, file)
    for runtime in options.runtimes:
        for dtype in options.dtypes:
            if runtime == "eager":
                call = in_torch(subject, dtype, images, compiled=False)
            elif runtime == "folded":
                if folded(subject) is subject:
                    continue
                call = in_torch(folded(subject), dtype, images, compiled=False)
            elif runtime == "compile":
                call = in_torch(folded(subject), dtype, images, compiled=True)
            elif runtime == "onnxruntime":
                if dtype != "float32":
                    continue
                call = in_onnxruntime(file, images, options.threads)
            else:
                call = in_openvino(file, images, dtype, options.threads)
            calls[subject.name, runtime, dtype] = call
    return calls


def best(times: dict[str, list[float]], library: str, among: Sequence[str]) -> str:
    """Return the name of the fastest way to run a library."""
    names = [name for name in times if name.split()[0] == library and name.split()[1] in among]
    return min(names, key=lambda name: statistics.median(times[name]))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--variant", default="b0", help="b0 to b5")
    parser.add_argument("--size", type=int, nargs=2, default=(512, 512), metavar=("H", "W"))
    parser.add_argument("--num_classes", type=int, default=150)
    parser.add_argument("--dtypes", nargs="+", default=list(TOLERANCE), choices=list(TOLERANCE))
    parser.add_argument("--runtimes", nargs="+", default=list(RUNTIMES), choices=list(RUNTIMES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    subjects = build(options.variant, options.num_classes, with_smp=False)
    images = torch.randn(1, 3, *options.size)
    calls: dict[str, Any] = {}
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        with torch.inference_mode():
            expected = subjects[1].logits(images)
        for subject in subjects:
            for way, call in calls_of(subject, images, Path(folder), options).items():
                try:
                    check(call(), expected, way[2], ", ".join(way))
                except UserError as error:
                    failed = True
                    sys.stdout.write(f"not timed: {error}\n")
                    continue
                calls[" ".join(way)] = call
        times = time_in_turns(calls, options.rounds, options.threads)
    height, width = options.size
    sys.stdout.write(
        f"{options.variant}, {options.num_classes} classes, {height}x{width}, CPU, "
        f"{options.threads} threads, torch {torch.__version__}\n"
    )
    for name, seconds in times.items():
        library, runtime, dtype = name.split()
        sys.stdout.write(
            f"{library:13s} {runtime:12s} {dtype:9s} {1e3 * statistics.median(seconds):8.1f} ms "
            f"({1e3 * min(seconds):.1f} to {1e3 * max(seconds):.1f})\n"
        )
    in_process = [name for name in options.runtimes if name in ("eager", "folded", "compile")]
    for title, among in (("torch", in_process), ("all runtimes", options.runtimes)):
        ours, theirs = (best(times, name, among) for name in ("segformer_pl", "transformers"))
        ratio = statistics.median(b / a for a, b in zip(times[ours], times[theirs]))
        sys.stdout.write(f"{title}: {ours} is {ratio:.2f} x as fast as {theirs}\n")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
