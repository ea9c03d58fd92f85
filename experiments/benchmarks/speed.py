"""Time SegFormer at equal weights: segformer_pl, transformers and segmentation_models_pytorch.

    python experiments/benchmarks/speed.py [--variants b0 b2] [--dtypes float32 bfloat16]
        [--tasks inference labels training file] [--modes eager] [--size H W] [--num_classes N]
        [--batch_size N] [--device cpu|cuda] [--threads N] [--rounds N] [--output FILE.csv]

Question: how many times as fast is segformer_pl, with the same weights and the same outputs? Each
combination of task, data type and mode is a group. All implementations of a group are timed in
turns within one process, so that a change of load meets all of them, and the quoted speed is the
median over rounds of the ratio to transformers. Hardware: any; on two cores about a minute for each
group of B0 at 512x512 and five for B2.

Tasks, all on images of --size:

    inference  normalised images to logits of stride 4, without gradients
    labels     normalised images to a class index for every pixel, without gradients
    training   forward pass, cross-entropy at full resolution, backward pass, AdamW (fused)
    file       a JPEG file to a mask of its size: ours by Predictor, theirs by their image
               processor, network and post-processing (transformers only; batch of 1, eager)

In bfloat16 the weights of inference have that type; training uses autocast. Float32 is computed in
32 bits on a GPU, too, without TF32. Modes: eager; compile,
which is torch.compile; graphs, which is torch.compile with CUDA graphs ("reduce-overhead").

Nothing is timed before its output has been compared with that of transformers in float32 (for
smp, with that of our network on smp's weights). Outputs that differ by more than 1e-4 (float32) or
5e-2 (bfloat16) of the largest value are an error, and so is a file whose mask differs in more than
0.1 % of the pixels.
"""

import argparse
import copy
import csv
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from segformer_pl.checkpoints import load_weights
from segformer_pl.inference import Predictor, predict_classes
from segformer_pl.losses import CrossEntropy
from segformer_pl.models import segformer
from segformer_pl.models.mit_block import NormEps

IGNORED = 255
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
LEAST_AGREEMENT = 0.999  # of the pixels of a mask
MODES: dict[str, dict[str, Any] | None] = {
    "eager": None,
    "compile": {},
    "graphs": {"mode": "reduce-overhead"},
}
Call = Callable[[], Any]


