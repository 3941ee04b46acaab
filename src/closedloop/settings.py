"""Where services live and what this process may use: command line, environment, configs/<profile>.yaml, defaults."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from closedloop.dataset import describe_invalid, read_yaml
from closedloop.errors import ConfigError

PROFILE_VARIABLE = "CLOSEDLOOP_PROFILE"
CONFIG_FOLDER = Path("configs")


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TrackingSettings(_Section):
    """MLflow: its store, and the folder or bucket of its artifacts."""

    uri: str = "sqlite:///mlflow.db"
    artifacts: str = "state/mlflow"
    wandb: bool = False


class FeatureStoreSettings(_Section):
    """What differs from ``feature_repo/feature_store.yaml``, in Feast's own words; ``offline``: published rows."""

    offline: str = "state/feast/offline"
    overrides: dict[str, Any] = {}


class EngineSettings(_Section):
    """DuckDB's limits; it spills to ``temp_directory`` beyond them."""

    memory_limit: str = Field(default="2GB", pattern=r"^\d+(\.\d+)?\s?[KMG]i?B$")
    threads: int = Field(default=2, ge=1, le=1024)
    temp_directory: str = "state/duckdb"


class ReleaseSettings(_Section):
    """Whether a model that won offline becomes champion at once; production releases by evidence instead."""

    auto_promote: bool = False


class _Environment(EnvSettingsSource):
    """The environment without the profile, which was decided before its file was read: an argument wins there."""

    def __call__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__call__().items() if name != "profile"}


class Settings(BaseSettings):
    """All settings, resolved; relative paths are relative to ``root``."""

    model_config = SettingsConfigDict(env_prefix="CLOSEDLOOP_", env_nested_delimiter="__", frozen=True, extra="forbid")

    profile: Literal["local", "production"] = "local"
    root: Path = Path()
    tracking: TrackingSettings = TrackingSettings()
    features: FeatureStoreSettings = FeatureStoreSettings()
    engine: EngineSettings = EngineSettings()
    release: ReleaseSettings = ReleaseSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The environment wins over the profile's file, which comes in through ``init_settings``."""
        return _Environment(settings_cls), init_settings

    @model_validator(mode="after")
    def _production_releases_on_evidence(self) -> Settings:
        if self.profile == "production" and self.release.auto_promote:
            raise ValueError("release.auto_promote is refused in production: a champion is released by canary")
        return self

    def locate(self, path: str) -> Path:
        """A path of the settings as an absolute path."""
        return (self.root / path).resolve()

    def locate_url(self, url: str) -> str:
        """A database address with a relative SQLite file made absolute; any other is returned as it is."""
        prefix = "sqlite:///"
        if url.startswith(prefix) and not url.startswith(prefix + "/"):
            return prefix + str(self.locate(url.removeprefix(prefix)))
        return url


def load_settings(profile: str | None = None, *, folder: Path = CONFIG_FOLDER) -> Settings:
    """Read the settings of a profile (default: the environment's CLOSEDLOOP_PROFILE, else local).

    The root is where the real ``configs`` folder stands, so that a workspace that links to it shares the stores.

    Raises
    ------
    ConfigError
        If the profile's file is missing or a key is wrong.
    """
    name = profile or os.environ.get(PROFILE_VARIABLE, "local")
    path = folder / f"{name}.yaml"
    values = {"root": folder.resolve().parent, **read_yaml(path), "profile": name}
    try:
        return Settings(**values)
    except SettingsError as error:
        raise ConfigError(
            f"the environment (CLOSEDLOOP_*): {error}; a section's keys are named SECTION__KEY"
        ) from error
    except ValidationError as error:
        raise ConfigError(f"{path} and the environment (CLOSEDLOOP_*):\n  {describe_invalid(error)}") from error
