"""The client of the benchmarks."""

from __future__ import annotations

import argparse

from benchmarks.load import adapter_fields


def test_each_client_names_its_own_adapter_in_the_way_of_its_server() -> None:
    plain = argparse.Namespace(model="m", adapter_prefix=None, adapter_numbers=False)
    assert adapter_fields(plain, 3) == {"model": "m"}
    named = argparse.Namespace(model="m", adapter_prefix="a", adapter_numbers=False)
    assert [adapter_fields(named, client) for client in (0, 3)] == [{"model": "a0"}, {"model": "a3"}]
    numbered = argparse.Namespace(model="m", adapter_prefix=None, adapter_numbers=True)
    assert adapter_fields(numbered, 3) == {"model": "m", "lora": [{"id": 3, "scale": 1.0}]}
