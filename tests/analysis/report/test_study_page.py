"""The report of a study shows the numbers of its summaries, and what is missing in a sentence."""

import csv
import io
import json
import re

import pandas as pd
import pytest

from segformer_pl.analysis.ablation import read_results, summarize_measures, summarize_study
from segformer_pl.analysis.report.study_page import write_study_report
from segformer_pl.analysis.run import EvaluationFile, Run
from segformer_pl.errors import UserError

pytestmark = pytest.mark.slow

EFFECTS = {"r8-4-2-1": 0.0, "r1-1-1-1": 0.02, "r16-8-4-2": -0.9}
HOSTILE = "<script>alert('|')</script> $x_1$ & \"q\""


@pytest.fixture(scope="module")
def study(tmp_path_factory, study_folder):
    """A study with two further evaluations, a report with costs, and the parsed page."""
    path = tmp_path_factory.mktemp("studies") / "reduction_ratio"
    made = study_folder(path, EFFECTS, evaluations={"at_96": -0.4, "at_128": -0.1})
    made.write()
    made.report = write_study_report(path, "small", made.costs())
    return made


@pytest.fixture(scope="module")
def page(study, page_class):
    return page_class(study.report)


def summary(study, **arguments):
    return summarize_study(read_results(study.path, "small"), **arguments)


def test_files(study):
    assert study.report == study.path / "report_small" / "report.html"
    assert {file.name for file in study.report.parent.iterdir()} == {
        "report.html",
        "table.md",
        "table.csv",
        "seeds.csv",
    }


def test_page_shows_the_numbers_of_the_summaries(study, page):
    (worst,) = (d for d in summary(study).differences if d.variant == "r16-8-4-2")
    assert worst.is_resolved
    assert worst.value < -0.1  # planted
    texts = [f"{100 * v:+.2f}".replace("-", "−") for v in (worst.value, worst.low, worst.high)]
    difference = "{} ({} to {})".format(*texts)
    rows = page.rows_of("3 r16-8-4-2")
    assert difference in rows[0]
    assert difference in page.text.partition("Differences from")[2]  # in the figure
    for one in summary(study).variants:
        half = (one.high - one.low) / 2
        expected = f"{100 * one.mean:.2f} ± {100 * half:.2f}"
        assert any(expected in row for row in page.rows if one.variant in row)
    assert f"“r16-8-4-2” is {-100 * worst.value:.2f} points lower" in page.text


