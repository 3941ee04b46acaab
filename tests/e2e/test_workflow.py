"""The line from the first stage to the last."""

from __future__ import annotations


def test_the_small_shop_passes_every_gate_and_becomes_champion(small_shop):
    verdict = small_shop.read_json("metrics/gates.json")
    assert verdict["passed"]
    registration = small_shop.read_json("metrics/registration.json")
    assert registration["model_name"] == "shop_churn"
    assert (registration["version"], registration["alias"]) == (1, "champion")


def test_registering_again_registers_nothing_twice(shop_copy):
    first = shop_copy.read_json("metrics/registration.json")
    assert "version 1" in shop_copy.run("register").output
    assert shop_copy.read_json("metrics/registration.json") == first
