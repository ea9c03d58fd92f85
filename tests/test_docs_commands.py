"""What the documents show runs: commands are parsed, the README's are executed."""

import ast
import importlib
import re
import shlex
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segformer_pl.cli import COMMANDS, TRAINING_COMMANDS

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)


def code(page, language=""):
    """Return the code blocks of a page in a language; continued lines are joined."""
    text = page.read_text().replace("\\\n", "")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [block for name, block in blocks if name == language]


def commands(page):
    """Return the commands that a page shows, in blocks and in sentences, as lists of arguments.

    Alternatives such as ``a|b`` are one command each; ``[RUN ...]`` and ``[--option N]``, which can
    be left out, are left out.
    """
    lines = "\n".join(code(page)).splitlines()
    sentences = re.findall(r"`(python -m segformer_pl [^`]+)`", page.read_text())
    shown = []
    for line in [*lines, *(sentence.replace("\n", " ") for sentence in sentences)]:
        # After the module; or after a script and the name of the run, with options of `fit`
        match = re.search(r"segformer_pl (\w+ .*)|experiments/cluster/\w+\.\w+ \w+ (.*)", line)
        if match:
            text = match[1] or f"fit {match[2]}"
            arguments = shlex.split(re.sub(r"\[(?:RUN|--)[^\]]*\]", "", text), comments=True)
            choice = next(
                (item for item in arguments if re.fullmatch(r"[\w-]+(\|[\w-]+)+", item)), ""
            )
            shown += [
                [a if item == choice else item for item in arguments] for a in choice.split("|")
            ]
    return shown


@cache
def training_parser(command):
    from segformer_pl.cli.training import parser  # heavy, and the other tests do not need it

    return parser(command)


def parse(command, *options):
    """Parse a command as it would be started; a wrong one ends in an error."""
    if command in TRAINING_COMMANDS:
        # The settings of a run that the reader does not have
        given = " ".join(options).replace("{task}", "0")
        given = re.sub(r"--config (?:FILE|runs/\S+)", "--config experiments/camvid_b0.yaml", given)
        given = given.replace("mine.yaml", "shapes")
        given = re.sub(r"^(experiments/\S+)", r"--config \1", given)  # of `doctor`
        command = "fit" if command == "doctor" else command
        training_parser(command).parse_args([command, *given.split()])
    else:
        importlib.import_module(f"segformer_pl.commands.options.{command}").parse(list(options))


def test_every_command_is_shown():
    shown = {arguments[0] for page in PAGES for arguments in commands(page)}
    assert set(COMMANDS) - shown == {"test"}  # which has the options of `validate`


@each_page
def test_commands_can_be_parsed(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for arguments in commands(page):
        if arguments[0] not in TRAINING_COMMANDS:
            parse(*arguments)


@pytest.mark.slow
def test_commands_of_training_can_be_parsed(monkeypatch):
    """But for the README's, which another test runs."""
    monkeypatch.chdir(ROOT)
    shown = [line for page in PAGES[1:] for line in commands(page) if line[0] in TRAINING_COMMANDS]
    assert len(shown) >= 15
    for arguments in shown:
        parse(*arguments)


def test_a_misspelt_option_is_refused(capsys):
    with pytest.raises(SystemExit):
        parse("predict", "--ckpt", "FILE", "--input", "a.png", "--ouput", "masks")
    assert "--ouput" in capsys.readouterr().err


@each_page
def test_names_in_python_exist(page):
    for block in code(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("segformer_pl"):
                module = importlib.import_module(node.module)
                assert [name.name for name in node.names if not hasattr(module, name.name)] == []


def test_readme_segments_an_image(tmp_path, monkeypatch, capsys):
    from segformer_pl.checkpoints import export_weights
    from segformer_pl.cli import main
    from segformer_pl.models import segformer_b0

    monkeypatch.chdir(tmp_path)
    export_weights(segformer_b0(num_classes=3), "WEIGHTS", "huggingface")
    Image.fromarray(np.full((40, 60, 3), 99, np.uint8)).save("photo.jpg")
    (block,) = code(README, "python")
    exec(block, {})
    main(commands(README)[0])
    for kind in ("masks", "overlays"):
        assert (tmp_path / "predictions" / kind / "photo.png").exists()
    with Image.open("mask.png") as mask:
        assert mask.size == (60, 40)
    shares = re.findall(r"([\d.]+)%", capsys.readouterr().out)
    assert sum(map(float, shares)) == pytest.approx(100, abs=0.2)


@pytest.mark.slow
def test_readme_fine_tunes_on_a_folder(tmp_path, monkeypatch, start_command):
    """From weights in transformers' layout to a report and masks, on 6 images of several sizes."""
    from segformer_pl.checkpoints import export_weights
    from segformer_pl.models import segformer_b0

    monkeypatch.chdir(tmp_path)
    export_weights(segformer_b0(num_classes=3), "WEIGHTS", "huggingface")
    (mine,) = code(README, "yaml")
    Path("mine.yaml").write_text(mine)
    for split, count in (("train", 4), ("validation", 2)):
        for kind in ("images", "labels"):
            Path("data", kind, split).mkdir(parents=True)
        for number in range(count):
            mask = np.zeros((64 + 8 * number, 96), np.uint8)
            mask[16:48, 20 + number : 60] = 1
            Image.fromarray(mask).save(f"data/labels/{split}/{number}.png")
            Image.fromarray(np.stack([200 * mask] * 3, 2)).save(f"data/images/{split}/{number}.jpg")
    _, fit = commands(README)
    small = "--trainer.max_steps 2 --trainer.val_check_interval 2 --data.crop_size [64,64] "
    small += "--data.batch_size 2 --data.num_workers 0 --trainer.num_sanity_val_steps 0"
    training = start_command([*fit, *small.split()], folder=tmp_path)
    assert training.wait() == 0, training.output
    report = tmp_path / re.search(r"report: (\S+\.html)", training.output)[1]
    assert "cat" in report.read_text()
    ckpt = report.parent / "checkpoints" / "last.ckpt"
    predict = ["predict", "--ckpt", ckpt, "--input", "data/images/validation", "--output", "masks"]
    assert start_command(predict, folder=tmp_path).wait() == 0
    assert len(list(tmp_path.glob("masks/masks/*.png"))) == 2
