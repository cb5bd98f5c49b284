"""What users do to `module.weight` beside calling operators: item assignment, views, init, readers of storage, copies.

Each act is a line of Python over `m` (an nn.Linear), `mask` (the pattern), `on` and `off` (an index of a stored entry
and of one that is not), played on sparse weights, finalized and trainable, and on the dense twin. An expression is
compared by its value; a statement by the weight after it.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import sten

from .classify import Verdict, after_error, after_write, copied, judged_result, line
from .forms import ALL, Form
from .operators import Attempt

WRITES = """
m.weight[0] = 0
m.weight[on] = 5.0
m.weight[off] = 5.0
m.weight[off] = 0
m.weight[:, 1] *= 2
m.weight[2:4] = 0
m.weight[...] = 0
m.weight[None] = 0
m.weight[torch.tensor([0, 2])] = 0
m.weight[mask] = 3.0
m.weight[~mask] = 3.0
m.weight[:] = torch.where(mask, 2.0, 0.0)
m.weight[:] = torch.ones_like(mask).float()
m.weight[0] += 1
m.weight[0].zero_()
m.weight[0].mul_(2)
m.weight[0, :4].fill_(0)
m.weight.data[0] = 0
m.weight.data[0].zero_()
m.weight.data.view(-1)[:4] = 0
m.weight.T[0] = 0
m.weight.t()[:, 0].zero_()
m.weight.t().mul_(2)
m.weight.chunk(2)[0].zero_()
m.weight.split(2)[0].zero_()
m.weight.unbind()[0].zero_()
m.weight.narrow(0, 0, 2).zero_()
m.weight.diagonal().zero_()
m.weight.view(-1).zero_()
m.weight.flatten().mul_(2)
m.weight.unsqueeze(0).zero_()
for row in m.weight: row.zero_()
m.weight.fill_diagonal_(0)
m.weight.index_fill_(0, torch.tensor([0]), 0)
m.weight.masked_fill_(~mask, 0)
m.weight.masked_fill_(mask, 4.0)
m.weight.copy_(torch.where(mask, 2.0, 0.0))
m.weight.copy_(torch.ones_like(mask).float())
m.weight.data = torch.where(mask, 2.0, 0.0)
m.weight.data = torch.ones_like(mask).float()
m.weight = nn.Parameter(torch.where(mask, 2.0, 0.0))
m.weight.set_(torch.where(mask, 2.0, 0.0))
m.weight.mul_(2)
m.weight.mul_(mask)
m.weight.add_(1)
m.weight.add_(torch.ones_like(mask).float())
m.weight.div_(0)
m.weight.clamp_(min=0.1)
m.weight.clamp_(-0.1, 0.1)
m.weight.neg_().abs_()
m.weight.zero_()
m.weight.fill_(1)
m.weight.resize_(2, 2)
m.weight.t_()
m.weight.swapaxes_(0, 1)
nn.init.zeros_(m.weight)
nn.init.ones_(m.weight)
nn.init.constant_(m.weight, 0.5)
nn.init.uniform_(m.weight)
nn.init.normal_(m.weight)
nn.init.trunc_normal_(m.weight)
nn.init.xavier_uniform_(m.weight)
nn.init.kaiming_normal_(m.weight)
nn.init.orthogonal_(m.weight)
nn.init.eye_(m.weight)
nn.init.sparse_(m.weight, 0.5)
m.reset_parameters()
nn.utils.vector_to_parameters(torch.where(mask, 2.0, 0.0).flatten(), [m.weight])
torch.add(m.weight, 1, out=m.weight)
torch.mul(m.weight, 2, out=m.weight)
torch.mm(mask.float(), mask.float().t() @ mask.float(), out=m.weight)
torch._foreach_mul_([m.weight], 2.0)
m.load_state_dict({k: v * 2 if v.is_floating_point() else v for k, v in m.state_dict().items()})
m.requires_grad_(False)
""".strip().splitlines()

READS = """
float(m.weight.sum())
float(m.weight[on])
bool((m.weight != 0).any())
len(m.weight)
[float(row.sum()) for row in m.weight]
m.weight.shape, m.weight.dtype, m.weight.numel(), m.weight.dim()
m.weight == m.weight
torch.equal(m.weight, m.weight)
torch.allclose(m.weight, m.weight)
copy.copy(m.weight)
copy.deepcopy(m.weight)
copy.deepcopy(m).weight
pickle.loads(pickle.dumps(m.weight))
pickle.loads(pickle.dumps(m)).weight
saved(m.weight)
m.weight.double()
m.weight.half()
m.double().weight
m.weight.to(torch.bfloat16)
m.weight.int()
m.weight.type(torch.float64)
m.weight.cpu()
m.weight.contiguous()
m.weight.to(memory_format=torch.contiguous_format)
m.weight.clone()
m.weight.detach()
m.weight.to_sparse()
m.weight.to_sparse_csr()
m.weight.numpy()
m.weight.tolist()
numpy.array(m.weight)
numpy.asarray(m.weight)
numpy.from_dlpack(m.weight.detach())
torch.from_dlpack(m.weight.detach())
torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(m.weight.detach()))
m.weight.detach().__dlpack__() is not None
torch.tensor(m.weight)
torch.as_tensor(m.weight)
torch.asarray(m.weight)
torch.Tensor(m.weight.detach())
m.weight.detach().as_subclass(torch.Tensor) + 1
m.weight.as_strided((2, 2), (1, 1))
m.weight.untyped_storage().tolist()[:16]
bytes(m.weight.untyped_storage())
m.weight.storage().tolist()
m.weight.untyped_storage().clone().tolist()
m.weight.view(torch.int32)
m.weight.new_zeros(3)
m.weight.new_ones(m.weight.shape)
m.weight.new_full((2, 2), 3.0)
m.weight.new_tensor([1.0])
torch.zeros_like(m.weight)
torch.ones_like(m.weight)
torch.full_like(m.weight, 2.0)
m.weight * float("inf")
m.weight / 0
1 - m.weight
m.weight @ m.weight.t()
torch.cat([m.weight, m.weight])
torch.stack([m.weight, m.weight])
torch.where(mask, m.weight, 1.0)
nn.utils.parameters_to_vector([m.weight])
torch.jit.trace(m, x)(x)
torch.jit.script(m)(x)
torch.jit.freeze(torch.jit.trace(m.eval(), x))(x)
torch.export.export(m, (x,)).module()(x)
torch.func.functional_call(m, {"weight": torch.ones(8, 12) * mask}, x)
torch.vmap(lambda v: m.weight @ v)(x)
torch.func.grad(lambda w: (x @ w.t()).sum())(m.weight)
torch.func.jvp(lambda w: x @ w.t(), (m.weight.detach(),), (m.weight.detach(),))
mask * torch.autograd.functional.hessian(lambda w: (x @ w.t()).norm(), m.weight.detach()) * mask[..., None, None]
torch.utils.checkpoint.checkpoint(m, x, use_reentrant=False)
nn.utils.clip_grad_norm_(m.parameters(), 1.0)
nn.utils.parametrizations.weight_norm(m)(x)
nn.utils.parametrizations.spectral_norm(m.eval())(x)
nn.utils.fusion.fuse_linear_bn_eval(m.eval(), nn.BatchNorm1d(8).eval())(x)
nn.utils.prune.l1_unstructured(m, "weight", 0.5)(x)
torch.ao.quantization.quantize_dynamic(nn.Sequential(m), {nn.Linear})(x)
""".strip().splitlines()

SHAPE = (8, 12)
GRADIENTS = ("requires_grad_", "func.grad", "jit", "export", "checkpoint", "prune", "norm(m)", "hessian")


def saved(value):
    """Through a file that torch.load reads with weights_only=True."""
    import io

    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file)


def act_units() -> dict[str, Callable[[], Iterator[Attempt]]]:
    """The attempts of every act, by its text."""
    acts = [("write", text) for text in WRITES] + [("read", text) for text in READS]
    return {text: functools.partial(attempts, kind, text) for kind, text in acts}


def attempts(kind: str, text: str) -> Iterator[Attempt]:
    for form in ALL:
        for trainable in (False, True) if not form.transposed else (False,):
            play = functools.partial(judge_act, kind, text, form, trainable)
            yield Attempt(text, kind, "trainable" if trainable else "finalized", str(form), play)


def judge_act(kind: str, text: str, form: Form, trainable: bool) -> Verdict:
    """The act on a layer with a sparse weight and on its dense twin."""
    torch.manual_seed(0)
    dense = nn.Linear(SHAPE[1], SHAPE[0])
    sparse, weight = copy.deepcopy(dense), form.store(dense.weight)
    mask = weight.mask()
    dense.weight.data = weight.to_dense()  # a transposed weight has the strides of a transposed matrix
    sparse.weight = nn.Parameter(weight)
    before = copied(dense.weight)
    with warnings.catch_warnings(), torch.set_grad_enabled(any(name in text for name in GRADIENTS)):
        warnings.simplefilter("ignore")
        if trainable:
            sten.trainable(sparse)
        try:
            want = perform(kind, text, dense, mask)
        except Exception as error:
            return Verdict("skipped", line(error))
        try:
            got = perform(kind, text, sparse, mask)
        except Exception as error:
            return after_error(error, [before], [sparse.weight if kind == "write" else before], kind == "write")
        try:
            if kind == "write":
                random = "init." in text or "reset" in text
                return after_write(before, copied(dense.weight), sparse.weight, mask, is_scalar(text), random)
            return judged_result(want, got, [], False, Verdict("right"))
        except Exception as error:
            return Verdict("crash", "reading the result: " + line(error))


def is_scalar(text: str) -> bool:
    """Whether the act may write at the stored entries alone: in place with numbers."""
    return text.startswith("nn.init") or (text.startswith("m.weight.") and "ones_like" not in text and "[" not in text)


def perform(kind: str, text: str, m: nn.Module, mask: Tensor):
    """The value of the act; of a statement, None."""
    import pickle

    import numpy
    import torch.ao.quantization
    import torch.nn.utils.prune
    import torch.utils.checkpoint

    on, off = (tuple(where.nonzero()[0].tolist()) if where.any() else (0, 0) for where in (mask, ~mask))
    torch.manual_seed(3)
    names = {"m": m, "mask": mask, "on": on, "off": off, "torch": torch, "nn": nn, "copy": copy, "pickle": pickle}
    names |= {"numpy": numpy, "saved": saved, "x": torch.randn(3, SHAPE[1])}
    if kind == "read":
        return eval(text, names)
    exec(text, names)
    return None
