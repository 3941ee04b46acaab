"""Feast's objects, built from params.yaml and the data set's config; `feast apply` here does what training does.

Views of earlier definitions are kept: a model that may be rolled back to still needs its own.
"""

from pathlib import Path

from closedloop.bootstrap import build_features, load_run

root = Path(__file__).absolute().parent.parent  # not resolved: a workspace has its own params.yaml
globals().update(build_features(load_run(root / "params.yaml", root=root)).list_objects())
