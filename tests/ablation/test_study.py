"""Study files: their variants, names, digests, and what is refused before anything runs."""

import tempfile
from functools import cache
from pathlib import Path

import pytest
import yaml

from segformer_pl.ablation.study import nested, read_study
from segformer_pl.analysis.configuration import settings_digest, training_configuration
from segformer_pl.cli.training import resolve
from segformer_pl.errors import UserError

STUDIES = Path(__file__).parents[2] / "experiments" / "ablations"
RESULTS = Path(__file__).parents[2] / "experiments" / "results" / "ablations"
STUDY = {
    "question": "Does it matter?",
    "base": "base.yaml",
    "variants": {"a": {}, "b": {"model.lr": 0.1}},
    "seeds": [0, 1],
    "budgets": {"smoke": {"settings": {"trainer.max_steps": 4, "trainer.val_check_interval": 2}}},
}
NETWORK = "model.network.init_args."


@pytest.fixture
def read(tmp_path):
    """Function that writes a study with changes of ``STUDY`` and reads it."""
    base = {
        "model": {"network": {"class_path": "segformer_pl.models.segformer_b0"}},
        "data": {"dataset": "shapes"},
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))

    def call(budget="smoke", settings=None, text=None, **changes):
        content = {key: value for key, value in (STUDY | changes).items() if value is not None}
        file = tmp_path / "study.yaml"
        file.write_text(yaml.safe_dump(content, sort_keys=False) if text is None else text)
        return read_study(file, budget, _resolve, settings)

    return call


def _resolve(files, command="fit"):
    """As :func:`resolve`, but each combination of contents is parsed once in all tests."""
    assert command == "fit"
    return _resolve_texts(tuple(Path(file).read_text() for file in files))


@cache
def _resolve_texts(texts):
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, f"{i}.yaml") for i in range(len(texts))]
        for file, text in zip(files, texts):
            file.write_text(text)
        return resolve([str(file) for file in files])


@pytest.mark.slow
def test_variants_have_complete_settings_of_their_own(read):
    study = read()
    assert (study.name, study.reference, study.seeds) == ("study", "a", (0, 1))
    assert [v.config["model"]["lr"] for v in study.variants] == [6e-5, 0.1]
    assert [v.config["trainer"]["max_steps"] for v in study.variants] == [4, 4]
    assert study.variants[0].num_classes == 6
    assert study.variants[0].image_size == (64, 64)


@pytest.mark.slow
def test_runs_complete_one_seed_before_the_next_and_are_named_by_their_content(read, tmp_path):
    study = read()
    runs = study.runs(tmp_path)
    assert [(run.variant.name, run.seed) for run in runs] == [
        ("a", 0),
        ("b", 0),
        ("a", 1),
        ("b", 1),
    ]
    digest = study.variants[1].digest
    assert runs[3].folder == tmp_path / "study" / f"b.seed1.smoke.{digest}"
    assert len({run.folder for run in runs}) == 4
    assert runs[0].max_steps == 4


@pytest.mark.slow
def test_the_digest_depends_on_what_is_trained_and_on_nothing_else(read):
    first = read()
    elsewhere = read(settings={"data.path": "/elsewhere", "data.num_workers": 3})
    assert [v.digest for v in elsewhere.variants] == [v.digest for v in first.variants]
    other_seeds = read(seeds=[5])
    assert other_seeds.variants[0].digest == first.variants[0].digest
    longer = read(settings={"trainer.max_steps": 6})
    assert longer.variants[0].digest != first.variants[0].digest
    config = first.variants[0].config
    assert settings_digest(training_configuration({0: config}, None)) == first.variants[0].digest


@pytest.mark.slow
def test_axes_are_all_combinations(read):
    axes = {
        NETWORK + "sr_ratios": [[8, 4, 2, 1], [4, 2, 1, 1]],
        NETWORK + "decoder_dim": [64, 128],
    }
    study = read(variants=None, axes=axes, reference="sr_ratios=8-4-2-1+decoder_dim=128")
    assert [v.name for v in study.variants] == [
        "sr_ratios=8-4-2-1+decoder_dim=128",
        "sr_ratios=8-4-2-1+decoder_dim=64",
        "sr_ratios=4-2-1-1+decoder_dim=64",
        "sr_ratios=4-2-1-1+decoder_dim=128",
    ]
    assert study.variants[2].build_network().init_args()["decoder_dim"] == 64


@pytest.mark.slow
def test_a_budget_has_its_own_base_and_seeds(read, tmp_path):
    (tmp_path / "other.yaml").write_text(
        "model: {network: {class_path: segformer_pl.models.segformer_b1}}\n"
        "data: {dataset: camvid, crop_size: [96, 128]}\n"
    )
    settings = {"trainer.max_steps": 2, "trainer.val_check_interval": 1}
    study = read("big", budgets={"big": {"base": "other.yaml", "seeds": [7], "settings": settings}})
    assert study.seeds == (7,)
    assert study.variants[0].num_classes == 11
    assert study.variants[0].image_size == (96, 128)
    assert study.variants[0].config["seed_everything"] == 7


