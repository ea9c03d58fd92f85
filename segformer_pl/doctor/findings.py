"""What an examination brings: findings in plain words, and figures."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Level = Literal["error", "warning"]


@dataclass(frozen=True)
class Finding:
    """Something that is wrong (``error``) or most likely is (``warning``).

    Attributes:
        level: An error ends the run or spoils its result.
        check: Short name of what was looked at.
        message: What, where, and what to do.
    """

    level: Level
    check: str
    message: str


@dataclass
class Examination:
    """What :func:`examine` found, and the figures it found on the way."""

    findings: list[Finding] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def error(self, check: str, message: str) -> None:
        self.findings.append(Finding("error", check, message))

    def warning(self, check: str, message: str) -> None:
        self.findings.append(Finding("warning", check, message))

    @property
    def has_errors(self) -> bool:
        return any(finding.level == "error" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        return {"findings": [asdict(finding) for finding in self.findings], "facts": self.facts}

    def __str__(self) -> str:
        lines = []
        for section, figures in self.facts.items():
            lines.append(section)
            lines += [f"  {name}: {value}" for name, value in figures.items()]
        lines += [f"{f.level}: [{f.check}] {f.message}" for f in self.findings]
        lines.append(
            f"{sum(f.level == 'error' for f in self.findings)} errors, "
            f"{sum(f.level == 'warning' for f in self.findings)} warnings"
        )
        return "\n".join(lines)
