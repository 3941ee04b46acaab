"""The alert rules for the Prometheus operator: `python k8s/components/prometheus-operator/generate.py` writes them."""

from __future__ import annotations

from pathlib import Path

import yaml

HERE = Path(__file__).parent
SOURCE = HERE.parents[1] / "base/observability/rules.yaml"
TARGET = HERE / "rules.yaml"


def render() -> str:
    """The PrometheusRule with the groups of ``SOURCE``."""
    rule = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "closedloop"},
        "spec": yaml.safe_load(SOURCE.read_text(encoding="utf-8")),
    }
    return "# Made by generate.py; do not edit.\n" + yaml.safe_dump(rule, sort_keys=False, width=130)


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
