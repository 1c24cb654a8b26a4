"""cluster.yaml holds against Ray's own schema, and against what that schema does not look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

FILE = Path(__file__).parents[2] / "cluster.yaml"
RESOURCES = {"CPU", "GPU", "memory", "object_store_memory"}


def load() -> dict[str, Any]:
    return yaml.safe_load(FILE.read_text())


def check(config: dict[str, Any]) -> None:
    prepared = prepare_config(config)
    prepared.setdefault("cluster_synced_files", [])
    validate_config(prepared)


def test_rays_own_schema_accepts_it() -> None:
    check(load())


def test_the_schema_check_does_refuse() -> None:
    config = load()
    config["head_node_type"] = "no such type"
    with pytest.raises(ValueError, match="head_node_type"):
        check(config)


def test_resources_are_spelt_as_ray_spells_them() -> None:
    for name, node in load()["available_node_types"].items():
        assert set(node["resources"]) <= RESOURCES, name


def test_a_region_and_a_user_are_given() -> None:
    config = load()
    assert config["provider"]["region"]
    assert config["auth"]["ssh_user"]
