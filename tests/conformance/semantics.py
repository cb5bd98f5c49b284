"""A page of what each act does to a sparse weight, from the rows of a run."""

from __future__ import annotations

from collections import Counter, defaultdict

from .classify import FAULTS

HEAD = """# What an act does to a sparse weight

## The rules

- **Assignment.** `w[i] = v` (integers, slices, indices, masks) means `d = w.to_dense(); d[i] = v; w.copy_(d)`: it
  happens if the result is zero off the pattern, and raises ValueError, changing nothing, if it is not. `w[:, 1] *= 2`
  is such an assignment.
- **Views.** Rows, slices, `view`, `chunk`, `diagonal` and whatever else shares memory with a dense weight are here
  *read-only* dense tensors: reading them and gradients through them are as dense; writing to them raises. `t()`,
  `detach()` and `.data` are sparse and share the numbers.
- **`out=` and in-place operators without a rule** are computed dense and copied in under the rule of assignment.
- **In place with a number** (`w.add_(1)`, `w.fill_(2)`, `nn.init.*`) acts on the stored entries alone: optimizers need
  it, and it is the one exception to the dense result.
- **Off the pattern** a product `w * x` or a quotient `w / x` of a sparse `w` is zero, also where `x` is infinite, NaN
  or a zero divisor, and torch's would be NaN.
- **Twins.** `zeros_like` and `clone` keep the pattern; `ones_like`, `full_like`, `rand_like`, `empty_like` and `new_*`
  are plain dense tensors.
- **Operators without a rule** run on a differentiable dense copy, made where they are entered, with one warning
  (`sten.strict()` raises instead).
- **Gradients** of a sparse weight have its pattern, from `backward` and `torch.autograd.grad` alike; those of a dense
  tensor are dense, always. (`torch.func.grad` of a *finalized* weight gives all entries of the gradient, dense; of a
  weight in training, those of the pattern.)

## The forms of a weight

What `m.weight` is and does in each form; `tests/test_user_acts.py` tests the last two columns against a dense twin.

| act | finalized | in training, pattern weight | in training, dense weight |
|---|---|---|---|
| reading | the SparseTensor Parameter | a SparseTensor of the trained values | what the method makes of it, read-only |
| in place, `w[i] = v`, `nn.init`, under `no_grad` | as the rules say | as the rules say | raises, names the Parameter |
| `m.weight = t`, `register_parameter` | replaces it, as in torch | `copy_` if zero off the pattern | `copy_` |
| `m.weight.data = t` | `copy_` if zero off the pattern | the same | `copy_` |
| `.grad`, `requires_grad_` | its own | those of the trained Parameter | the same |
| `register_hook` | works | raises and names the Parameter | the same |
| parametrizations, norms, `prune`, `del` | as in torch | raises before anything changes | the same |
| backward after a write or a step | torch's error | torch's error | torch's error |

## Of an activation or a gradient

What a site or `sten.sparse_op` stores in a layout is a SparseTensor, and the rules above hold, with these differences
([Activations](activations.md); `tests/test_sites.py` tests them against a dense twin, straight-through gradients too):

| act | result |
|---|---|
| `F.linear(x, w)`, `x @ w` with a dense `w` | dense; kernels of a sparse `input` |
| with a sparse `w` | dense; the kernel of `w`, on the unpacked `x`, unless one for both is registered |
| as the right operand, transposed, in a batch | dense, on the unpacked `x` |
| `relu`, `gelu`, `silu`, `x + x`, `x * x`, `x * 2`, `dropout` | sparse, with the same pattern |
| `x * dense` | sparse; of a straight-through `x` dense |
| `softmax`, `sum`, `mean`, norms, `x + dense` | dense, without a warning |
| its gradient | at its pattern; if it is straight-through, or of `JumpReLU`, that of all entries, dense |
| under a compiler, torch.func, or of no tokens | dense with zeros from the start |

## How to read the tables

Made by `python -m tests.conformance --semantics docs/semantics.md` from PyTorch's own databases of operators, modules
and optimizers and a list of acts, over every layout and its transpose; the right value is that of the dense twin.
*right*: as dense. *refused*: one sentence that says what would work; nothing changes. *documented*: as one of the rules
*in place with a number* and *off the pattern* says. *fault*: see `tests/conformance/known.json`. Where several stand,
it depends on the numbers or the layout.
"""

MEANING = {"function": "call", "method": "call", "inplace": "in place", "out": "`out=`", "view": "write to a view"}


def page(rows: list[list]) -> str:
    """The whole page in Markdown."""
    return "\n".join([HEAD, user_acts(rows), operator_kinds(rows), models(rows)])


def cell(outcomes: Counter) -> str:
    """Outcomes in words, the most frequent first; faults as one."""
    merged: Counter = Counter()
    for outcome, number in outcomes.items():
        if outcome != "skipped":
            merged["fault" if outcome in FAULTS else outcome] += number
    return ", ".join(f"**{name}**" if name == "fault" else name for name, _ in merged.most_common()) or "-"


def user_acts(rows: list[list]) -> str:
    """Acts on `m.weight`: finalized and trainable."""
    table: dict[str, dict[str, Counter]] = defaultdict(lambda: defaultdict(Counter))
    for suite, operator, _, case, _, outcome, *_ in rows:
        if suite == "acts":
            table[operator][case][outcome] += 1
    lines = ["## On `m.weight`\n", "| act | finalized | trainable |", "|---|---|---|"]
    for act, forms in table.items():
        escaped = act.replace("|", "\\|")
        lines.append(f"| `{escaped}` | {cell(forms['finalized'])} | {cell(forms['trainable'])} |")
    return "\n".join(lines) + "\n"


def operator_kinds(rows: list[list]) -> str:
    """Operators: by how they are called, those that are right throughout in one sentence."""
    kinds = ("function", "method", "inplace", "out", "alias", "view", "backward")
    table: dict[str, dict[str, Counter]] = defaultdict(lambda: defaultdict(Counter))
    for suite, operator, kind, _, _, outcome, *_ in rows:
        if suite in ("operators", "foreach"):
            table[operator][kind][outcome] += 1
    right = [name for name, by_kind in sorted(table.items()) if {cell(c) for c in by_kind.values()} <= {"right", "-"}]
    lines = ["## Operators\n", f"Right throughout, {len(right)} of {len(table)}: {', '.join(right)}.\n"]
    lines.append("| operator | " + " | ".join(MEANING.get(k, k) for k in kinds) + " |")
    lines.append("|---" * (len(kinds) + 1) + "|")
    for operator, by_kind in sorted(table.items()):
        if operator not in right:
            lines.append(f"| `{operator}` | " + " | ".join(cell(by_kind[kind]) for kind in kinds) + " |")
    return "\n".join(lines) + "\n"


def models(rows: list[list]) -> str:
    """Modules and optimizers: by form."""
    table: dict[str, dict[str, Counter]] = defaultdict(lambda: defaultdict(Counter))
    for suite, operator, kind, case, _, outcome, *_ in rows:
        if suite in ("modules", "optimizers"):
            table[f"{operator}: {kind}"][case.split("/")[-1]][outcome] += 1
    lines = ["## Modules and optimizers\n", "| act | finalized | trainable |", "|---|---|---|"]
    lines += [f"| {a} | {cell(f['finalized'])} | {cell(f['trainable'])} |" for a, f in sorted(table.items())]
    return "\n".join(lines) + "\n"
