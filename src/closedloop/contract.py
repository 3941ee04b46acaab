"""The model contract: one folder that training writes and every loader reads.

``model.onnx`` scores, ``contract.json`` says what it takes and where it comes from, and ``reference.parquet``
holds the out-of-sample rows that monitoring compares with. The folder's digest also stands in the registry,
because a digest inside the folder could only vouch for itself.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from closedloop.errors import DataError

if TYPE_CHECKING:
    from closedloop.rules import Rules

CONTRACT_VERSION = "1.0"
MODEL_FILE = "model.onnx"
CONTRACT_FILE = "contract.json"
REFERENCE_FILE = "reference.parquet"
VERSION_FILE = "version.json"  # beside a folder that was packaged: the registry's version, and its tag's digest
JOIN_KEY = "customer_id"  # of every feature row, training row and online row


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class NumericFeature(_Frozen):
    """A float feature; ``minimum`` and ``maximum`` are the range seen in training, None if it was all missing."""

    kind: Literal["numeric"] = "numeric"
    name: str
    minimum: float | None = None
    maximum: float | None = None
    nullable: bool = True


class CategoricalFeature(_Frozen):
    """A string feature; a category's position in ``categories`` is its code, anything else is coded -1."""

    kind: Literal["categorical"] = "categorical"
    name: str
    categories: tuple[str, ...]
    nullable: bool = True


Feature = Annotated[NumericFeature | CategoricalFeature, Field(discriminator="kind")]


class ReferenceStatistics(_Frozen):
    """A feature's distribution in the reference rows (numeric only: mean, standard deviation, quantiles)."""

    rows: int
    missing_share: float
    mean: float | None = None
    standard_deviation: float | None = None
    shares: dict[str, float] = {}


class GoldenRow(_Frozen):
    """An input with the score that every loader must reproduce within 1e-6 before it may serve."""

    features: dict[str, float | str | None]
    score: float


class Lineage(_Frozen):
    """Where the model comes from; hashes are DVC's (MD5 of the file).

    All of it follows from commit, data and parameters, so that training again gives the same folder, byte for byte.
    The MLflow run is found by the folder's digest, which it carries as a tag.
    """

    dataset: str
    as_of: dt.date
    git_commit: str
    git_dirty: bool
    data_md5: dict[str, str]
    params_md5: str
    train_snapshots: tuple[dt.date, ...] = ()
    validation_snapshots: tuple[dt.date, ...] = ()
    test_snapshots: tuple[dt.date, ...] = ()

    def list_tags(self) -> dict[str, str]:
        """All of it as tags of a run or a registered version; lists and mappings as JSON."""
        found = self.model_dump(mode="json")
        return {f"closedloop.{name}": json.dumps(value).strip('"') for name, value in found.items()}


class ModelContract(_Frozen):
    """A model's inputs, outputs and origin; ``reasons`` has features that are summed into one reason."""

    contract_version: str = CONTRACT_VERSION
    model_name: str
    model_type: str
    model_sha256: str
    features: tuple[Feature, ...]
    feature_service: str
    threshold: float = Field(ge=0, le=1)
    horizon_days: int | None = None
    lineage: Lineage
    golden_rows: tuple[GoldenRow, ...]
    reference: dict[str, ReferenceStatistics]
    reasons: dict[str, tuple[str, ...]] = {}

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Names of the features, in the order of the packed vector."""
        return tuple(feature.name for feature in self.features)

    def read_rules(self, range_margin: float = 0.0, *, explains: bool = False) -> Rules:
        """The rules for a row, and how rows are packed; the parameters are those of `closedloop.rules.Rules`."""
        from closedloop.rules import Rules

        return Rules([feature.model_dump() for feature in self.features], range_margin, explains=explains)


def read_contract(folder: Path) -> ModelContract:
    """Read ``contract.json`` and refuse a major version that this code does not know.

    Raises
    ------
    DataError
        If the file is missing, is not valid, has an unknown major version, or names another model file.
    """
    path = folder / CONTRACT_FILE
    try:
        contract = ModelContract.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(
            f"{path}: the model contract cannot be read ({error.strerror}); 'closedloop train' writes it"
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{path}: {place}: {first['msg']}") from error
    if contract.contract_version.split(".")[0] != CONTRACT_VERSION.split(".")[0]:
        raise DataError(
            f"{path}: contract_version is {contract.contract_version}, "
            f"this code reads {CONTRACT_VERSION.split('.')[0]}.x"
        )
    found = digest_file(folder / MODEL_FILE)
    if found != contract.model_sha256:
        raise DataError(
            f"{folder / MODEL_FILE}: its SHA-256 is {found[:12]}…, the contract says {contract.model_sha256[:12]}…"
        )
    return contract


def digest_file(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def digest_folder(folder: Path) -> str:
    """SHA-256 over names and contents of the three files of a model folder, as hexadecimal digits."""
    total = hashlib.sha256()
    for name in (MODEL_FILE, CONTRACT_FILE, REFERENCE_FILE):
        total.update(f"{name} {digest_file(folder / name)}\n".encode())
    return total.hexdigest()


def check_digest(folder: Path, registered: str | None) -> str:
    """The digest of a model folder, which must be the one that the registry's tag says.

    Raises
    ------
    DataError
        If it is another, or the registry says none.
    """
    found = digest_folder(folder)
    if found != registered:
        said = f"{registered[:12]}…" if registered else "nothing"
        raise DataError(f"digest: {folder.name} is {found[:12]}…, the registry says {said}")
    return found