def test_nested_settings():
    assert nested({"a.b": {"c": 1, "d": 2}, "a.b.c": 3, "e": []}) == {
        "a": {"b": {"c": 3, "d": 2}},
        "e": [],
    }
    with pytest.raises(UserError, match=r"'a\.b\.c' is set, and 'b' in it is 1"):
        nested({"a.b": 1, "a.b.c": 3})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": {"a": {}, "b": {"model.lrr": 1}}}, r"variant 'b': .*lrr"),
        ({"variants": {"a": {NETWORK + "sr_ratios": [8, 4, 2]}}}, "variant 'a'.*four stages"),
        ({"variants": {"a": {"model.lr": "fast"}}}, r"variant 'a': .*model\.lr"),
        ({"variants": {"a": {NETWORK + "patch_sizes": [3, 3, 3, 3]}}}, "smaller than stride"),
        (
            {"variants": {"a": {NETWORK + "sr_ratios": [32, 4, 2, 1]}}},
            "variant 'a': its network needs images of at least 125 pixels .* have 64x64",
        ),
        ({"variants": {"a": {"sr_ratios": [1]}}}, "variant 'a' changes 'sr_ratios'.*init_args"),
        (
            {"variants": {"a": {}, "b": {"trainer.limit_val_batches": 2}}},
            "trainer.limit_val_batches is None in variant 'a' and 2 in 'b'",
        ),
        ({"variants": {"a": {}, "b": {}}}, "'a' and 'b' have the same settings"),
        ({"variants": {"a/b": {}}}, "name 'a/b'"),
        ({"variants": {}}, "either variants or axes"),
        ({"axes": {"model.lr": [1.0]}}, "either variants or axes"),
        ({"reference": "c"}, "no variant 'c'; choose one of a, b"),
        ({"base": "missing.yaml"}, "base: there is no file .*missing.yaml"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [1, 1]}, "seeds"),
        ({"seeds": [-1]}, "seeds"),
        ({"question": None}, "question"),
        ({"qestion": "?"}, "qestion"),
        ({"evaluations": {"../x": {}}}, r"name '\.\./x'"),
        ({"budgets": {"smoke": {"settings": {"trainer.max_steps": 4}}}}, "val_check_interval"),
        ({"budgets": {"smoke": {}}}, "max_steps is -1"),
        (
            {"variants": {"a": {NETWORK + "drop_path_rate": 1.5}}},
            "drop_path_rate=1.5: give a number",
        ),
        (
            {"variants": {"a": {}, "b": {"data.dataset": "camvid"}}},
            "data.dataset is shapes in variant 'a' and camvid in 'b'",
        ),
    ],
)
def test_impossible_studies_are_refused_in_one_sentence(read, changes, message):
    with pytest.raises(UserError, match=message) as error:
        read(**changes)
    assert "study.yaml" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": {"a": None}}, "variants: 'a' is None; give its changes .* or {} for none"),
        ({"variants": {1: {}}}, "the name 1 is no text for YAML; write it in quotes"),
        ({"variants": ["a"]}, "variants: give names"),
        ({"variants": {"a" * 200: {}}}, "has 200 characters .* use at most 100"),
        ({"variants": None, "axes": {"model.lr": []}}, r"'model\.lr' is \[\]; give a list"),
        ({"variants": None, "axes": {"model.lr": 0.1}}, r"'model\.lr' is 0\.1; give a list"),
        ({"evaluations": {"x": None}}, "evaluations: 'x' is None"),
        ({"budgets": {"smoke": None}}, "budgets: 'smoke' is None; give its settings"),
        ({"budgets": {}}, "budgets: give at least one"),
        ({"variantz": {"a": {}}}, "'variantz' is no entry of a study; they are question, base"),
        ({"seeds": 3}, r"seeds is 3; give a list of integers"),
        ({"seeds": ["a"]}, r"seeds is \['a'\]; give a list of integers"),
        (
            {"budgets": {"smoke": {"seeds": 2}}},
            r"budgets: 'smoke': seeds is 2; give a list of integers",
        ),
        (
            {"budgets": {"smoke": {"trainer.max_steps": 4}}},
            r"budgets: 'smoke' has 'trainer\.max_steps', and a budget has settings, base, seeds",
        ),
        ({"budgets": {"smoke": {"settings": [1]}}}, r"'smoke': settings is \[1\]; give settings"),
        ({"spread": {"seeds": 0.01}}, r"spread is .*; give standard deviations of mIoU"),
    ],
)
def test_mistakes_in_the_form_of_a_study_are_named_in_one_sentence(read, changes, message):
    with pytest.raises(UserError, match=message) as error:
        read(**changes)
    assert "study.yaml" in str(error.value)
    assert "Union" not in str(error.value)


def test_files_that_are_no_studies_are_refused(read, tmp_path):
    for text in ("a: [", "- 1", "just text", ""):
        with pytest.raises(UserError, match=r"study\.yaml"):
            read(text=text)
    with pytest.raises(UserError, match=r"cannot be read \(No such file .*holds a study"):
        read_study(tmp_path / "none.yaml", "smoke", _resolve)
    with pytest.raises(UserError, match="no budget 'large'; choose one of smoke"):
        read("large")


@pytest.mark.slow
@pytest.mark.parametrize(
    "file", sorted(f for f in STUDIES.glob("*.yaml") if f.read_text().startswith("question:"))
)
def test_the_studies_of_the_repository_can_run(file):
    # The last budget has the largest images and mostly a base of its own.
    study = read_study(file, list(yaml.safe_load(file.read_text())["budgets"])[-1], resolve)
    assert len(study.variants) > 1
    assert study.question.endswith("?")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reduction_ratio", "patch_overlap"])
def test_stored_runs_of_earlier_versions_are_those_of_the_study(name):
    """Otherwise ``ablate`` would train them again."""
    study = read_study(STUDIES / f"{name}.yaml", "small", _resolve)
    planned = {run.folder.name for run in study.runs(Path())}
    stored = {path.parent.name for path in RESULTS.glob(f"{name}/*/ablation.json")}
    assert stored
    assert stored <= planned
