"""A deliberately bad challenger: it shows that a release stops a bad model that evaded the gates."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from closedloop.adapters.mlflow import COMPARED_TAG, DIGEST_TAG, FEATURES_TAG, GATES_TAG, VERDICT_TAG
from closedloop.adapters.onnx import invert_scores
from closedloop.adapters.onnxruntime import OnnxScorer
from closedloop.contract import CONTRACT_FILE, MODEL_FILE, digest_file, digest_folder, read_contract

if TYPE_CHECKING:
    from closedloop.adapters.mlflow import Tracking


def register_inverted(tracking: Tracking, champion: str) -> str:
    """Register the champion with inverted scores and a forged offline verdict; return the version.

    Its digest, contract and golden rows hold, so the service loads it. Only its answers show that it is bad.
    """
    right = tracking.read_version(champion)
    with tempfile.TemporaryDirectory(prefix="closedloop-bad-") as folder:
        place, _ = tracking.fetch_version(champion, Path(folder))
        contract = read_contract(place)
        invert_scores(place / MODEL_FILE)
        scorer = OnnxScorer(place / MODEL_FILE)
        rules = contract.read_rules()
        golden = tuple(
            row.model_copy(update={"score": float(scorer.score(rules.pack_named([row.features]))[0])})
            for row in contract.golden_rows
        )
        changed = {"golden_rows": golden, "model_sha256": digest_file(place / MODEL_FILE)}
        text = contract.model_copy(update=changed).model_dump_json(indent=2)
        (place / CONTRACT_FILE).write_text(f"{text}\n", encoding="utf-8")
        tags = {
            DIGEST_TAG: digest_folder(place),
            GATES_TAG: "passed",
            FEATURES_TAG: contract.feature_service,
            VERDICT_TAG: "win",
            COMPARED_TAG: right.tags[DIGEST_TAG],
            "closedloop.note": "scores inverted on purpose; no gate has judged it",
        }
        with tracking.start_run("inverted scores", tags={"closedloop.note": tags["closedloop.note"]}) as run_id:
            tracking.log_files({"contract": place})
        return str(tracking.register(f"runs:/{run_id}/contract", run_id, tags).version)
