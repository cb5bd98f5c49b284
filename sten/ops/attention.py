"""Multi-head attention with sparse projections.

torch's function slices its weights and, in its fused fast path, reads their storage; here the projections run through
`linear`, and the rest is scaled_dot_product_attention. Dimensions: L target, S source, N batch, E embedding, H heads,
D = E / H.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .._torch_private import fused_attention
from ..tensor import SparseTensor, as_it_is, aten, function
from .linear import linear

A = torch.ops.aten


def _project(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    return linear(x, w, bias) if isinstance(w, SparseTensor) else F.linear(x, w, bias)


def in_projection(q: Tensor, k: Tensor, v: Tensor, w: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The three projections by one packed weight (3E, E).

    A sparse weight cannot be sliced at every row, so each distinct input is multiplied by the whole weight, and a third
    of the result is used: no extra cost for self-attention, twice the work for cross-attention.
    """
    parts: dict[int, tuple[Tensor, ...]] = {}
    for x in (q, k, v):
        if id(x) not in parts:
            parts[id(x)] = _project(x, w, bias).chunk(3, dim=-1)
    return parts[id(q)][0], parts[id(k)][1], parts[id(v)][2]


def _heads(x: Tensor, heads: int) -> Tensor:
    """(L, N, E) to (N, H, L, D)."""
    return x.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)


def _as_float(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """An additive mask of the logits; True in a bool mask means: not attended."""
    if mask is None or mask.dtype != torch.bool:
        return None if mask is None else mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)


def attend(q, k, v, mask, dropout: float, need_weights: bool) -> tuple[Tensor, Tensor | None]:
    """softmax(q k^T / sqrt(D) + mask) v for (N, H, L, D), and the attention weights if `need_weights`."""
    if not need_weights:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout), None
    logits = q * (1 / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)
    weights = F.dropout(torch.softmax(logits if mask is None else logits + mask, -1), dropout)
    return weights @ v, weights


def _merge_masks(attn_mask, key_padding_mask, batch, heads, length, source, q) -> Tensor | None:
    """One additive mask that broadcasts to (N, H, L, S)."""
    mask = _as_float(attn_mask, q.dtype)
    if mask is not None and mask.dim() == 3:
        mask = mask.view(batch, heads, length, source)
    padding = _as_float(key_padding_mask, q.dtype)
    if padding is not None:
        padding = padding.view(batch, 1, 1, source)
        mask = padding if mask is None else mask + padding
    return mask