def test_markdown_has_the_cells_of_the_page(study, page):
    text = (study.report.parent / "table.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    (row,) = (line for line in lines if line.startswith("| 3 "))
    shown = page.rows_of("3 r16-8-4-2")[0]
    for cell in row.strip("| ").split(" | "):
        assert re.sub(r"\\(.)", r"\1", cell.strip("*")) in shown
    assert "**" in row  # resolved


def test_csv_has_one_row_for_each_variant_evaluation_and_measure(study):
    rows = list(csv.DictReader((study.report.parent / "table.csv").open(encoding="utf-8")))
    keys = [(row["variant"], row["protocol"], row["measure"]) for row in rows]
    assert len(set(keys)) == len(keys) == 3 * (5 + 2 * 3)
    for evaluation, name in ((None, "val"), ("at_96", "at_96")):
        found = summary(study, evaluation=evaluation)
        for one in found.variants:
            row = rows[keys.index((one.variant, name, "miou"))]
            assert float(row["mean"]) == one.mean
            assert float(row["sd"]) == one.sd
            assert row["num_seeds"] == "3"
        for one in found.differences:
            row = rows[keys.index((one.variant, name, "miou"))]
            assert float(row["difference"]) == one.value
            assert float(row["difference_low"]) == one.low
            assert float(row["p_holm"]) == one.p_holm
            assert row["is_resolved"] == str(one.is_resolved).lower()
            assert row["is_reference"] == "false"
    reference = rows[keys.index(("r8-4-2-1", "val", "miou"))]
    assert reference["difference"] == reference["p_value"] == ""
    assert reference["is_reference"] == "true"
    assert float(reference["macs"]) == 5.2e8


def test_named_evaluations_have_tables_with_their_own_numbers(study, page):
    for name in ("at_96", "at_128"):
        means = [f"{100 * one.mean:.2f} ±" for one in summary(study, evaluation=name).variants]
        section = page.text.partition(f" {name} # variant")[2]
        assert all(mean in section for mean in means)
    assert "mIoU over the evaluations" in page.text


def test_links_lead_to_the_reports_of_the_runs(study, page):
    assert len(page.links) == 9
    assert all((study.report.parent / link).resolve().is_file() for link in page.links)


def test_accessible_and_self_contained(page):
    assert {header["scope"] for header in page.all("th")} == {"col", "row"}
    drawings = [one for one in page.all("div") if one.get("role") == "img"]
    assert len(drawings) == len(page.all("svg")) == 7
    assert all(one["aria-label"] for one in drawings)
    assert not page.has_foreign_scripts
    assert not page.all("link")
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href"):
            target = attributes.get(name) or "#"
            assert tag == "a" or target.startswith(("#", "data:"))


def test_all_sections(page):
    for text in (
        "Does a larger reduction ratio cost",
        "mIoU against costs",
        "Differences of the IoU of each class",
        "Validation mIoU",
        "Training loss",
        "Radius of the effective receptive field",
        "Satterthwaite",
        "torch 2.11.0",
        "stage 1: keys / MACs (M)",
    ):
        assert text in page.text, text
    assert "different environments" not in page.text
    assert "Transplanted" not in page.text


def test_foreign_text_is_escaped(simulate_study, read_page):
    study = simulate_study(
        {"ref": 0.0, HOSTILE: -0.3, "a\nb": 0.1},
        class_names=[HOSTILE, "**bold**", "sky"],
        evaluations={"<b>x": -0.1},
        seeds=(0, 1),
    )
    report = write_study_report(study.path, "small", study.costs())
    page = read_page(report)
    assert not page.has_foreign_scripts
    assert "<b>x # variant" in page.text  # the name of the table of that evaluation
    assert "<b>x" not in page.source
    assert "3 variants were trained with 2 seeds" in page.text
    assert "<script>alert('|')</script> $x_1$ & \"q\"" in page.text
    assert "<script>" not in page.source
    text = (report.parent / "table.md").read_text(encoding="utf-8")
    assert "<script" not in text.replace("\\<", "")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 5  # the line break in a name starts no new row
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    rows = list(csv.DictReader(io.StringIO((report.parent / "table.csv").read_text())))
    assert {row["variant"] for row in rows} == {"ref", HOSTILE, "a\nb"}


def test_what_was_not_measured_is_left_out_with_a_sentence(simulate_study, read_page):
    study = simulate_study({"a": 0.0, "b": -0.2}, seeds=(0, 1), layers=())
    for seed in (0, 1):
        for variant in "ab":
            folder = study.folder(variant, seed)
            (folder / "metrics.csv").write_text("step,epoch\n")
            (folder / "report.html").unlink()
    page = read_page(write_study_report(study.path, "small"))
    assert "There is no costs.json beside this report, so costs are left out." in page.text
    assert "No receptive field was measured" in page.text
    assert "so there are no curves" in page.text
    assert "mIoU against costs" not in page.text
    assert "latency" not in page.text.partition("Environment")[0]
    assert "Other evaluations" not in page.text
    assert len(page.all("svg")) == 2  # differences and classes
    assert not page.links


def test_costs_are_read_from_beside_the_report(simulate_study, read_page):
    study = simulate_study({"a": 0.0, "b": -0.2}, seeds=(0, 1))
    costs = [cost | {"macs": 5 * 10**8, "paper_macs": None} for cost in study.costs()]
    for cost in costs:
        del cost["stages"]
    file = study.path / "report_small" / "costs.json"
    file.parent.mkdir()
    file.write_text(json.dumps(costs))
    page = read_page(write_study_report(study.path, "small"))
    assert "All variants have the same MACs of an image." in page.text
    assert "MACs of the paper" not in page.text
    assert "mIoU against costs" in page.text  # latency and memory
    assert "12.5 (IQR 0.8)" in page.text
    file.write_text("{")
    with pytest.raises(UserError, match=r"costs\.json' does not hold the costs"):
        write_study_report(study.path, "small")


def test_one_seed_is_no_test(simulate_study, read_page):
    study = simulate_study({"a": 0.0, "b": -0.4}, seeds=(7,))
    report = write_study_report(study.path, "small", study.costs())
    page = read_page(report)
    assert "cannot be tested, because one seed does not show" in page.text
    assert "is resolved" not in page.text.partition("Results")[0]
    (row,) = page.rows_of("2 b sr_ratios")
    assert row.split()[-3] == "–"  # p
    assert "nan" not in (report.parent / "table.csv").read_text()
    assert "nan" not in (report.parent / "table.md").read_text()
    assert " nan" not in page.text


def test_absent_classes_are_named_and_not_drawn(simulate_study, read_page):
    names = [f"class{i}" for i in range(30)]
    study = simulate_study({"a": 0.0, "b": -0.2}, class_names=names, has_absent_class=True)
    page = read_page(write_study_report(study.path, "small"))
    assert page.row("class29") == ["0", "absent", "–"]
    (heat_map,) = re.findall(r"<svg.*?</svg>", page.source.partition("each class")[2], re.S)[:1]
    shown = set(re.findall(r"class\d+", heat_map))
    (difference,) = summary(study).differences
    sizes = {one.name: abs(one.difference.value) for one in difference.classes[:-1]}
    largest = sorted(sizes, key=lambda name: -sizes[name])[:16]
    assert shown == set(largest)
    assert len([row for row in page.rows if row.strip().startswith("class")]) == 31  # and a heading


def test_failed_and_unfinished_runs_are_listed(simulate_study, read_page):
    study = simulate_study({"a": 0.0, "b": -0.2, "c": 0.1}, seeds=(0, 1))
    folder = study.folder("b", 1)
    for file in (folder / "evaluation").iterdir():
        file.unlink()
    (folder / "failure.txt").write_text("error: the loss is <nan> at step 12")
    for seed in (0, 1):
        for file in (study.folder("c", seed) / "evaluation").iterdir():
            file.unlink()
    page = read_page(write_study_report(study.path, "small", study.costs()))
    assert "3 runs are not finished and not counted" in page.text
    assert "the loss is <nan> at step 12" in page.text
    assert "<nan>" not in page.source
    (row,) = page.rows_of("3 c sr_ratios")
    assert row.count("–") >= 4
    # A study whose reference has no finished run still gets its report.
    for seed in (0, 1):
        for file in (study.folder("a", seed) / "evaluation").iterdir():
            file.unlink()
    page = read_page(write_study_report(study.path, "small"))
    assert "Nothing can be compared yet." in page.text
    assert "no run of the reference 'a' is finished" in page.text


def test_transplanted_weights_and_environments(simulate_study, read_page):
    study = simulate_study({"a": 0.0, "b": -0.2}, seeds=(0, 1))
    sentence = "stage1.patch_embed.proj.weight: resampled from 7x7 to 4x4"
    environment = Run(study.folder("a", 0)).ablation["environment"] | {"device": "NVIDIA H100"}
    for seed in (0, 1):
        study.write_run("b", seed, transplanted=[sentence], environment=environment)
    page = read_page(write_study_report(study.path, "small"))
    assert page.text.count(sentence) == 1
    assert "The runs have 2 different environments" in page.text
    assert "device NVIDIA H100" in page.text
    assert "device cpu" in page.text
    assert "b, seed 0; b, seed 1" in page.text


def test_many_variants_and_classes(simulate_study, read_page):
    effects = {f"drop_path_rate={i / 10}+decoder_dim={64 + i}": -0.02 * i for i in range(12)}
    names = [f"class {i}" for i in range(40)]
    study = simulate_study(effects, class_names=names, seeds=(0, 1), num_images=5)
    page = read_page(write_study_report(study.path, "small", study.costs()))
    assert len(page.rows_of("12 drop_path_rate=1.1+decoder_dim=75")) == 2  # results and costs
    # One panel for each of the 11 variants, with its name above it.
    loss = page.text.partition("Training loss")[2].partition("training step")[0]
    assert all(f"={i / 10}+" in loss for i in range(1, 12))


def test_no_such_budget(study):
    with pytest.raises(UserError, match="none of budget 'full'"):
        write_study_report(study.path, "full")


def test_the_values_of_the_seeds_can_be_pivoted_and_merged(study):
    folder = study.report.parent
    seeds, table = (pd.read_csv(folder / name) for name in ("seeds.csv", "table.csv"))
    keys = ["study", "budget", "variant", "protocol", "measure", "is_reference"]
    assert list(seeds.columns) == [*keys, "seed", "value", "difference"]
    assert not seeds.duplicated([*keys, "seed"]).any()
    means = seeds.groupby(keys, as_index=False)[["value", "difference"]].mean()
    merged = table.merge(means, on=keys, suffixes=("", "_of_seeds"))
    assert len(merged) == len(table)
    assert merged["value"].to_numpy() == pytest.approx(merged["mean"].to_numpy(), nan_ok=True)
    given = merged["difference_of_seeds"].to_numpy()
    assert given == pytest.approx(merged["difference"].to_numpy(), nan_ok=True)
    assert merged["difference"].notna().sum() == 2 * (5 + 2 * 3)
    main = seeds.query("protocol == 'val' and measure == 'miou'")
    wide = main.pivot(index="variant", columns="seed", values="value")
    for one in summary(study).variants:
        assert wide.loc[one.variant].to_dict() == pytest.approx(one.values)


def test_every_evaluation_is_read_once_for_all_measures(study, monkeypatch):
    read = []
    load = EvaluationFile.load
    monkeypatch.setattr(EvaluationFile, "load", lambda file: read.append(file.file) or load(file))
    results = read_results(study.path, "small")  # compares the images of all runs
    read.clear()
    summarize_measures(results)
    summarize_measures(results, ["miou", "image_miou"], "at_96")
    assert len(read) == len(set(read)) == 2 * 3 * 3
