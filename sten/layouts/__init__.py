"""Layouts: the contract (`base`), helpers, and one file for each built-in one; no layout imports another."""

from sten.layouts.bsr import BSR
from sten.layouts.csr import CSR
from sten.layouts.dual_mask import DualMask
from sten.layouts.fan_in import FanIn
from sten.layouts.grouped_nm import GroupedNM
from sten.layouts.masked import Masked
from sten.layouts.nm import NM
from sten.layouts.vector_nm import VectorNM

__all__ = ["BSR", "CSR", "NM", "DualMask", "FanIn", "GroupedNM", "Masked", "VectorNM"]
