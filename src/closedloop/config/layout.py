"""Where the stages of dvc.yaml read and write: one list for commands, the pipeline's components, and tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Layout:
    """All outputs of a project, relative to its folder; a field is also a command's option and an artifact's name."""

    raw: Path = Path("data/raw")
    ingest_metrics: Path = Path("metrics/ingest.json")
    data_docs: Path = Path("reports/data_docs")
    data_quality_page: Path = Path("reports/data_quality.html")
    data_quality: Path = Path("metrics/data_quality.json")
    daily: Path = Path("data/daily")
    features: Path = Path("data/features")
    training: Path = Path("data/training")
    training_set_metrics: Path = Path("metrics/training_set.json")
    model: Path = Path("models/candidate")
    pipeline: Path = Path("models/pipeline")
    run_file: Path = Path("models/run.json")
    train_figures: Path = Path("reports/train")
    train_plots: Path = Path("metrics/plots/train")
    train_metrics: Path = Path("metrics/train_metrics.json")
    gates: Path = Path("metrics/gates.json")
    card: Path = Path("reports/model_card.html")
    test_figures: Path = Path("reports/test")
    test_plots: Path = Path("metrics/plots/test")
    eval_metrics: Path = Path("metrics/eval_metrics.json")
    registration: Path = Path("metrics/registration.json")
    bento: Path = Path("models/bento")
    package_metrics: Path = Path("metrics/package.json")


CHOICES_FILE = "choices.json"  # beside the pipeline: what was chosen while fitting, and what the model is judged on

READS = {
    "ingest": (),
    "validate": ("raw",),
    "features": ("raw",),
    "training_set": ("raw", "daily", "features"),
    "train": ("training", "data_quality"),
    "evaluate": ("raw", "training", "model", "pipeline", "train_plots"),
    "register": ("model", "gates", "run_file"),
    "package": ("registration",),
}
WRITES = {
    "ingest": ("raw", "ingest_metrics"),
    "validate": ("data_docs", "data_quality_page", "data_quality"),
    "features": ("daily", "features"),
    "training_set": ("training", "training_set_metrics"),
    "train": ("model", "pipeline", "run_file", "train_figures", "train_plots", "train_metrics"),
    "evaluate": ("gates", "card", "test_figures", "test_plots", "eval_metrics"),
    "register": ("registration",),
    "package": ("bento", "package_metrics"),
}
HELP = {
    "raw": "Canonical tables: customers, events, dropped rows.",
    "ingest_metrics": "Counts of rows read, kept and dropped.",
    "data_docs": "Data Docs, to open in a browser.",
    "data_quality_page": "Findings and dropped rows on one page.",
    "data_quality": "The data gate's result.",
    "daily": "Daily aggregates per customer.",
    "features": "Feature rows, one file a snapshot.",
    "training": "Train, validation and test rows.",
    "training_set_metrics": "Rows of each part, and what went online.",
    "model": "The contract folder: model.onnx, contract.json, reference.parquet.",
    "pipeline": "The fitted scikit-learn pipeline (skops), and what was chosen while fitting.",
    "run_file": "The MLflow run and the model that it logged.",
    "train_figures": "Pictures of the validation rows.",
    "train_plots": "Plot data for DVC.",
    "train_metrics": "Figures of train and validation rows.",
    "gates": "Every gate's figure and limit, and the verdict.",
    "card": "The model card.",
    "test_figures": "Pictures of the test rows.",
    "test_plots": "Plot data for DVC.",
    "eval_metrics": "Figures of the test rows.",
    "registration": "Which version it became.",
    "bento": "The Bento's folder.",
    "package_metrics": "The Bento's name and digest.",
}


def list_paths(stage: str) -> dict[str, Path]:
    """Where a stage reads and writes if nothing else is said, by name."""
    usual = Layout()
    return {name: getattr(usual, name) for name in (*READS[stage], *WRITES[stage])}