class Subject:
    """A library's network, and what its user calls for logits, labels and loss."""

    name: str
    network: nn.Module

    def logits(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def labels(self, images: Tensor) -> Tensor:
        full = F.interpolate(self.logits(images), images.shape[2:], mode="bilinear")
        return full.argmax(dim=1)

    def loss(self, images: Tensor, target: Tensor) -> Tensor:
        full = F.interpolate(self.logits(images), target.shape[1:], mode="bilinear")
        return F.cross_entropy(full, target, ignore_index=IGNORED)


class Ours(Subject):
    def __init__(self, network: nn.Module) -> None:
        self.name, self.network, self.criterion = "segformer_pl", network, CrossEntropy("valid")

    def logits(self, images: Tensor) -> Tensor:
        return self.network(images)

    def labels(self, images: Tensor) -> Tensor:
        return predict_classes(self.network, images, (images.shape[2], images.shape[3]))

    def loss(self, images: Tensor, target: Tensor) -> Tensor:
        return self.criterion(self.network(images), target, IGNORED)


class Transformers(Subject):
    def __init__(self, network: nn.Module) -> None:
        self.name, self.network = "transformers", network

    def logits(self, images: Tensor) -> Tensor:
        return self.network(images).logits

    def loss(self, images: Tensor, target: Tensor) -> Tensor:
        return self.network(images, labels=target).loss


class Smp(Subject):
    """smp's network upsamples its logits itself, to the size of the images."""

    def __init__(self, network: nn.Module) -> None:
        self.name, self.network = "smp", network

    def logits(self, images: Tensor) -> Tensor:
        network = self.network
        return network.segmentation_head[0](network.decoder(network.encoder(images)))

    def labels(self, images: Tensor) -> Tensor:
        return self.network(images).argmax(dim=1)

    def loss(self, images: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(self.network(images), target, ignore_index=IGNORED)


def build(variant: str, num_classes: int, libraries: Sequence[str]) -> list[Subject]:
    """Return our network and its rivals, with the same weights, in float32 on the CPU."""
    ours = getattr(segformer, f"segformer_{variant}")(num_classes, drop_path_rate=0.0, dropout=0.0)
    arguments = ours.init_args()
    depths = arguments["encoder"]["init_args"]["depths"]
    embed_dims = arguments["encoder"]["init_args"]["embed_dims"]
    theirs = build_transformers(embed_dims, depths, arguments["decoder_dim"], num_classes)
    load_weights(ours, theirs.state_dict())
    ours.eval()
    subjects: list[Subject] = [Ours(ours), Transformers(theirs)]
    if "smp" in libraries:
        network = build_smp(variant, arguments["decoder_dim"], num_classes)
        twin = copy.deepcopy(ours)
        twin.encoder.norm_eps = NormEps(0.5, 0.5)  # smp's epsilons are read from its network
        load_weights(twin, network.state_dict())
        images = torch.randn(1, 3, 128, 128)
        with torch.no_grad():
            check(Smp(network).logits(images), twin.eval()(images), "float32", f"smp, {variant}")
        subjects.append(Smp(network))
    return subjects


def build_transformers(
    embed_dims: Sequence[int], depths: Sequence[int], decoder_dim: int, num_classes: int
) -> nn.Module:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    config = SegformerConfig(
        hidden_sizes=list(embed_dims),
        depths=list(depths),
        decoder_hidden_size=decoder_dim,
        num_labels=num_classes,
        semantic_loss_ignore_index=IGNORED,
        drop_path_rate=0.0,
        classifier_dropout_prob=0.0,
    )
    return randomize_statistics(SegformerForSemanticSegmentation(config)).eval()


def build_smp(variant: str, decoder_dim: int, num_classes: int) -> nn.Module:
    import segmentation_models_pytorch as smp

    network = smp.Segformer(
        f"mit_{variant}",
        encoder_weights=None,
        decoder_segmentation_channels=decoder_dim,
        classes=num_classes,
    )
    for module in network.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
        if isinstance(module, nn.Dropout | nn.Dropout2d):
            module.p = 0.0
    return randomize_statistics(network).eval()


def randomize_statistics(network: nn.Module) -> nn.Module:
    """Give every BatchNorm statistics that are not those of an untrained network."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2.0)
    return network


def check(result: Tensor, expected: Tensor, dtype: str, what: str) -> None:
    """Exit with a sentence if two outputs differ by more than their data type explains."""
    difference = (result.float() - expected.float()).abs().max() / expected.float().abs().max()
    if not difference <= TOLERANCE[dtype]:
        sys.exit(f"error: {what}: the outputs differ by {difference:.1e} of the largest value")


def inference(
    subject: Subject, task: str, dtype: str, mode: str, images: Tensor, expected: Tensor
) -> Call:
    """Return the call to be timed, after its logits have been compared with ``expected``."""
    network = copy.deepcopy(subject.network).to(images.device, getattr(torch, dtype)).eval()
    images = images.to(getattr(torch, dtype))
    if MODES[mode] is not None:
        network.compile(**MODES[mode])
    measured = type(subject)(network)
    with torch.inference_mode():
        if subject.name != "smp":  # whose weights are its own; build has compared its logits
            what = f"{subject.name}, {dtype}, {mode}"
            check(measured.logits(images), expected, dtype, what)

    @torch.inference_mode()
    def call() -> Tensor:
        return measured.labels(images) if task == "labels" else measured.logits(images)

    return call


def training(
    subject: Subject, dtype: str, mode: str, images: Tensor, target: Tensor, expected: float
) -> Call:
    """Return one training step as a call, after its first loss has been compared."""
    network = copy.deepcopy(subject.network).to(images.device).eval()  # statistics as loaded
    if MODES[mode] is not None:
        network.compile(**MODES[mode])
    measured = type(subject)(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-6, fused=True)

    def call() -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = measured.loss(images, target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    loss = call()
    if subject.name != "smp":
        what = f"training, {subject.name}, {dtype}, {mode}"
        check(loss.cpu(), torch.tensor(expected), dtype, what)
    network.train()
    return call


def from_file(subject: Subject, file: Path, num_classes: int, device: str) -> Call:
    """Return the call that makes a mask of a file, as each library documents it."""
    network = copy.deepcopy(subject.network).to(device).eval()
    if subject.name == "segformer_pl":
        predictor = Predictor(network, [f"class {n}" for n in range(num_classes)])
        return lambda: predictor(file)
    from transformers import SegformerImageProcessor

    processor = SegformerImageProcessor(do_resize=False)

    @torch.inference_mode()
    def call() -> Any:
        with Image.open(file) as image:
            image = image.convert("RGB")
            inputs = processor(image, return_tensors="pt").to(device)
            size = image.height, image.width
        outputs = network(**inputs)
        return (
            processor.post_process_semantic_segmentation(outputs, target_sizes=[size])[0]
            .cpu()
            .numpy()
        )

    return call


def write_image(file: Path, height: int, width: int) -> None:
    """Write a JPEG with about as many details as a photograph."""
    random = np.random.default_rng(0)
    pixels = np.zeros((height, width, 3))
    for cells, weight in ((4, 80), (16, 40), (64, 20), (256, 10)):
        noise = random.uniform(-1, 1, (cells, cells, 3)) * 0.5 + 0.5
        image = Image.fromarray((255 * noise).astype(np.uint8)).resize((width, height))
        pixels += weight / 150 * np.asarray(image)
    Image.fromarray(pixels.astype(np.uint8)).save(file, quality=90)


def peak_memory(call: Call) -> float | None:
    """Return the peak of CUDA's allocator during a call, in MB; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def time_in_turns(calls: dict[str, Call], rounds: int, threads: int) -> dict[str, list[float]]:
    """Return the seconds of each call in each round."""
    timers = {
        name: Timer("call()", globals={"call": call}, num_threads=threads)
        for name, call in calls.items()
    }
    # CUDA calls of a millisecond are repeated to fill a tenth of a second.
    numbers = {
        name: max(1, min(50, round(0.1 / max(timer.timeit(2).mean, 1e-4))))
        for name, timer in timers.items()
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, timer in timers.items():
            times[name].append(timer.timeit(numbers[name]).mean)
    return times


def measure(
    variant: str, task: str, dtype: str, mode: str, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return the rows of one group, one for each implementation."""
    torch.manual_seed(0)
    subjects = build(variant, options.num_classes, options.libraries)
    height, width = options.size
    images = torch.randn(options.batch_size, 3, height, width, device=options.device)
    target = torch.randint(options.num_classes, (options.batch_size, height, width))
    target[:, :, : width // 10] = IGNORED
    target = target.to(options.device)
    reference = Transformers(copy.deepcopy(subjects[1].network).to(options.device))
    with torch.no_grad():
        logits = reference.logits(images)
        loss = reference.loss(images, target).item()
        with FlopCounterMode(display=False) as counter:
            subjects[0].network(images[:1].cpu())
    calls: dict[str, Call] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "image.jpg")
        write_image(file, height, width)
        for subject in subjects:
            if task == "file" and subject.name == "smp":
                continue
            if task == "training":
                call = training(subject, dtype, mode, images, target, loss)
            elif task == "file":
                call = from_file(subject, file, options.num_classes, options.device)
            else:
                call = inference(subject, task, dtype, mode, images, logits)
            calls[subject.name] = call
            for _ in range(3):  # compilation, CUDA graphs, autotuning
                call()
        if task == "file":
            agreement = (calls["segformer_pl"]() == calls["transformers"]()).mean()
            if agreement < LEAST_AGREEMENT:
                sys.exit(f"error: file, {variant}: {agreement:.2%} of the pixels agree")
        memory = {name: peak_memory(call) for name, call in calls.items()}
        times = time_in_turns(calls, options.rounds, options.threads)
    rows = []
    for name, seconds in times.items():
        ratios = [t / s for t, s in zip(times["transformers"], seconds)]
        rows.append(
            {
                "variant": variant,
                "task": task,
                "dtype": dtype,
                "mode": mode,
                "library": name,
                "batch": 1 if task == "file" else options.batch_size,
                "height": height,
                "width": width,
                "classes": options.num_classes,
                "ms": 1e3 * statistics.median(seconds),
                "ms_min": 1e3 * min(seconds),
                "ms_max": 1e3 * max(seconds),
                "times_as_fast": statistics.median(ratios),
                "peak_mb": memory[name],
                "our_gflop_per_image": counter.get_total_flops() / 1e9,
            }
        )
    return rows


def line(row: dict[str, Any]) -> str:
    memory = "" if row["peak_mb"] is None else f", peak {row['peak_mb']:,.0f} MB"
    return (
        f"{row['variant']} {row['task']:9s} {row['dtype']:8s} {row['mode']:7s} "
        f"{row['library']:12s} {row['ms']:9.2f} ms ({row['ms_min']:.2f} to {row['ms_max']:.2f}), "
        f"{row['times_as_fast']:5.2f} x transformers{memory}\n"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--variants", nargs="+", default=["b0", "b2"], help="b0 to b5")
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=["inference", "labels", "training", "file"],
        choices=["inference", "labels", "training", "file"],
    )
    parser.add_argument("--dtypes", nargs="+", default=list(TOLERANCE), choices=list(TOLERANCE))
    parser.add_argument("--modes", nargs="+", default=["eager"], choices=list(MODES))
    parser.add_argument(
        "--libraries", nargs="+", default=["smp"], choices=["smp", "none"], help="further rivals"
    )
    parser.add_argument("--size", type=int, nargs=2, default=(512, 512), metavar=("H", "W"))
    parser.add_argument("--num_classes", type=int, default=150)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", help="CSV file, to which the rows are appended")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    groups = [
        (variant, task, dtype, mode)
        for variant in options.variants
        for task in options.tasks
        for dtype in options.dtypes
        for mode in options.modes
        if task != "file" or (dtype, mode) == ("float32", "eager")
    ]
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    sys.stdout.write(
        f"batch {options.batch_size}, {options.num_classes} classes, "
        f"{options.size[0]}x{options.size[1]}, {device}, {options.threads} threads, "
        f"torch {torch.__version__}\n"
    )
    for group in tqdm(groups, unit="group", leave=False):
        torch.compiler.reset()
        rows = measure(*group, options)
        with tqdm.external_write_mode():
            for row in rows:
                sys.stdout.write(line(row))
            sys.stdout.flush()
        if options.output:
            file = Path(options.output)
            with file.open("a", newline="") as stream:
                writer = csv.DictWriter(stream, rows[0])
                if stream.tell() == 0:
                    writer.writeheader()
                writer.writerows(rows)


if __name__ == "__main__":
    main()
