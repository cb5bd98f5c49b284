"""The built-in layouts, one file each; no file imports another. `sten.layout` states the contract they keep."""

from sten.layouts.bsr import BSR
from sten.layouts.csr import CSR
from sten.layouts.fan_in import FanIn
from sten.layouts.grouped_nm import GroupedNM
from sten.layouts.masked import Masked
from sten.layouts.nm import NM
from sten.layouts.vector_nm import VectorNM

__all__ = ["BSR", "CSR", "NM", "FanIn", "GroupedNM", "Masked", "VectorNM"]
