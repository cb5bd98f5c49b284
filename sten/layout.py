"""What authors of layouts need: the contract, and helpers to choose entries and to check parts."""

from .layouts.base import Layout as Layout
from .layouts.base import Parts as Parts
from .layouts.checks import check_sparsity as check_sparsity
from .layouts.checks import count_to_keep as count_to_keep
from .layouts.checks import expect_dense as expect_dense
from .layouts.checks import expect_parts as expect_parts
from .layouts.checks import expect_range as expect_range
from .layouts.checks import expect_score as expect_score
from .layouts.checks import expect_whole as expect_whole
from .layouts.checks import expect_zero as expect_zero
from .layouts.topk import top as top
from .layouts.topk import top_of_groups as top_of_groups
