"""The provenance of a run, for its report."""

from dataclasses import dataclass
from datetime import datetime

from segformer_pl.analysis.provenance import FINISHED, RunPart
from segformer_pl.analysis.run import Run

MAIN_PACKAGES = ("python", "segformer_pl", "torch", "CUDA", "lightning")  # named first


@dataclass(frozen=True)
class PartFacts:
    """A part of a run, as the report shows it.

    Attributes:
        title: Which part it is, such as ``from step 400``.
        facts: Facts by name.
        command: Command line, or empty.
    """

    title: str
    facts: dict[str, str]
    command: str


def describe_parts(run: Run) -> list[PartFacts]:
    """Return the parts of a run in the order of their starts; only the last one has a throughput.

    The duration of a run of several parts is the sum of theirs.
    """
    described = []
    for part in run.parts:
        facts = {
            "started": f"{datetime.fromisoformat(part.started):%Y-%m-%d %H:%M:%S UTC%z}",
            "ended": _end(part, part is run.parts[-1]),
            "duration": _duration(part),
            "hardware": part.hardware,
            "code": _code(part),
            "packages": _versions(part.versions),
        }
        title = f"{part.stage} from step {part.step:,}, {facts['started']}"
        facts = {name: fact for name, fact in facts.items() if fact}
        described.append(PartFacts(title, facts, part.command))
    if described:
        last = described[-1].facts
        if len(described) > 1:
            total = sum(part.seconds for part in run.parts)
            last["duration"] += f" ({len(described)} parts in all: {duration_text(total)})"
        if run.throughput is not None:
            first, end = run.throughput.first_step + 1, run.throughput.last_step
            last["throughput"] = (
                f"{run.throughput.images_per_second:,.1f} training images per second "
                f"(steps {first:,} to {end:,}, without validations)"
            )
    return described


def unfinished(run: Run, max_steps: int | None) -> str | None:
    """Return one sentence if the last part of a run has not finished, or None.

    Args:
        run: The run.
        max_steps: Number of steps that the training was to make, if it is known.
    """
    if not run.parts or run.parts[-1].end == FINISHED:
        return None
    part = run.parts[-1]
    step = _last_step(part) + (f" of {max_steps:,}" if max_steps else "")
    if part.end:
        what = {"fit": f"Stopped at {step}", "validate": "The validation stopped"}
        return f"{what.get(part.stage, 'The test stopped')}: {part.end}"
    if part.is_ended:  # in a file of an earlier version, which does not tell how
        return None
    after = f" after {step}" if part.stage == "fit" and part.last_step is not None else ""
    return (
        f"No end is recorded{after}: the run was killed, as by SIGKILL, or still ran when this "
        "report was written"
    )


def duration_text(seconds: float) -> str:
    """Format a duration with its two largest units: ``2 d 3 h``, ``4 min 5 s``, ``0.7 s``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    left = round(seconds)
    parts: list[str] = []
    for unit, size in units:
        if left >= size or parts:
            parts.append(f"{left // size} {unit}")
            left %= size
    return " ".join(parts[:2])


def _last_step(part: RunPart) -> str:
    return f"step {part.step if part.last_step is None else part.last_step:,}"


def _end(part: RunPart, is_last: bool) -> str:
    """Return how a part ended; empty if the file, of an earlier version, does not tell."""
    if part.end:
        return f"at {_last_step(part)}: {part.end}" if part.stage == "fit" else part.end
    if part.is_ended:
        return ""
    killed = "without a word, as by SIGKILL"
    return f"not yet when this report was written, or {killed}" if is_last else killed


def _duration(part: RunPart) -> str:
    text = duration_text(part.seconds)
    return text if part.is_ended else f"at least {text}: up to the last validation or report"


def _code(part: RunPart) -> str:
    version = part.versions.get("segformer_pl", "unknown version")
    commit = part.commit.removesuffix("-dirty")
    changed = ", with changes that are not committed" if commit != part.commit else ""
    return f"segformer_pl {version}" + (f", commit {commit}{changed}" if commit else "")


def _versions(versions: dict[str, str]) -> str:
    names = [name for name in MAIN_PACKAGES if name in versions]
    names += [name for name in versions if name not in names]
    return ", ".join(f"{name} {versions[name]}" for name in names)
