"""Result of an examination: findings and facts."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from segformer_pl.errors import counted

Level = Literal["error", "warning"]


@dataclass(frozen=True)
class Finding:
    """A problem of a run.

    Attributes:
        level: ``"error"`` if the run would fail or give a wrong result; ``"warning"`` for a likely
            mistake.
        check: Short name of the check.
        message: What is wrong, where, and what to do.
    """

    level: Level
    check: str
    message: str


@dataclass
class Examination:
    """Findings and facts of :func:`~segformer_pl.doctor.examine`.

    Attributes:
        findings: The findings in the order of the checks.
        facts: Sizes, counts and times by section and name.
    """

    findings: list[Finding] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def error(self, check: str, message: str) -> None:
        """Add an error."""
        self.findings.append(Finding("error", check, message))

    def warning(self, check: str, message: str) -> None:
        """Add a warning."""
        self.findings.append(Finding("warning", check, message))

    @property
    def has_errors(self) -> bool:
        """Whether at least one finding is an error."""
        return any(finding.level == "error" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Return findings and facts as plain data for JSON."""
        return {"findings": [asdict(finding) for finding in self.findings], "facts": self.facts}

    def __str__(self) -> str:
        lines = []
        for section, figures in self.facts.items():
            lines.append(section)
            lines += [
                f"  {name}: {_text(value)}" for name, value in figures.items() if value is not None
            ]
        lines += [f"{f.level}: [{f.check}] {f.message}" for f in self.findings]
        lines.append(
            f"{counted(sum(f.level == 'error' for f in self.findings), 'error')}, "
            f"{counted(sum(f.level == 'warning' for f in self.findings), 'warning')}"
        )
        return "\n".join(lines)


def _text(value: Any) -> str:
    """Return a fact as text: a list by commas, a dict as names with values, a size as 512x512."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(entry)}" for name, entry in value.items())
    if isinstance(value, list):
        is_size = len(value) == 2 and all(isinstance(side, int) for side in value)
        return ("x" if is_size else ", ").join(map(_text, value))
    return str(value)
