"""Model folders small enough to work out their scores by hand: a logistic function of two numbers and a category."""

from __future__ import annotations

import datetime as dt
import math
import sqlite3
import struct
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
import numpy as np
import pandas as pd

from closedloop.adapters.online_format import KEY_START
from closedloop.adapters.onnxruntime import INPUT_NAME, OUTPUT_NAME
from closedloop.contract import (
    CONTRACT_FILE,
    MODEL_FILE,
    REFERENCE_FILE,
    CategoricalFeature,
    GoldenRow,
    Lineage,
    ModelContract,
    NumericFeature,
    ReferenceStatistics,
    digest_file,
)
from closedloop.rules import Rules
from closedloop.serving.slots import slots as slots_module
from closedloop.serving.slots.slots import MODELS_FOLDER, Slots

WEIGHTS = (0.1, -0.02, 0.5)
FEATURES = (
    NumericFeature(name="visits_30d", minimum=0.0, maximum=20.0),
    NumericFeature(name="age", minimum=18.0, maximum=80.0, nullable=False),
    CategoricalFeature(name="plan", categories=("basic", "plus")),
)
ROWS: tuple[dict[str, Any], ...] = (
    {"visits_30d": 6.0, "age": 40.0, "plan": "plus"},
    {"visits_30d": 0.0, "age": 20.0, "plan": "basic"},
    {"visits_30d": 20.0, "age": 80.0, "plan": None},
)
LINEAGE = Lineage(
    dataset="test",
    as_of=dt.date(2024, 1, 1),
    git_commit="0" * 40,
    git_dirty=False,
    data_md5={},
    params_md5="",
)
REFERENCE_COPIES = 400  # of these rows, so that a canary can be told from them


def pack_row(features: Any, row: dict[str, Any]) -> np.ndarray:
    """One row as the graph takes it."""
    return Rules([feature.model_dump() for feature in features]).pack_named([row])


def expected_score(row: dict[str, Any], bias: float = 0.0, features: Any = FEATURES) -> float:
    """The score that the graph gives a row."""
    total = bias
    for feature, weight in zip(features, WEIGHTS, strict=True):
        value = row[feature.name]
        if feature.kind == "categorical":
            value = feature.categories.index(value) if value in feature.categories else -1
        total += weight * float(value)
    return 1 / (1 + math.exp(-total))


