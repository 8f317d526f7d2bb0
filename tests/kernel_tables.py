"""Types of the bundles of int32 tables that kernels take, for tests that compile them."""

from __future__ import annotations

from typing import Any

from mtraining.kernel.hopper.items import ColumnLists
from mtraining.kernel.triton.common import RowLists
from mtraining.kernel.triton.hidden import KeyTables, QueryTables

TABLES: dict[str, Any] = {
    bundle.__name__: bundle for bundle in (RowLists, ColumnLists, QueryTables, KeyTables)
}
# Members that are None without starts.
OF_STARTS = {"first_keys", "bases", "reach", "starts", "begin", "masked", "last_seen", "ends"}


def table_kinds(bundle: str, starts: bool) -> Any:
    """Types of a bundle of tables: all pointers or, without starts, some of them None."""
    table = TABLES[bundle]
    return table(*["*i32" if starts or name not in OF_STARTS else "constexpr" for name in table._fields])