@function(F.multi_head_attention_forward)
def multi_head_attention_forward(
    query, key, value, embed_dim_to_check, num_heads, in_proj_weight, in_proj_bias, bias_k, bias_v, add_zero_attn,
    dropout_p, out_proj_weight, out_proj_bias, training=True, key_padding_mask=None, need_weights=True, attn_mask=None,
    use_separate_proj_weight=False, q_proj_weight=None, k_proj_weight=None, v_proj_weight=None, static_k=None,
    static_v=None, average_attn_weights=True, is_causal=False,
):  # fmt: skip
    """F.multi_head_attention_forward, for weights of which some are sparse."""
    if static_k is not None or static_v is not None:
        raise NotImplementedError("Expected static_k=None and static_v=None with sparse projections, got a tensor.")
    if attn_mask is None and is_causal:
        raise RuntimeError("Expected attn_mask together with is_causal=True, got None; pass the mask as well.")
    if query.shape[-1] != embed_dim_to_check or embed_dim_to_check % num_heads:
        raise RuntimeError(
            f"Expected a query with {embed_dim_to_check} features, a multiple of {num_heads} heads, got "
            f"{query.shape[-1]}."
        )
    batched = query.dim() == 3
    if not batched:
        same_kv, same_qk = key is value, query is key
        query = query.unsqueeze(1)
        key = query if same_qk else key.unsqueeze(1)
        value = key if same_kv else value.unsqueeze(1)
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    if use_separate_proj_weight:
        biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
        weights = (q_proj_weight, k_proj_weight, v_proj_weight)
        q, k, v = (_project(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
    else:
        q, k, v = in_projection(query, key, value, in_proj_weight, in_proj_bias)
    length, batch, _ = q.shape
    k, v, extra = _append_rows(k, v, bias_k, bias_v, add_zero_attn)
    attn_mask, key_padding_mask = (None if m is None else F.pad(m, (0, extra)) for m in (attn_mask, key_padding_mask))
    mask = _merge_masks(attn_mask, key_padding_mask, batch, num_heads, length, k.shape[0], q)
    q, k, v = (_heads(x, num_heads) for x in (q, k, v))
    out, weights = attend(q, k, v, mask, dropout_p if training else 0.0, need_weights)
    out = _project(out.permute(2, 0, 1, 3).flatten(2), out_proj_weight, out_proj_bias)
    if weights is not None and average_attn_weights:
        weights = weights.mean(1)
    if not batched:
        out, weights = out.squeeze(1), None if weights is None else weights.squeeze(0)
    return out, weights


def _append_rows(k: Tensor, v: Tensor, bias_k, bias_v, zeros: bool) -> tuple[Tensor, Tensor, int]:
    """Keys and values with one more source position for their biases, and one of zeros; the number of positions."""
    length = k.shape[0]
    if bias_k is not None:
        k, v = (torch.cat([x, bias.expand(1, *x.shape[1:])]) for x, bias in ((k, bias_k), (v, bias_v)))
    if zeros:
        k, v = (torch.cat([x, x.new_zeros(1, *x.shape[1:])]) for x in (k, v))
    return k, v, k.shape[0] - length


def _fused_attention(x, heads, qkv_weight, qkv_bias, proj_weight, proj_bias, mask, mask_type) -> Tensor:
    """Self-attention on (N, L, E) as in torch's fused layer; mask_type: 0 source, 1 key padding, 2 both."""
    x = x.transpose(0, 1)
    q, k, v = in_projection(x, x, x, qkv_weight, qkv_bias)
    mask = _as_float(mask, x.dtype)
    if mask is not None and mask_type == 1 and mask.dim() == 2:
        mask = mask[:, None, None, :]
    out, _ = attend(*(_heads(y, heads) for y in (q, k, v)), mask, 0.0, False)
    return _project(out.permute(2, 0, 1, 3).flatten(2), proj_weight, proj_bias).transpose(0, 1)


@aten(A._transformer_encoder_layer_fwd.default)
def transformer_encoder_layer(
    _, src, embed_dim, num_heads, qkv_weight, qkv_bias, proj_weight, proj_bias, use_gelu, norm_first, eps,
    norm_weight_1, norm_bias_1, norm_weight_2, norm_bias_2, ffn_weight_1, ffn_bias_1, ffn_weight_2, ffn_bias_2,
    mask=None, mask_type=None,
):  # fmt: skip
    """The fused encoder layer, which torch.compile calls without checking the types of the weights."""
    activation = F.gelu if use_gelu else F.relu

    def norm1(x):
        return F.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def norm2(x):
        return F.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    def attention(x):
        return _fused_attention(x, num_heads, qkv_weight, qkv_bias, proj_weight, proj_bias, mask, mask_type)

    def feed_forward(x):
        return _project(activation(_project(x, ffn_weight_1, ffn_bias_1)), ffn_weight_2, ffn_bias_2)

    if norm_first:
        src = src + attention(norm1(src))
        return src + feed_forward(norm2(src))
    src = norm1(src + attention(src))
    return norm2(src + feed_forward(src))


@aten(A._native_multi_head_attention.default)
def native_multi_head_attention(
    _, query, key, value, embed_dim, num_head, qkv_weight, qkv_bias, proj_weight, proj_bias, mask=None,
    need_weights=True, average_attn_weights=True, mask_type=None,
):  # fmt: skip
    """The fused attention on (N, L, E), which torch calls only for self-attention."""
    padding, source = (mask, None) if mask_type == 1 else (None, mask)
    if mask_type == 2 and mask.dim() == 4:
        source = mask.flatten(0, 1)
    x = query.transpose(0, 1)
    out, weights = multi_head_attention_forward(
        x, x, x, embed_dim, num_head, qkv_weight, qkv_bias, None, None, False, 0.0, proj_weight, proj_bias, False,
        padding, need_weights, source, average_attn_weights=average_attn_weights,
    )  # fmt: skip
    return out.transpose(0, 1), weights


as_it_is(*fused_attention)

__all__ = ["attend", "in_projection", "multi_head_attention_forward"]