def write_model_folder(
    folder: Path,
    *,
    bias: float = 0.0,
    features: Any = FEATURES,
    golden_shift: float = 0.0,
    contract_version: str = "1.0",
    model_name: str = "test_churn",
    feature_service: str = "test_churn_0",
    missing: float = 0.0,
    reference_bias: float | None = None,
    fails_from: int | None = None,
    rounds: int = 0,
) -> Path:
    """A whole model folder; ``golden_shift`` makes its golden rows wrong by that much, ``missing`` stands for NaN.

    ``reference_bias``: of the model by which the reference was scored, if it was another one. ``fails_from``: the graph
    raises on a row whose first feature is at least that. ``rounds``: of a loop that the graph goes through for nothing.
    """
    from onnx import TensorProto, helper, numpy_helper

    folder.mkdir(parents=True, exist_ok=True)
    weights = numpy_helper.from_array(np.array(WEIGHTS, dtype=np.float32).reshape(-1, 1), "weights")
    shift = numpy_helper.from_array(np.array(bias, dtype=np.float32), "bias")
    zero = numpy_helper.from_array(np.array(missing, dtype=np.float32), "zero")
    axis = numpy_helper.from_array(np.array([1], dtype=np.int64), "axis")
    nodes = [
        helper.make_node("IsNaN", [INPUT_NAME], ["missing"]),
        helper.make_node("Where", ["missing", "zero", INPUT_NAME], ["values"]),
        helper.make_node("MatMul", ["values", "weights"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["sum"]),
        helper.make_node("Sigmoid", ["sum"], ["column"]),
        helper.make_node("Squeeze", ["column", "axis"], [OUTPUT_NAME]),
    ]
    constants = [weights, shift, axis, zero]
    if fails_from is not None:  # a table without such an entry is asked for it; what it gives is 0
        constants.append(numpy_helper.from_array(np.array(0, dtype=np.int64), "first"))
        constants.append(numpy_helper.from_array(np.zeros(fails_from, dtype=np.float32), "table"))
        nodes[3:4] = [
            helper.make_node("Gather", ["values", "first"], ["number"], axis=1),
            helper.make_node("Cast", ["number"], ["place"], to=TensorProto.INT64),
            helper.make_node("Gather", ["table", "place"], ["nothing"]),
            helper.make_node("Unsqueeze", ["nothing", "axis"], ["nothings"]),
            helper.make_node("Add", ["product", "nothings"], ["same"]),
            helper.make_node("Add", ["same", "bias"], ["sum"]),
        ]
    if rounds:
        constants.append(numpy_helper.from_array(np.array(rounds, dtype=np.int64), "rounds"))
        nodes[3:4] = [
            helper.make_node("Loop", ["rounds", "", "product"], ["same"], body=_make_round()),
            helper.make_node("Add", ["same", "bias"], ["sum"]),
        ]
    graph = helper.make_graph(
        nodes,
        "logistic",
        [helper.make_tensor_value_info(INPUT_NAME, TensorProto.FLOAT, [None, len(features)])],
        [helper.make_tensor_value_info(OUTPUT_NAME, TensorProto.FLOAT, [None])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    (folder / MODEL_FILE).write_bytes(model.SerializeToString())
    evaluated = bias if reference_bias is None else reference_bias
    scores = [expected_score(row, evaluated) for row in ROWS]
    pd.DataFrame(ROWS * REFERENCE_COPIES).assign(score=scores * REFERENCE_COPIES).to_parquet(folder / REFERENCE_FILE)
    golden = tuple(
        GoldenRow(features=row, score=expected_score(row, bias, features) + golden_shift)
        for row in ({feature.name: old for feature, old in zip(features, row.values(), strict=True)} for row in ROWS)
    )
    reference = {
        feature.name: ReferenceStatistics(rows=3, missing_share=0.0, mean=10.0, standard_deviation=5.0)
        for feature in features
        if feature.kind == "numeric"
    }
    contract = ModelContract(
        contract_version=contract_version,
        model_name=model_name,
        model_type="logistic_regression",
        model_sha256=digest_file(folder / MODEL_FILE),
        features=features,
        feature_service=feature_service,
        threshold=0.5,
        horizon_days=30,
        lineage=LINEAGE,
        golden_rows=golden,
        reference=reference,
    )
    (folder / CONTRACT_FILE).write_text(contract.model_dump_json(), encoding="utf-8")
    return folder


def _make_round() -> Any:
    from onnx import TensorProto, helper

    values = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, 1]) for name in ("before", "after")}
    number = helper.make_tensor_value_info("number", TensorProto.INT64, [])
    go_on, goes_on = (helper.make_tensor_value_info(name, TensorProto.BOOL, []) for name in ("go_on", "goes_on"))
    nodes = [helper.make_node("Identity", ["go_on"], ["goes_on"]), helper.make_node("Abs", ["before"], ["size"])]
    nodes += [helper.make_node("Sign", ["before"], ["sign"]), helper.make_node("Mul", ["size", "sign"], ["after"])]
    return helper.make_graph(nodes, "round", [number, go_on, values["before"]], [goes_on, values["after"]])


def write_online_rows(
    path: Path,
    model_name: str,
    customers: Mapping[str, dt.datetime],
    rows: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> None:
    """An online store, as Feast writes it: customers of these snapshots, with features in ``rows`` or `ROWS[0]`."""
    with sqlite3.connect(path.with_suffix(".new")) as connection:
        table = f"{model_name}_{model_name}_0"
        connection.execute(f"CREATE TABLE {table} (entity_key BLOB, feature_name TEXT, value BLOB, event_ts TIMESTAMP)")
        for customer, snapshot_at in customers.items():
            key = KEY_START + struct.pack("<I", len(customer)) + customer.encode()
            stamp = int(snapshot_at.replace(tzinfo=None).timestamp())
            for name, value in rows.get(customer, ROWS[0]).items():
                connection.execute(f"INSERT INTO {table} VALUES (?, ?, ?, ?)", (key, name, pack_value(value), stamp))
    connection.close()
    path.with_suffix(".new").rename(path)


def pack_value(value: float | str | None) -> bytes:
    """A number or short text as Feast stores it; nothing where it is missing."""
    if value is None:
        return b""
    return bytes([0x12, len(value)]) + value.encode() if isinstance(value, str) else b"\x29" + struct.pack("<d", value)


def write_slots(state_dir: Path, slots: Slots) -> Slots:
    """Write the slots file as the agent does, with links to model folders that a test made elsewhere; returns it."""
    placed = {}
    for role in ("champion", "challenger", "waiting"):
        slot = getattr(slots, role)
        if slot is not None and not Path(slot.folder).is_relative_to(state_dir):
            link = state_dir / MODELS_FOLDER / f"{slot.version}-{slot.folder_sha256[:8]}"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(slot.folder)
            slot = msgspec.structs.replace(slot, folder=str(link))
        placed[role] = slot
    slots = msgspec.structs.replace(slots, **placed)
    slots_module.write_slots(state_dir, slots)
    return slots
