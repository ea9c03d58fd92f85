"""Hook of MkDocs: pages lie in the site as in the repository, so that links work in both."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PATTERNS = (
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "docs/**/*.md",
    "docs/**/*.png",
    "docs/mkdocs/*.css",
    "experiments/*.md",
    "experiments/results/**/*.md",
    "experiments/results/**/*.png",
    "experiments/results/**/*.csv",
    "experiments/results/**/report.html",
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replace the files of ``docs/`` by those of the repository, under their own paths."""
    root = Path(config.config_file_path).parent
    theme = [file for file in files if not Path(file.abs_src_path).is_relative_to(config.docs_dir)]
    own = [
        File.generated(config, path.relative_to(root).as_posix(), abs_src_path=str(path))
        for pattern in PATTERNS
        for path in sorted(root.glob(pattern))
    ]
    return Files([*theme, *own])


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Have ``mkdocs serve`` rebuild the site when one of these files changes."""
    root = Path(config.config_file_path).parent
    config.watch += [str(root / name) for name in ("README.md", "CHANGELOG.md", "experiments")]
    return config
