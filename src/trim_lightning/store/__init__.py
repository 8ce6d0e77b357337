"""The stage store: content-addressed results of expensive stages, shared by runs and processes."""

from trim_lightning.store.cost import Cost
from trim_lightning.store.keys import StageKey
from trim_lightning.store.receipt import StoreError
from trim_lightning.store.store import Entry, Store

__all__ = ["Cost", "Entry", "StageKey", "Store", "StoreError"]
