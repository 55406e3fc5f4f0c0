"""Random programs that compute attention: whatever is rewritten must give the same numbers and gradients.

A :class:`Program` is plain data that hypothesis draws; :func:`source` writes it down as Python, which is what a
failure prints. The program runs as it is and as Dynamo captured it and ``find_sites`` / ``plan_sites`` / ``rewrite``
changed it, once per policy of ``POLICIES``. Nothing here knows which sites can be rewritten: a site that is rewritten
must be equal (relative error 1e-5 in float32), a site that is not must say why, and its graph must stay as it was.
Rows whose keys are all masked are not compared, and with Express those of padded tokens neither (``passes/mask.py``).
Some programs run once more with other sequences beside one of the batch. What that one gets, also of the policy that
does keep few rows, must be the same wherever it is in the program itself.

220 programs by default, always the same ones, in about 40 s; ``HYPOTHESIS_PROFILE=nightly`` (``make fuzz``) draws
10,000 new ones and prints what became of every spelling; ``FUZZ_PROGRAMS`` is another number of programs.
"""

from __future__ import annotations

import contextlib
import copy
import linecache
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from express_compile.core.method import Method, Refusal, register
from express_compile.core.policy import Policy
from express_compile.core.spec import AttentionSpec, Mask, Site, known_equal
from express_compile.passes.buffers import Buffers
from express_compile.passes.match import find_sites
from express_compile.passes.pipeline import plan_sites
from express_compile.passes.rewrite import rewrite

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
PROGRAMS = int(os.environ.get("FUZZ_PROGRAMS", 10_000 if NIGHTLY else 220))
TOLERANCE = 1e-5

VERDICTS: Counter[tuple[str, str, str]] = Counter()  # (policy, feature, verdict) -> sites


# ---- a method that takes whatever is proven, so that every class of the prover is put to the test -----------------

_LIBRARY = torch.library.Library("express_compile", "FRAGMENT")
_LIBRARY.define(
    "proven(Tensor query, Tensor key, Tensor value, Tensor? padding, Tensor seed, float scale, int layer, "
    "bool causal, SymInt offset, int window) -> (Tensor, Tensor)"
)


def _proven(query, key, value, padding, seed, scale, layer, causal, offset, window):
    """Attention with the proven mask by its definition in ``Mask``; ``offset`` -1 is ``Lk - Lq``."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * scale
    offset = key.shape[2] - query.shape[2] if offset == -1 else offset
    back = torch.arange(query.shape[2])[:, None] + offset - torch.arange(key.shape[2])
    visible = torch.ones_like(back, dtype=torch.bool)
    if causal:
        visible = visible & (back >= 0)
    if window:
        visible = visible & ((back if causal else back.abs()) < window)
    if padding is not None:
        visible = visible & padding[:, None, None, :]
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    return scores.softmax(-1) @ value, scores.logsumexp(-1)


_LIBRARY.impl("proven", _proven, "CompositeImplicitAutograd")


def _refuse(spec: AttentionSpec, policy: Policy) -> Refusal | None:
    mask = spec.mask
    if mask.unknown is not None:
        return Refusal("proven", mask.unknown)
    if mask.segments:
        return Refusal("proven", "it keeps packed sequences apart")
    if spec.dropout_p > 0:
        return Refusal("proven", "it drops attention weights")
    bounded = mask.causal or mask.window is not None
    if bounded and not isinstance(mask.offset, int) and not known_equal(mask.offset, spec.Lk - spec.Lq):
        return Refusal("proven", f"its offset is {mask.offset}")
    return None


def _params(site: Site, policy: Policy) -> dict[str, Any]:
    mask = site.spec.mask
    offset = mask.offset if isinstance(mask.offset, int) else -1
    return {"causal": mask.causal, "offset": offset, "window": mask.window or 0}


register(Method("proven", "what is proven", "every proven mask", "the rest", refuse=_refuse, params=_params))

# short sequences are exact with Express (up to 4 * budget keys) and with Thinformer (up to budget)
POLICIES = {
    "exact": Policy(methods=("exact",)),
    "thinning": Policy(methods=("express", "thinformer"), budget=32),
    "proven": Policy(methods=("proven",)),
}
# keeps few of the keys: what is computed is another thing than the program's, but of each sequence alone
FEW = {"budget": 4, "sinks": 1, "window": 4, "protected": 0, "method_options": {"express": {"block": 16}}}
THINNED = {"thinned": Policy(methods=("thinformer", "express"), **FEW)}
WRITTEN_OUT = "proven"  # where what stays exact becomes SDPA all the same, as before inductor


# ---- spellings: every value is Python that computes the right thing ---------------------------------------------

REPEATS = {
    "repeat_interleave": "{x} = {x}.repeat_interleave(H // Hk, dim=1)",
    "torch.repeat_interleave": "{x} = torch.repeat_interleave({x}, H // Hk, 1)",
    "expand reshape": "{x} = {x}[:, :, None].expand(B, Hk, H // Hk, Lk, {x}.shape[3]).reshape(B, H, Lk, {x}.shape[3])",
    "unsqueeze flatten": "{x} = {x}.unsqueeze(2).expand(-1, -1, H // Hk, -1, -1).flatten(1, 2)",
    "stack": "{x} = torch.stack([{x}] * (H // Hk), 2).flatten(1, 2)",
    "tile": "{x} = {x}.repeat(1, H // Hk, 1, 1)",
}

LAYOUTS = {
    "4d": ((), ()),
    "3d": (
        ("q = q.reshape(B * H, Lq, D)", "k = k.reshape(B * H, Lk, D)", "v = v.reshape(B * H, Lk, Dv)"),
        ("o = o.reshape(B, H, Lq, Dv)",),
    ),
    "3d view": (
        ("q, k, v = (x.contiguous().view(-1, *x.shape[2:]) for x in (q, k, v))",),
        ("o = o.view(B, H, Lq, Dv)",),
    ),
    "3d flatten": (
        ("q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)",),
        ("o = o.unflatten(0, (B, H))",),
    ),
    "single": (("q, k, v = q.squeeze(1), k[:, 0], v.squeeze(1)",), ("o = o.unsqueeze(1)",)),
    "blhd": (("q, k, v = (x.transpose(1, 2) for x in (q, k, v))",), ("o = o.transpose(1, 2)",)),
    "grouped": (
        ("q = q.reshape(B, Hk, H // Hk, Lq, D)", "k, v = k[:, :, None], v.unsqueeze(2)"),
        ("o = o.reshape(B, H, Lq, Dv)",),
    ),
    "groups": (
        ("q = q.unflatten(1, (Hk, -1)).transpose(1, 2)", "k, v = k[:, None], v[:, None]"),
        ("o = o.transpose(1, 2).reshape(B, H, Lq, Dv)",),
    ),
    "stacked": (
        ("q, k, v = q.reshape(B * Hk, H // Hk * Lq, D), k.flatten(0, 1), v.flatten(0, 1)",),
        ("o = o.reshape(B, H, Lq, Dv)",),
    ),
    "beside": (
        (
            "q = q.unflatten(1, (Hk, -1)).transpose(2, 3).flatten(2, 3).flatten(0, 1)",
            "k, v = k.flatten(0, 1), v.flatten(0, 1)",
        ),
        ("o = o.view(B, Hk, Lq, H // Hk, Dv).transpose(2, 3).reshape(B, H, Lq, Dv)",),
    ),
}
SHARED = ("grouped", "groups", "stacked", "beside")
"""Layouts of grouped queries, whose keys are not repeated."""
# how what has four dimensions comes into the others
MOVED = {
    "3d": "reshape(B * H, Lq, Lk)",
    "grouped": "reshape(B, Hk, H // Hk, Lq, Lk)",
    "groups": "unflatten(1, (Hk, -1)).transpose(1, 2)",
    "stacked": "reshape(B * Hk, H // Hk * Lq, Lk)",
    "beside": "unflatten(1, (Hk, -1)).transpose(2, 3).reshape(B * Hk, Lq * (H // Hk), Lk)",
}

TRANSPOSED = {
    "transpose(-1, -2)": "k.transpose(-1, -2)",
    "transpose(-2, -1)": "k.transpose(-2, -1)",
    "mT": "k.mT",
    "permute": "k.permute(*range(k.dim() - 2), -1, -2)",
    "swapaxes": "k.swapaxes(-1, -2)",
    "torch.transpose": "torch.transpose(k, k.dim() - 2, k.dim() - 1)",
    "contiguous": "k.mT.contiguous()",
}

_MATMUL = {"matmul": "torch.matmul({a}, {b})", "@": "{a} @ {b}", "method": "{a}.matmul({b})"}
_BMM = {"bmm": "torch.bmm({a}, {b})", "bmm method": "{a}.bmm({b})"}
PRODUCTS = {
    "4d": {
        **_MATMUL,
        "reversed": "(k @ q.mT).mT",
        "einsum bhqd,bhkd": "torch.einsum('bhqd,bhkd->bhqk', q, k)",
        "einsum bhid,bhjd": "torch.einsum('b h i d, b h j d -> b h i j', q, k)",
        "einsum ...": "torch.einsum('...qd,...kd->...qk', q, k)",
    },
    "3d": {
        **_MATMUL,
        **_BMM,
        "baddbmm": "torch.baddbmm(torch.empty(q.shape[0], Lq, Lk), q, {b}, beta=0)",
        "einsum nqd,nkd": "torch.einsum('nqd,nkd->nqk', q, k)",
        "reversed": "torch.bmm(k, q.mT).transpose(1, 2)",
    },
    "single": {**_MATMUL, **_BMM, "einsum bqd,bkd": "torch.einsum('bqd,bkd->bqk', q, k)"},
    "blhd": {
        "einsum bqhd,bkhd": "torch.einsum('bqhd,bkhd->bhqk', q, k)",
        "einsum lists": "torch.einsum('blhd,bmhd->bhlm', [q, k])",
        "permute": "q.permute(0, 2, 1, 3) @ k.permute(0, 2, 3, 1)",
    },
    "grouped": {**_MATMUL, "einsum bhgqd,bhokd": "torch.einsum('bhgqd,bhokd->bhgqk', q, k)"},
    "groups": {**_MATMUL, "einsum bghqd,bhkd": "torch.einsum('bghqd,bhkd->bghqk', q, k[:, 0])"},
    **dict.fromkeys(("stacked", "beside"), {**_MATMUL, **_BMM}),
}
VALUE_PRODUCTS = {
    "4d": {
        **_MATMUL,
        "reversed": "(v.mT @ p.mT).mT",
        "einsum bhqk,bhkd": "torch.einsum('bhqk,bhkd->bhqd', p, v)",
        "einsum ...": "torch.einsum('...qk,...kd->...qd', p, v)",
    },
    "3d": {**_MATMUL, **_BMM, "einsum nqk,nkd": "torch.einsum('nqk,nkd->nqd', p, v)"},
    "single": {**_MATMUL, **_BMM, "einsum bqk,bkd": "torch.einsum('bqk,bkd->bqd', p, v)"},
    "blhd": {
        "einsum bhqk,bkhd": "torch.einsum('bhqk,bkhd->bqhd', p, v)",
        "transpose": "(p @ v.transpose(1, 2)).transpose(1, 2)",
    },
    "grouped": dict(_MATMUL),
    "groups": {**_MATMUL, "einsum bghqk,bhkd": "torch.einsum('bghqk,bhkd->bghqd', p, v[:, 0])"},
    **dict.fromkeys(("stacked", "beside"), {**_MATMUL, **_BMM}),
}

SCALES = {
    "none": {},
    "mul": {"scores": "s = s * {c}"},
    "reflected mul": {"scores": "s = {c} * s"},
    "torch.mul": {"scores": "s = torch.mul(s, {c})"},
    "div": {"scores": "s = s / (1 / {c})"},
    "div int": {"scores": "s = s / 3"},
    "mul int": {"scores": "s = s * 2"},
    "imul": {"scores": "s *= {c}"},
    "mul_": {"scores": "s.mul_({c})"},
    "itruediv": {"scores": "s /= 1 / {c}"},
    "div_": {"scores": "s = s.div_(2.5)"},
    "twice": {"scores": "s = s * {c} / 1.5"},
    "tensor div": {"scores": "s = s / torch.full([], 1 / {c}, dtype=s.dtype)"},
    "tensor mul": {"scores": "s = s * torch.tensor({c})"},
    "query": {"inputs": "q = q * {c}"},
    "query div": {"inputs": "q = q / math.sqrt(D)"},
    "key": {"inputs": "k = k * {c}"},
    "both": {"inputs": "q, k = q * D**-0.25, k * D**-0.25"},
    "query and scores": {"inputs": "q = q * 0.5", "scores": "s = s / 1.3"},
    "query in views": {"inputs": "q = (q.flatten(0, 1) * {c}).view(q.shape)"},
    "query in place": {"inputs": "q = q * 1.0; q *= {c}"},
    "query and key": {"inputs": "q, k = 2 * q, (k.mT / 3.0).mT.contiguous()"},
    "almost the query": {"inputs": "q = torch.cat([q[..., :1] * {c}, q[..., 1:]], -1)"},
    "query less": {"inputs": "q = q * -{c}"},
    "query by length": {"inputs": "q = q * math.log(Lk)"},
    "negative": {"scores": "s = s * -{c}"},
    "neg": {"scores": "s = -s"},
}
# number.c is one that another model of the class has otherwise: Dynamo makes it a symbol
CONSTANTS = ("D**-0.5", "0.3", "(1 / math.sqrt(D))", "(D**-0.5 / 2)", "1.0", "number.c")

SOFTMAXES = {
    "F.softmax": "p = F.softmax(s, dim=-1)",
    "torch.softmax": "p = torch.softmax(s, -1)",
    "method": "p = s.softmax(dim=-1)",
    "positive dim": "p = s.softmax(s.dim() - 1)",
    "dtype": "p = F.softmax(s, dim=-1, dtype=torch.float32).to(q.dtype)",
    "float64": "p = F.softmax(s, dim=-1, dtype=torch.float64).to(q.dtype)",
    "float first": "p = s.float().softmax(-1).type_as(q)",
    "minus max": "p = (s - s.amax(-1, keepdim=True)).softmax(-1)",
    "minus max values": "p = torch.softmax(s - s.max(dim=-1, keepdim=True).values.detach(), -1)",
    "module": "p = torch.nn.Softmax(-1)(s)",
}

DROPOUTS = {
    "none": (),
    "p=0": ("p = F.dropout(p, p=0.0)",),
    "eval": ("p = F.dropout(p, p=0.1, training=False)",),
    "eval positional": ("p = F.dropout(p, 0.1, False)",),
    "torch.dropout": ("p = torch.dropout(p, 0.2, train=False)",),
}

# conditions under which a query sees a key, bool, broadcast to [B, H, Lq, Lk]; the first line of each makes `m`
CAUSAL = {
    "tril": ("m = torch.ones(Lq, Lk, dtype=torch.bool).tril({off})",),
    "torch.tril": ("m = torch.tril(torch.ones((Lq, Lk), dtype=torch.bool), diagonal={off})",),
    "triu": ("m = ~torch.ones(Lq, Lk, dtype=torch.bool).triu({off} + 1)",),
    "triu == 0": ("m = torch.triu(torch.ones(Lq, Lk), diagonal={off} + 1) == 0",),
    "float tril": ("m = torch.tril(torch.ones(Lq, Lk), {off}).bool()",),
    "arange le": ("m = torch.arange(Lk)[None, :] <= torch.arange(Lq)[:, None] + ({off})",),
    "arange ge": ("m = torch.arange(Lq).unsqueeze(-1) + ({off}) >= torch.arange(Lk)",),
    "not gt": ("m = ~(torch.arange(Lk) > torch.arange(Lq).view(-1, 1) + ({off}))",),
    "strictly below": ("m = torch.arange(Lk)[None] < torch.arange(Lq)[:, None] + ({off}) + 1",),
    "cumsum": (
        "c = torch.ones(Lk, dtype=torch.long).cumsum(0)",
        "m = c[None, :] - 1 <= torch.arange(Lq)[:, None] + ({off})",
    ),
    "4d": ("m = torch.ones(Lq, Lk, dtype=torch.bool).tril({off})[None, None]",),
    "view": ("m = torch.ones(Lq, Lk, dtype=torch.uint8).tril({off}).view(1, 1, Lq, Lk).bool()",),
    "in place": ("m = torch.ones(Lq, Lk, dtype=torch.bool)", "m.tril_({off})"),
    "sliced": ("m = torch.ones(64, 64, dtype=torch.bool).tril({off})[:Lq, :Lk]",),
    "expanded": ("m = torch.ones(Lq, Lk, dtype=torch.bool).tril({off}).expand(B, 1, Lq, Lk)",),
    "below or itself": (
        "d = torch.arange(Lq)[:, None] + ({off}) - torch.arange(Lk)",
        "m = torch.logical_or(d > 0, d == 0)",
    ),
}
ALMOST = {
    "one too many": ("m = torch.ones(Lq, Lk, dtype=torch.bool).tril({off} + 1)",),
    "strict, first key seen": (
        "m = (torch.arange(Lk)[None, :] < torch.arange(Lq)[:, None] + ({off})) | (torch.arange(Lk) == 0)",
    ),
    "strict": ("m = torch.arange(Lk)[None, :] < torch.arange(Lq)[:, None] + ({off})",),
    "strict from the second head": (
        "m = torch.arange(Lk) <= torch.arange(Lq)[:, None] + ({off}) + (torch.arange(H) == 0)[:, None, None].long()",
    ),
    "looser by batch": (
        "m = torch.arange(Lk) <= torch.arange(Lq)[:, None] + ({off}) + torch.arange(B)[:, None, None, None]",
    ),
    "prefix": ("m = torch.ones(Lq, Lk, dtype=torch.bool).tril({off}) | (torch.arange(Lk) < 2)",),
    "blocks": ("m = torch.arange(Lk) // 2 <= torch.arange(Lq)[:, None] // 2",),
    "one element": ("m = torch.ones(Lq, Lk, dtype=torch.bool).tril({off})", "m[0, -1] = True"),
    "one row": ("m = torch.ones(Lq, Lk, dtype=torch.bool).tril({off})", "m[Lq // 2 : Lq // 2 + 1] = True"),
    "one row through a view": ("m = torch.ones(Lq, Lk, dtype=torch.bool).tril({off})", "m[0].fill_(True)"),
    "one key hidden": ("m = torch.ones(Lq, Lk, dtype=torch.bool).tril({off})", "m[:, Lk // 2] = False"),
    "diagonal hidden": ("m = torch.ones(Lq, Lk, dtype=torch.bool).tril({off})", "m.fill_diagonal_(False)"),
    "all but itself": ("m = ~torch.eye(Lq, Lk, dtype=torch.bool)",),
    "anticausal": ("m = torch.ones(Lq, Lk, dtype=torch.bool).triu({off})",),
    "flipped": ("m = torch.ones(Lq, Lk, dtype=torch.bool).tril({off}).flip(-1)",),
    "rolled": ("m = torch.ones(Lq, Lk, dtype=torch.bool).tril({off}).roll(1, 0)",),
    "twice as steep": ("m = torch.arange(Lk) <= 2 * torch.arange(Lq)[:, None] + ({off})",),
    "half as steep": ("m = 2 * torch.arange(Lk) <= torch.arange(Lq)[:, None] + ({off})",),
    "every other key": ("m = (torch.arange(Lq)[:, None] + ({off}) - torch.arange(Lk)) % 2 == 0",),
    "step": ("m = torch.arange(0, 2 * Lk, 2) <= torch.arange(Lq)[:, None] + ({off})",),
    "start": ("m = torch.arange(1, Lk + 1) <= torch.arange(Lq)[:, None] + ({off})",),
    "or padding": ("m = torch.ones(Lq, Lk, dtype=torch.bool).tril({off}) | real[:, None, None, :]",),
    "or given": ("m = torch.ones(Lq, Lk, dtype=torch.bool).tril({off}) | given",),
    "xor": ("m = torch.ones(Lq, Lk, dtype=torch.bool).tril({off}) ^ (torch.arange(Lk) == 1)",),
    "of the data": ("m = torch.arange(Lk) <= torch.arange(Lq)[:, None] + (q.detach().sum() > 0).long()",),
    "random": ("m = given & (torch.arange(Lk) != 1)",),
}
WINDOWS = {
    "window": ("m = torch.arange(Lq)[:, None] + ({off}) - torch.arange(Lk) < 3",),
    "window from one": ("m = torch.arange(Lk) > torch.arange(Lq)[:, None] + ({off}) - 2",),
    "triu window": ("m = torch.ones(Lq, Lk, dtype=torch.bool).triu({off} - 1)",),
    "causal window": ("d = torch.arange(Lq)[:, None] + ({off}) - torch.arange(Lk)", "m = (d >= 0) & (d < 3)"),
    "itself": ("m = torch.eye(Lq, Lk) == 1",),
    "band": ("m = (torch.arange(Lq)[:, None] + ({off}) - torch.arange(Lk)).abs() <= 2",),
    "band of both bounds": (
        "d = torch.arange(Lq)[:, None] + (Lk - Lq) - torch.arange(Lk)",
        "m = ~((d >= 3) | (d <= -3))",
    ),
    "band to one side": ("d = torch.arange(Lq)[:, None] + ({off}) - torch.arange(Lk)", "m = (d <= 3) & (d >= -1)"),
}
# sequences behind each other in one: `g` numbers them; the last Lq tokens are the queries
PACKED = {
    "numbered": ("g = real.long().cumsum(1) // 2", "m = g[:, None, -Lq:, None] == g[:, None, None]"),
    "one for all": ("g = real[0].long().cumsum(0)", "m = (g[-Lq:, None] == g)[None, None]"),
    "positions": (
        "p = torch.arange(Lk)[None] - 2 * (~real).long().cumsum(1)",
        "g = (torch.diff(p, prepend=p[:, :1] - 1, dim=-1) != 1).cumsum(-1)",
        "m = (g[:, None, :, None] == g[:, None, None]) & (p[:, None, None] <= p[:, None, :, None])",
        "m = m[:, :, -Lq:]",
    ),
    "one sequence": (
        "p = torch.arange(Lk)[None]",
        "g = (torch.diff(p, prepend=p[:, :1] - 1, dim=-1) != 1).cumsum(-1)",
        "m = (g[:, None, :, None] == g[:, None, None]) & (p[:, None, None] <= p[:, None, :, None])",
        "m = m[:, :, -Lq:]",
    ),
    # almost
    "one further": ("g = real.long().cumsum(1)", "m = g.roll(1, 1)[:, None, -Lq:, None] == g[:, None, None]"),
    "or before": ("g = real.long().cumsum(1)", "m = g[:, None, -Lq:, None] >= g[:, None, None]"),
    "positions alone": ("p = real.long().cumsum(1)", "m = p[:, None, None] <= p[:, None, -Lq:, None]"),
    "of the first head": (
        "g = real.long().cumsum(1)",
        "m = (g[:, None, -Lq:, None] == g[:, None, None]) | (torch.arange(H) > 0)[:, None, None]",
    ),
    "of other positions": (
        "p = torch.arange(Lk)[None] - 2 * (~real).long().cumsum(1)",
        "g = (torch.diff(p, prepend=p[:, :1] - 1, dim=-1) != 1).cumsum(-1)",
        "o = p.flip(1)",
        "m = (g[:, None, -Lq:, None] == g[:, None, None]) & (o[:, None, None] <= o[:, None, -Lq:, None])",
    ),
}
PADDINGS = {
    "index": ("m = real[:, None, None, :]",),
    "unsqueeze": ("m = real.unsqueeze(1).unsqueeze(2)",),
    "view": ("m = real.view(B, 1, 1, Lk)",),
    "long": ("m = real.long()[:, None, None] != 0",),
    "eq": ("m = real.float()[:, None, None, :] == 1.0",),
    "expanded": ("m = real[:, None, None, :].expand(B, H, Lq, Lk)",),
    "outer": ("m = real[:, None, None, :] & real[:, None, :Lq, None]",),
    "reversed": ("m = real.flip(1)[:, None, None, :]",),
    "other batch": ("m = real.roll(1, 0)[:, None, None, :]",),
}
GIVEN = {"given": ("m = given",), "not not given": ("m = ~(~given)",)}
MASKS = {
    **{f"causal: {name}": lines for name, lines in CAUSAL.items()},
    **{f"almost: {name}": lines for name, lines in ALMOST.items()},
    **{f"window: {name}": lines for name, lines in WINDOWS.items()},
    **{f"packed: {name}": lines for name, lines in PACKED.items()},
    **{f"padding: {name}": lines for name, lines in PADDINGS.items()},
    **{f"given: {name}": lines for name, lines in GIVEN.items()},
}

APPLIED = {
    "masked_fill": "s = s.masked_fill(~{m}, {fill})",
    "masked_fill == 0": "s = s.masked_fill({m} == 0, {fill})",
    "torch.masked_fill": "s = torch.masked_fill(s, {m}.logical_not(), {fill})",
    "masked_fill_": "s.masked_fill_(~{m}, {fill})",
    "where": "s = torch.where({m}, s, {fill})",
    "where hidden": "s = torch.where(~{m}, {fill}, s)",
    "where tensor": "s = torch.where({m}, s, torch.full([], {fill}, dtype=s.dtype))",
    "where full_like": "s = torch.where({m}, s, torch.full_like(s, {fill}))",
    "add masked_fill": "s = s + torch.zeros({m}.shape).masked_fill(~{m}, {fill})",
    "add where": "s = s + torch.where({m}, 0.0, {fill})",
    "reflected add": "s = torch.where({m}, 0.0, {fill}) + s",
    "iadd": "s += torch.where({m}, 0.0, {fill})",
    "one minus": "s = s + (1.0 - {m}.float()) * max({fill}, torch.finfo(torch.float32).min)",
    "not float": "s = s + (~{m}).to(s.dtype) * max({fill}, -1e9)",
    "sub": "s = s - torch.where({m}, 0.0, -({fill}))",
    # what does not hide
    "times": "s = s * {m}",
    "fill 0": "s = s.masked_fill(~{m}, 0.0)",
    "fill -2": "s = s.masked_fill(~{m}, -2.0)",
    "add -1": "s = s + torch.where({m}, 0.0, -1.0)",
    "wrong way": "s = torch.where({m}, {fill}, s)",
    "bonus": "s = s + torch.where({m}, 1.0, {fill})",
}
FILLS = ("-math.inf", "float('-inf')", "torch.finfo(torch.float32).min", "torch.finfo(q.dtype).min", "-1e9", "-1e4")

# distractors of attention by hand: lines put in at a place of the program
TWISTS: dict[str, dict[str, tuple[str, ...]]] = {
    "none": {},
    "softmax over queries": {"softmax": ("p = s.softmax(-2)",)},
    "softmax over dim 1": {"softmax": ("p = s.softmax(1)",)},
    "log_softmax": {"softmax": ("p = F.log_softmax(s.clamp(min=-9), -1)",)},
    "exp of log_softmax": {"softmax": ("p = F.log_softmax(s, -1).exp()",)},
    "sinks": {
        "softmax": (
            "sink = gain[0].expand(*s.shape[:-1], 1)",
            "p = torch.cat([s, sink], -1)",
            "p = (p - p.amax(-1, keepdim=True)).softmax(-1)[..., :-1]",
        )
    },
    "zero sinks": {"softmax": ("p = torch.cat([s, s[..., :1] * 0], -1).softmax(-1)[..., :-1]",)},
    "softmax without gradients": {"softmax": ("with torch.no_grad():", "    p = s.softmax(-1)")},
    "difference": {"softmax": ("p = s.softmax(-1) - 0.5 * (s * 2.0).softmax(-1)",)},
    "softmax twice": {"softmax": ("p = s.softmax(-1).softmax(-1)",)},
    "bfloat16 softmax": {"softmax": ("p = s.to(torch.bfloat16).softmax(-1).to(s.dtype)",)},
    "minus another max": {"softmax": ("p = (s - s.amax(-2, keepdim=True)).softmax(-1)",)},
    "fewer keys": {"softmax": ("p = s[..., :-1].softmax(-1)", "v = v[..., :-1, :]")},
    "by hand": {"softmax": ("p = (s - s.amax(-1, keepdim=True)).exp()", "p = p / p.sum(-1, keepdim=True)")},
    "weights returned": {"returned": ("p.reshape(B, H, Lq, Lk)",)},
    "scores returned": {"returned": ("s.clamp(min=-9).reshape(B, H, Lq, Lk)",)},
    "two values": {"weights": ("first = {pv}", "v = v.square()"), "end": ("o = o + first",)},
    "learnt scale": {"scores": ("s = s * gain[0]",)},
    "learnt scale of the query": {"start": ("q = q * gain[0]",)},
    "scale per head": {"scores": ("s = s * gain[:, None, None]",)},
    "scale of the data": {"scores": ("s = s / q.square().mean().sqrt()",)},
    "scores written after": {"weights": ("s.zero_()",)},
    "alias of the scores written": {"masked": ("t = s", "t *= 2.0")},
    "view of the scores written": {"masked": ("t = s[..., 0]", "t.add_(1.0)")},
    "column set": {"masked": ("s[..., 0] = 0.5",)},
    "row set": {"masked": ("s[..., 0, :] = 0.25",)},
    "scores written before the mask": {"scores": ("s.select(-1, 0).mul_(0.5)",)},
    "weights copied and written": {"weights": ("p = p.clone()", "p[..., 0] = 0.0")},
    "weights written": {"weights": ("p[..., 0] = 0.0",)},
    "key written": {"start": ("k = k.clone()",), "scores": ("k.mul_(2.0)",)},
    "query written": {"start": ("q = q.clone()",), "scores": ("q.zero_()",)},
    "value written": {"start": ("v = v.clone()",), "weights": ("v.mul_(2.0)",)},
    "source of the value written": {"start": ("base = v.clone()", "v = base[:]"), "weights": ("base.mul_(2.0)",)},
    "value written at the end": {"start": ("v = v.clone()",), "end": ("v.zero_()",)},
    "query written before": {"start": ("base = q.clone()", "q = base[:]", "base.mul_(0.5)")},
    "repeated source written": {"start": ("k = k.clone()", "base = k"), "repeated": ("base.mul_(0.1)",)},
    "repeated value written": {"start": ("v = v.clone()", "base = v"), "repeated": ("base[..., 0].fill_(3.0)",)},
    "soft-cap": {"scores": ("s = 2.0 * torch.tanh(s / 2.0)",)},
    "relu": {"scores": ("s = s.relu()",)},
    "dropout": {"weights": ("p = F.dropout(p, 0.3, True)",)},
    "scores without gradients": {"scores": ("with torch.no_grad():", "    s = {qk}")},
    "negative after the mask": {"masked": ("s = s * -0.5",)},
    "small after the mask": {"masked": ("s = s * 1e-9",)},
    "half after the mask": {"masked": ("s = s * 0.5",)},
    "added after the mask": {"masked": ("s = s + 3.0",)},
    "clamped after the mask": {"masked": ("s = s.clamp(min=-3.0)",)},
    "nan_to_num after the mask": {"masked": ("s = torch.nan_to_num(s, neginf=-2.0).clamp(min=-4.0)",)},
    "weights detached": {"weights": ("p = p.detach()",)},
    "scores detached": {"masked": ("s = s.detach()",)},
    "key detached": {"start": ("k = k.detach()",)},
    "repeated value detached": {"repeated": ("v = v.detach()",)},
    "weights cut": {"weights": ("p = p * (p > 0.1)",)},
    "weights filled": {"weights": ("p = p.masked_fill(p < 0.2, 0.0)",)},
    "weights shrunk": {"weights": ("p = p * 0.5",)},
    "weights moved": {"weights": ("p = p + 0.1",)},
    "weights renormalised": {"weights": ("p = p / (p.sum(-1, keepdim=True) + 0.5)",)},
    "weights sliced": {"weights": ("p, v = p[..., :-1], v[..., :-1, :]",)},
    "weights of other keys": {"weights": ("p, v = p[..., 1:], v[..., :-1, :]",)},
    "weights transposed": {"weights": ("p = p.mT",)},
    "weights flipped": {"weights": ("p = p.flip(-1)",)},
    "weights of other heads": {"weights": ("p = p.roll(1, 1)",)},
    "weights averaged": {"weights": ("p = p.mean(1, keepdim=True)",)},
    "weights reshaped": {"weights": ("p = p.reshape(*p.shape[:-2], Lk, Lq).mT",)},
    "weights without cast": {"weights": ("p = p.contiguous().clone()",)},
    "scores flipped": {"scores": ("s = s.flip(-1)",)},
    "scores squared": {"scores": ("s = s**2",)},
    "scores transposed": {"scores": ("s = s.mT",)},
    "scores of other heads": {"scores": ("s = s.roll(1, 1)",)},
    "scores summed": {"scores": ("s = s + s.flip(-2)",)},
    "scores hidden by data": {"scores": ("s = s.masked_fill(s < -1.0, -math.inf)",)},
    "keys rolled": {"start": ("k = k.roll(1, 2)",)},
    "output written": {"end": ("o.mul_(2.0)",)},
    "output read twice": {"end": ("t = o[..., :1]", "o = o + t")},
    "padding written": {"masks": ("real.logical_not_()",)},
    "given written": {"masks": ("given.logical_not_()",)},
    "one key for the batch": {"start": ("k = k[:1]", "k = k.expand(B, -1, -1, -1)")},
    "one key head": {"repeated": ("k = k[:, :1]",)},
    "one value head": {"repeated": ("v = v[:, :1]",)},
    "one query head": {"repeated": ("q = q[:, :1]",)},
    "one key sequence": {"start": ("k = k[:1]",)},
    "value is key": {"start": ("v = k",)},
    "graph break at the start": {"start": ("torch._dynamo.graph_break()",)},
    "graph break before the scale": {"scores": ("torch._dynamo.graph_break()",)},
    "graph break before the softmax": {"masked": ("torch._dynamo.graph_break()",)},
    "graph break before the values": {"weights": ("torch._dynamo.graph_break()",)},
    "graph break at the end": {"end": ("torch._dynamo.graph_break()",)},
    "keys and features exchanged": {"repeated": ("k = k.permute(0, 1, 3, 2)",)},
    "keys and heads exchanged": {"repeated": ("k = k.permute(0, 2, 1, 3)",)},
    "keys and batch exchanged": {"repeated": ("k = k.permute(2, 1, 0, 3)",)},
}
# what one query gets depends on all of them
MIXES = (
    "scale of the data",
    "softmax over queries",
    "minus another max",
    "scores summed",
    "scores transposed",
    "weights transposed",
)
NO_GRADIENTS = frozenset(
    ("key written", "query written", "weights written", "value written at the end", "repeated value written")
)
# shapes with a dimension of heads, and keys as the last but one dimension of the value
ONLY_4D = frozenset(
    ("scale per head", "fewer keys", "weights sliced", "weights of other keys", "weights averaged", "one key head")
    + ("one value head", "one query head", "one key sequence", "weights of other heads", "scores of other heads")
)
SQUARE = frozenset(("weights transposed", "scores transposed"))
# sizes that have to be equal for it
EQUAL = {
    "keys and features exchanged": ("Lk", "D"),
    "keys and heads exchanged": ("H", "Lk"),
    "keys and batch exchanged": ("B", "Lk"),
}

# what has a softmax and is no attention over the keys, or hides it well
FOREIGN = {
    "gate": "o = torch.softmax(q, -1) * q",
    "pooling": "o = (k.mean(-1, keepdim=True).softmax(2).mT @ v).expand(B, H, Lq, Dv)",
    "linear attention": "o = q.softmax(-1) @ (k.softmax(-2).mT @ v)",
    "router": "o = (q @ k[0, 0].mT).softmax(-1) @ v[0, 0]",
    "position only": "o = bias.expand(B, H, Lq, Lk).softmax(-1) @ v",
    "outer": "o = (q.sum(-1)[..., None] * k.sum(-1)[..., None, :]).softmax(-1) @ v",
    "distance": "o = (-(q[..., :, None, :] - k[..., None, :, :]).square().sum(-1)).softmax(-1) @ v",
    "cosine": "o = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT).softmax(-1) @ v",
    "additive": "o = torch.tanh(q[..., :, None, :] + k[..., None, :, :]).sum(-1).softmax(-1) @ v",
    "values as weights": "o = (q @ k.mT) @ v.softmax(-2)",
    "softmax of values": "o = (q @ k.mT).softmax(-1) @ v.softmax(-1)",
    "scores as values": "o = (q @ k.mT).softmax(-1) @ (k @ k.mT)[..., :Dv]",
    "attention of the mean": "o = (q.mean(2, keepdim=True) @ k.mT).softmax(-1) @ v + torch.zeros(B, H, Lq, Dv)",
    "weights as scores": "o = ((q @ k.mT).softmax(-1) @ k @ k.mT).softmax(-1) @ v",
    "matmul by a vector": "o = ((q @ k.mT).softmax(-1) @ v[..., 0].unsqueeze(-1)).expand(B, H, Lq, Dv)",
    "three products": "o = (q @ k.mT @ k @ k.mT * 0.01).softmax(-1) @ v",
    "heads mixed": "o = torch.einsum('bhqd,bgkd->bhqk', q, k).softmax(-1) @ v",
    "value heads mixed": "o = torch.einsum('bhqk,bgkd->bhqd', (q @ k.mT).softmax(-1), v)",
    "weights summed": "o = torch.einsum('bhqk,bhkd->bhd', (q @ k.mT).softmax(-1), v)[:, :, None].expand(B, H, Lq, Dv)",
    "scores diagonal": "o = torch.einsum('bhqd,bhkd->bhqk', q, k).softmax(-1) @ v.flip(2)",
    "batch mixed": "o = torch.einsum('bhqd,chkd->bhqk', q, k).softmax(-1) @ v",
}

BIRTHS = {
    "bhld": "",
    "bhdl": "{x} = {x}.mT",
    "lbhd": "{x} = {x}.permute(1, 2, 0, 3)",
    "hldb": "{x} = {x}.permute(3, 0, 1, 2)",
    "blhd": "{x} = {x}.transpose(1, 2)",
    "blhd permute": "{x} = {x}.permute(0, 2, 1, 3)",
    "merged": "{x} = {x}.view({x}.shape[0], {x}.shape[1], -1, {D}).transpose(1, 2)",
    "unflatten": "{x} = {x}.unflatten(-1, (-1, {D})).transpose(1, 2)",
}
ENDS = {
    "as it is": ("o",),
    "transposed": ("o.transpose(1, 2)",),
    "transpose reshape": ("o.transpose(1, 2).reshape(o.shape[0], o.shape[2], -1)",),
    "permute flatten": ("o.permute(0, 2, 1, 3).flatten(2)",),
    "contiguous view": ("o.transpose(1, 2).contiguous().view(o.shape[0], o.shape[2], -1)",),
}


# ---- programs ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Term:
    """A mask: a key of ``MASKS``, the offset in it, and how it hides scores (keys of ``APPLIED`` and ``FILLS``)."""

    mask: str
    offset: str = "0"
    applied: str = "masked_fill"
    fill: str = "-math.inf"


@dataclass(frozen=True)
class Block:
    """One attention: ``form`` is ``"softmax"``, ``"sdpa"`` or ``"foreign"``; the rest are keys of the tables above."""

    form: str = "softmax"
    foreign: str = "gate"
    layout: str = "4d"
    repeats: tuple[str, str] = ("repeat_interleave", "repeat_interleave")
    product: str = "@"
    value_product: str = "@"
    transposed: str = "mT"
    scale: str = "none"
    constant: str = "D**-0.5"
    mask_first: bool = False
    bias: str = "none"
    masks: tuple[Term, ...] = ()
    joined: bool = False
    viewed: bool = False
    softmax: str = "F.softmax"
    dropout: str = "none"
    twist: str = "none"
    sdpa: tuple[str, ...] = ()


@dataclass(frozen=True)
class Program:
    """Sizes, inputs and blocks, each of which takes the output of the one before for its query.

    padding: how many keys of every sequence are padding, and whether they come first ("left") or last ("right").
    dynamic: None, "lengths" (marked) or "all" (``dynamic=True``), with a second run at another length.
    kept: the sequence of the batch that a second run has among other ones; None for no such run.
    frozen: names of the inputs without gradients.
    """

    B: int = 2
    H: int = 2
    Hk: int = 2
    Lq: int = 5
    Lk: int = 5
    D: int = 4
    Dv: int = 4
    births: tuple[str, str, str] = ("bhld", "bhld", "bhld")
    end: str = "as it is"
    blocks: tuple[Block, ...] = (Block(),)
    padding: tuple[int, ...] = (0, 1)
    side: str = "right"
    given: str = "1111"
    dynamic: str | None = None
    gradients: bool = True
    frozen: tuple[str, ...] = ()
    seed: int = 0
    kept: int | None = None


def _family(layout: str) -> str:
    return layout.split()[0]


def _shaped(name: str, rank: int, block: Block) -> str:
    """The mask or bias ``name`` as it broadcasts to the scores of a layout; 2-D ones need nothing."""
    family = _family(block.layout)
    if family in ("4d", "blhd") or (family == "3d" and block.viewed):
        return name
    if rank == 2 and family not in ("stacked", "beside"):
        return name
    return f"{name}[:, 0]" if family == "single" else f"{name}.expand(B, H, Lq, Lk).{MOVED[family]}"


def _bias(block: Block) -> str:
    return "bias[..., :1]" if block.bias == "of queries" else "bias"


def _rank(mask: str) -> int:
    kind, name = mask.split(": ")
    four = ("4d", "view", "expanded", "strict from the second head", "looser by batch", "or padding", "or given")
    return 4 if kind in ("padding", "given", "packed") or name in (*four, "random") else 2


def _mask_lines(block: Block) -> list[str]:
    """Lines that compute ``m0``, ``m1``, ... of ``[Lq, Lk]`` or four dimensions, and what the twist adds."""
    lines: list[str] = []
    for i, term in enumerate(block.masks):
        lines += [line.replace("{off}", term.offset) for line in MASKS[term.mask]] + [f"m{i} = m"]
    return lines + list(TWISTS[block.twist].get("masks", ()))


def _joined(block: Block) -> str:
    return "(" + " & ".join(f"m{i}" for i in range(len(block.masks))) + ")"


def _hiding(block: Block) -> list[str]:
    """Lines that apply the masks to the scores ``s``."""
    if block.joined and block.masks:
        rank = max(_rank(term.mask) for term in block.masks)
        shaped = [(_shaped(_joined(block), rank, block), block.masks[0])]
    else:
        shaped = [(_shaped(f"m{i}", _rank(term.mask), block), term) for i, term in enumerate(block.masks)]
    return [APPLIED[term.applied].format(m=m, fill=term.fill) for m, term in shaped]


def _by_hand(block: Block) -> tuple[list[str], str]:
    twist, family = TWISTS[block.twist], _family(block.layout)
    scale = SCALES[block.scale]
    qk = PRODUCTS[family][block.product].format(a="q", b=TRANSPOSED[block.transposed])
    pv = VALUE_PRODUCTS[family][block.value_product].format(a="p", b="v")

    def at(place: str) -> list[str]:
        return [line.replace("{qk}", qk).replace("{pv}", pv) for line in twist.get(place, ())]

    scaling = [scale["scores"].format(c=block.constant)] if "scores" in scale else []
    bias = {"of keys": "bias[0, 0, 0]", "a number": "bias[0, 0, 0, 0]"}.get(block.bias, _shaped(_bias(block), 4, block))
    biased = [f"s = s + {bias}"] if block.bias != "none" else []
    views = [], []
    if block.viewed and family == "3d":
        views = ["s = s.view(B, H, Lq, Lk)"], ["s = s.view(B * H, Lq, Lk)"]
    steps = [*views[0], *biased, *_hiding(block), *views[1]], scaling
    if block.bias == "after":
        steps = [*views[0], *_hiding(block), *biased, *views[1]], scaling
    ordered = [*steps[0], *steps[1]] if block.mask_first else [*steps[1], *steps[0]]
    lines = [scale["inputs"].format(c=block.constant)] if "inputs" in scale else []
    lines += [f"s = {qk}", *at("scores"), *ordered, *at("masked")]
    lines += at("softmax") or [SOFTMAXES[block.softmax]]
    lines += [*DROPOUTS[block.dropout], *at("weights"), f"o = {pv}"]
    return lines, "".join(f", {line}" for line in at("returned"))


def _sdpa(block: Block) -> list[str]:
    arguments, lines, family = list(block.sdpa), [], _family(block.layout)
    scale = SCALES[block.scale]
    if "inputs" in scale:
        lines.append(scale["inputs"].format(c=block.constant))
    if block.masks and "is_causal=True" not in arguments:
        rank, mask = max(_rank(term.mask) for term in block.masks), _joined(block)
        if block.bias != "none" or block.masks[0].applied not in ("masked_fill", "masked_fill_"):
            mask = f"torch.where({mask}, {_bias(block) if block.bias != 'none' else '0.0'}, {block.masks[0].fill})"
            rank = 4 if block.bias != "none" else rank
        arguments.append(f"attn_mask={_shaped(mask, rank, block)}")
    elif block.bias != "none" and "is_causal=True" not in arguments:
        arguments.append(f"attn_mask={_shaped(_bias(block), 4, block)}")
    if block.repeats[0] == "gqa":
        arguments.append("enable_gqa=True")
    if family == "blhd":
        lines.append("q, k, v = (x.transpose(1, 2) for x in (q, k, v))")
    lines.append(f"o = F.scaled_dot_product_attention({', '.join(['q, k, v', *arguments])})")
    return lines + (["o = o.transpose(1, 2)"] if family == "blhd" else [])


_ARGUMENTS = "q, k, v, real, bias, given, gain"


def _block_lines(block: Block, name: str) -> list[str]:
    twist = TWISTS[block.twist]
    lines = ["(B, H, Lq, D), (Hk, Lk, Dv) = q.shape, (k.shape[1], k.shape[2], v.shape[3])", *twist.get("start", ())]
    if block.repeats[0] not in ("gqa", "broadcast") and _family(block.layout) not in SHARED:
        lines += [REPEATS[how].format(x=x) for how, x in zip(block.repeats, "kv", strict=True)]
    lines += twist.get("repeated", ())
    returned = ""
    if block.form == "foreign":
        lines.append(FOREIGN[block.foreign])
    else:
        before, after = LAYOUTS[block.layout]
        inside, returned = (_sdpa(block), "") if block.form == "sdpa" else _by_hand(block)
        lines += [*_mask_lines(block), *before, *inside, *after]
    lines += [*twist.get("end", ()), f"return o{returned}" if returned else "return (o,)"]
    return [f"def {name}({_ARGUMENTS}):", *(f"    {line}" for line in lines)]


def _seen(block: Block) -> str:
    """The mask of what is seen; a term that is applied the wrong way hides what it means to show."""
    if block.form == "sdpa":
        return _joined(block)
    if block.joined:
        return f"({'~' * (block.masks[0].applied == 'wrong way')}{_joined(block)})"
    terms = ("~" * (term.applied == "wrong way") + f"m{i}" for i, term in enumerate(block.masks))
    return f"({' & '.join(terms)})"


def _visible_lines(block: Block, name: str) -> list[str]:
    """A function that tells which keys are seen, for the comparison."""
    lines = ["(B, H, Lq, D), Hk, Lk = q.shape, k.shape[1], k.shape[2]"]
    lines += _mask_lines(block) if block.form != "foreign" else []
    seen = _seen(block) if block.masks and block.form != "foreign" else "torch.ones(B, H, Lq, Lk, dtype=torch.bool)"
    lines.append(f"return {seen}.expand(B, H, Lq, Lk)")
    return [f"def visible_{name}({_ARGUMENTS}):", *(f"    {line}" for line in lines)]


def source(program: Program) -> str:
    """The program in Python: ``program(q, k, v, real, bias, given, gain)`` returns a tuple, ``born`` undoes births."""
    code = ["import math", "import torch", "import torch.nn.functional as F", "from types import SimpleNamespace"]
    code += ["", "number = SimpleNamespace(c=0.3)", ""]
    names = [f"attend{i}" for i in range(len(program.blocks))]
    for block, name in zip(program.blocks, names, strict=True):
        code += [*_block_lines(block, name), ""]
    births = zip("qkv", program.births, (program.D, program.D, program.Dv), strict=True)
    born = [BIRTHS[birth].format(x=x, D=size) for x, birth, size in births if BIRTHS[birth]]
    code += ["def born(q, k, v):", *(f"    {line}" for line in born), "    return q, k, v", ""]
    code += [f"def program({_ARGUMENTS}):", *(f"    {line}" for line in born), "    more = ()"]
    for i, name in enumerate(names):
        code += [
            f"    o, *rest = {name}({_ARGUMENTS if i == 0 else _ARGUMENTS.replace('q', 'o', 1)})",
            "    more += (*rest,)",
        ]
    code += [f"    return {ENDS[program.end][0]}, *more", ""]
    return "\n".join(code)


def _lines_for_comparison(program: Program) -> str:
    names = [f"attend{i}" for i in range(len(program.blocks))]
    lines = [_visible_lines(block, name) for block, name in zip(program.blocks, names, strict=True)]
    return "\n".join(line for part in lines for line in part)


@dataclass(frozen=True)
class Situation:
    """Inputs of a program: with ``longer`` more queries and keys than it says, and with other sequences beside the one
    that is ``kept``, unless that is None."""

    longer: int = 0
    kept: int | None = None


AS_DRAWN = Situation()


def inputs(program: Program, at: Situation = AS_DRAWN) -> dict[str, torch.Tensor]:
    """The seven inputs; the same ones at every call."""
    tensors = _drawn(program, at.longer)
    if at.kept is not None:
        others = _drawn(replace(program, seed=program.seed + 100), at.longer)
        dims = {x: max(0, birth.split()[0].find("b")) for x, birth in zip("qkv", program.births, strict=True)}
        dims |= {x: 0 for x in ("real", "bias", "given") if tensors[x].shape[0] == program.B}
        for name, dim in dims.items():
            others[name].select(dim, at.kept).copy_(tensors[name].select(dim, at.kept))
            tensors[name] = others[name]
    if program.gradients:
        for name in ("q", "k", "v", "bias", "gain"):
            tensors[name].requires_grad_(name not in program.frozen)
    return tensors


def _drawn(program: Program, longer: int) -> dict[str, torch.Tensor]:
    B, H, Hk, D, Dv = program.B, program.H, program.Hk, program.D, program.Dv
    Lq, Lk = program.Lq + longer, program.Lk + longer
    generator = torch.Generator().manual_seed(program.seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    shapes = {"q": (B, H, Lq, D), "k": (B, Hk, Lk, D), "v": (B, Hk, Lk, Dv)}
    tensors = {}
    for (name, (b, h, n, d)), birth in zip(shapes.items(), program.births, strict=True):
        sizes = dict(zip("bhld", (b, h, n, d), strict=True))
        order = birth.split()[0]
        shape = [sizes[x] for x in order] if set(order) == set("bhld") else [b, n, h * d]
        tensors[name] = normal(*shape)
    place = torch.arange(Lk)
    counts = torch.tensor([program.padding[i % len(program.padding)] for i in range(B)])[:, None].clamp(max=Lk - 1)
    tensors["real"] = place >= counts if program.side == "left" else place < Lk - counts
    b, h, rows, keys = (size if bit == "1" else 1 for size, bit in zip((B, H, Lq, Lk), program.given, strict=True))
    tensors["bias"] = normal(b, h, rows, keys)
    given = torch.rand(b, h, rows, keys, generator=generator) < 0.6
    given[..., 0] = True
    tensors["given"] = given
    tensors["gain"] = normal(H).abs() + 0.2
    return tensors


# ---- strategy ------------------------------------------------------------------------------------------------------

HARD = ("times", "fill 0", "fill -2", "add -1", "wrong way", "bonus")
PLAIN = tuple(name for name in APPLIED if name not in HARD)


def _one_in(draw: st.DrawFn, n: int) -> bool:
    return draw(st.integers(0, n - 1)) == n - 1


def _pick(draw: st.DrawFn, options: Any) -> Any:
    return draw(st.sampled_from(list(options)))


@st.composite
def terms(draw: st.DrawFn, offsets: tuple[str, ...], odd: bool) -> tuple[Term, ...]:
    """No mask, a causal one, or others, with one that is almost causal where ``odd``."""
    kinds = _pick(
        draw,
        [
            (),
            (),
            (),
            *[("causal",)] * 5,
            ("padding",),
            ("causal", "padding"),
            ("causal", "padding"),
            ("causal", "window"),
        ]
        + [("causal", "causal"), ("window",), ("given",), ("causal", "given"), ("causal", "window", "padding")],
    )
    if odd:
        kinds = _pick(draw, [("almost",), ("almost",), ("almost", "causal"), ("almost", "padding")])
    if len(offsets) > 1 and _one_in(draw, 16):
        kinds = _pick(draw, [("packed",), ("packed", "causal"), ("packed", "padding"), ("packed", "window")])
    tables = {"causal": CAUSAL, "almost": ALMOST, "window": WINDOWS, "padding": PADDINGS, "given": GIVEN}
    tables["packed"] = PACKED
    offset, fill = _pick(draw, offsets), _pick(draw, FILLS)
    hard = odd and _one_in(draw, 4)
    made = []
    for kind in kinds:
        applied = _pick(draw, HARD if hard else PLAIN)
        # one who hides scores twice does it with the same number
        made.append(Term(f"{kind}: {_pick(draw, tables[kind])}", offset, applied, fill))
    return tuple(made)


@st.composite
def blocks(draw: st.DrawFn, sizes: dict[str, int], dynamic: bool) -> Block:
    """One attention over ``sizes``."""
    H, Hk, Lq, Lk = (sizes[name] for name in ("H", "Hk", "Lq", "Lk"))
    form = _pick(draw, ["softmax"] * 6 + ["sdpa"] * 5 + ["foreign"])
    if form == "foreign":
        return Block(form=form, foreign=_pick(draw, FOREIGN))
    odd = _one_in(draw, 4)
    twisted = not odd and _one_in(draw, 3)
    offsets = ("0", "Lk - Lq") if Lk >= Lq else ("0",)
    masks = draw(terms(offsets, odd))
    families = ["4d", "4d", "4d", "3d", "3d view", "3d flatten", "blhd"]
    families += ["single"] * 2 if H == 1 else []
    families = ["4d"] * 6 + ["blhd", "3d flatten"] if form == "sdpa" else families
    families += [*SHARED, "grouped"] if H != Hk and form == "softmax" else []
    families += ["groups", "stacked"] if H != Hk and form == "sdpa" else []
    layout = _pick(draw, families)
    family = _family(layout)
    same = _pick(draw, [name for name in REPEATS if name != "tile"] + ["tile"])
    repeats = (same, _pick(draw, REPEATS) if _one_in(draw, 6) else same)
    if H != Hk and family == "4d" and (Hk == 1 or form == "sdpa") and _one_in(draw, 3):
        repeats = ("broadcast",) * 2 if Hk == 1 else ("gqa",) * 2
    if H == Hk:
        repeats = ("broadcast",) * 2
    base = Block(
        form=form,
        layout=layout,
        repeats=repeats,
        masks=masks,
        bias=_pick(draw, ["none"] * 15 + ["before", "after", "of keys", "a number", "of queries"]),
        constant=_pick(draw, CONSTANTS),
    )
    if form == "sdpa":
        simple = [name for name, places in TWISTS.items() if set(places) <= {"start", "masks", "repeated", "end"}]
        block = replace(
            base, scale=_pick(draw, ["none"] * 6 + [name for name in SCALES if "scores" not in SCALES[name]])
        )
        options = [()] * 3 + [
            (f"scale={block.constant}",),
            ("dropout_p=0.0",),
            ("scale=0.5", "dropout_p=0.0"),
            ("scale=-0.5",),
        ]
        if block.bias in ("of keys", "a number"):
            block = replace(block, bias="before")  # SDPA takes no mask of less than two dimensions
        arguments = _pick(draw, options)
        plain = len(masks) == 1 and masks[0].mask.startswith("causal") and masks[0].offset == "0"
        if plain and layout != "stacked" and _one_in(draw, 2):
            block, arguments = replace(block, bias="none"), (*arguments, "is_causal=True")
        block = replace(block, sdpa=arguments)
    else:
        simple = list(TWISTS)
        block = replace(
            base,
            product=_pick(draw, PRODUCTS[family]),
            value_product=_pick(draw, VALUE_PRODUCTS[family]),
            transposed=_pick(draw, TRANSPOSED),
            scale=_pick(draw, SCALES),
            mask_first=_one_in(draw, 6),
            joined=_one_in(draw, 3),
            viewed=draw(st.booleans()) and family == "3d",
            softmax=_pick(draw, SOFTMAXES),
            dropout=_pick(draw, ["none"] * 3 + list(DROPOUTS)),
        )
    if twisted:
        allowed = [
            name
            for name in simple
            if (family == "4d" or name not in ONLY_4D) and (Lq == Lk or name not in SQUARE)
            if min(Lq, Lk) > 1 or name not in ("fewer keys", "weights sliced", "weights of other keys")
            if len({sizes[size] for size in EQUAL.get(name, ())}) < 2 and (name not in EQUAL or not dynamic)
        ]
        block = replace(block, twist=_pick(draw, allowed))
    if block.twist == "scores hidden by data":
        # with a finite fill a row whose visible keys are hidden by data, too, sees none; which ones the data says
        infinite = (replace(t, fill="-math.inf") for t in block.masks if t.applied not in ("one minus", "not float"))
        block = replace(block, masks=tuple(infinite))
    return block


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """A program of one or two attentions."""
    H = _pick(draw, [2, 4, 1, 3])
    Hk = _pick(draw, [h for h in (H, H, H // 2, 1) if h and H % h == 0])
    Lk = draw(st.integers(2, 9))
    Lq = Lk if not _one_in(draw, 4) else _pick(draw, [1, 3, 6, 16, 17])
    if Lq >= 16:
        Lk = _pick(draw, [16, 19, 20])
    D = _pick(draw, [4, 8, 5])
    dynamic = _pick(draw, [None] * 15 + ["lengths", "all"])
    two = _one_in(draw, 4)
    Dv = D if two or not _one_in(draw, 3) else _pick(draw, [3, 8])
    B = draw(st.integers(1, 4))
    sizes = {"H": H, "Hk": Hk, "Lq": Lq, "Lk": Lk}
    made = tuple(draw(blocks({**sizes, "B": B, "D": D}, dynamic is not None)) for _ in range(1 + two))
    twists = {block.twist for block in made}
    return Program(
        B=B,
        **sizes,
        D=D,
        Dv=D if "value is key" in twists else Dv,
        births=tuple(_pick(draw, BIRTHS) for _ in range(3)),
        end=_pick(draw, ENDS),
        blocks=made,
        padding=tuple(draw(st.lists(st.sampled_from([0, 1, 2, 3, 0, 1, 9, 99]), min_size=1, max_size=4))),
        side=_pick(draw, ["right", "right", "left"]),
        given=_pick(draw, ["1111", "1011", "0011", "0111"]),
        dynamic=dynamic,
        gradients=not twists & NO_GRADIENTS and not _one_in(draw, 6),
        frozen=_pick(draw, [()] * 4 + [("q",), ("k", "v"), ("v",), ("q", "k"), ("bias", "gain")]),
        seed=draw(st.integers(0, 3)),
        kept=_pick(draw, [None, None, *range(B)]) if B > 1 else None,
    )


# ---- running and comparing -----------------------------------------------------------------------------------------


def names_by_dynamo(gm: torch.fx.GraphModule) -> set[str]:
    """The names of nodes that no user has written: ``view_3``, ``l_mask_``."""
    return {node.name for node in gm.graph.nodes if re.search(r"_\d+$|^l_", node.name)}


@dataclass
class Captured:
    """A Dynamo backend that keeps a rewritten copy of the graph for every policy and runs the one ``chosen``."""

    find: Callable[..., Any] = find_sites
    chosen: str = "exact"
    planned: dict[str, list[Any]] = field(default_factory=dict)
    changed: dict[str, bool] = field(default_factory=dict)

    def __call__(self, gm: torch.fx.GraphModule, given: list[Any]) -> Callable[..., Any]:
        variants = {}
        for name, policy in {**POLICIES, **THINNED}.items():
            variants[name] = copied = copy.deepcopy(gm)
            planned = plan_sites(self.find(copied, Buffers(copied, given)), policy)
            count = rewrite(copied, planned, policy, written_out=name == WRITTEN_OUT)
            self.planned.setdefault(name, []).extend(planned)
            self.changed[name] = self.changed.get(name, False) or copied.code != gm.code
            verdicts = [plan.verdict for _, plan in planned]
            assert count == verdicts.count("rewritten"), verdicts
            same = copied.code == gm.code or any("exact_step" in str(node.target) for node in copied.graph.nodes)
            assert count or same or name == WRITTEN_OUT, "a graph without a rewritten site was changed"
            for site, plan in planned:
                assert plan.verdict in ("rewritten", "exact", "refused") and plan.reason.strip(), plan
                said = f"{plan.reason} {site.spec and site.spec.mask}"
                assert not {*re.findall(r"\w+", said)} & names_by_dynamo(gm), said
        return lambda *args: variants[self.chosen](*args)


def _compile(program: Program) -> dict[str, Any]:
    text = source(program)
    name = f"<program {abs(hash(program))}>"
    linecache.cache[name] = (len(text), None, text.splitlines(True), name)
    namespace: dict[str, Any] = {}
    exec(compile(text, name, "exec"), namespace)
    exec(_lines_for_comparison(program), namespace)
    return namespace


def _rows(program: Program, functions: dict[str, Any], at: Situation = AS_DRAWN, express: bool = False) -> torch.Tensor:
    """bool ``[B, Lq]``: the queries to compare, which see a key (with Express: and are no padding)."""
    tensors = inputs(program, at)
    q, k, v = functions["born"](*(tensors[name] for name in "qkv"))
    rows = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool)
    fresh = inputs(program, at)  # masks that a block writes are what the next one gets
    for i, block in enumerate(program.blocks):
        if i and (block.twist in MIXES or block.form == "foreign"):
            rows &= rows.all(1, keepdim=True)
        seen = functions[f"visible_attend{i}"](q, k, v, *(fresh[name] for name in ("real", "bias", "given", "gain")))
        rows &= seen.any(-1).all(1)
        if express and any(term.mask.startswith("padding") for term in block.masks) and q.shape[2] <= k.shape[2]:
            rows &= seen.any(2).all(1)[:, k.shape[2] - q.shape[2] :]
    return rows


def _run(
    function: Callable[..., Any],
    program: Program,
    rows: torch.Tensor,
    at: Situation = AS_DRAWN,
    double: bool = False,
    backward: bool = True,
) -> list[torch.Tensor | None]:
    """The outputs at ``rows`` and, if asked for, the gradients of a fixed weighted sum of them; in float64 if asked."""
    tensors = inputs(program, at)
    if double:
        tensors = {
            name: x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
            for name, x in tensors.items()
        }
    torch.manual_seed(program.seed)
    with torch.set_grad_enabled(program.gradients):
        outputs = function(**tensors)
    kept = []
    for i, out in enumerate(outputs):
        heads = i > 0 or program.end == "as it is"
        shape = [rows.shape[0], *([1] if heads else []), rows.shape[1], *([1] * (out.dim() - 2 - heads))]
        kept.append(torch.where(rows.view(shape), out, 0.0))
    results: list[torch.Tensor | None] = [out.detach() for out in kept]
    if backward and any(out.requires_grad for out in kept):
        generator = torch.Generator().manual_seed(1)
        sum((out * torch.randn(out.shape, generator=generator)).sum() for out in kept).backward()
        results += [tensors[name].grad for name in ("q", "k", "v", "bias", "gain")]
    return results


def _as_good(truth: list[Any], expected: list[Any], got: list[Any]) -> bool:
    """Whether every result is as near to ``truth`` in float64 as asked for, or half as near as the program's own is.

    As near as asked for relative to the largest of all: small gradients are sums whose large terms cancel.
    """
    largest = max((x.abs().max().item() for x in expected if x is not None and x.numel()), default=0.0)
    for t, x, y in zip(truth, expected, got, strict=True):
        if (t is None) != (x is None) or (x is None) != (y is None):
            return False
        if x is None or not x.numel():
            continue
        if x.shape != y.shape or x.dtype != y.dtype or t.shape != y.shape:
            return False
        if not (y - t).abs().max().item() <= max(TOLERANCE * largest, 2 * (x - t).abs().max().item()):
            return False
    return True


def _difference(expected: list[torch.Tensor | None], got: list[torch.Tensor | None]) -> str | None:
    """The first difference in words; gradients count relative to a tenth of the largest one at least."""
    if len(expected) != len(got):
        return f"{len(got)} results instead of {len(expected)}: gradients were lost or gained"
    largest = max((x.abs().max().item() for x in expected if x is not None and x.numel()), default=0.0)
    for i, (x, y) in enumerate(zip(expected, got, strict=True)):
        if (x is None) != (y is None):
            return f"result {i}: {'no ' if y is None else 'a '}gradient"
        if x is None:
            continue
        if x.shape != y.shape or x.dtype != y.dtype:
            return f"result {i}: {tuple(y.shape)} {y.dtype} instead of {tuple(x.shape)} {x.dtype}"
        error = ((x - y).abs().max() / max(x.abs().max().item(), 0.1 * largest, 1e-6)).item()
        if not error <= TOLERANCE:
            return f"result {i}: relative error {error:.1e}"
    return None


def _features(block: Block) -> Iterator[str]:
    """What is counted of a block."""
    yield f"form={block.form}"
    if block.form == "foreign":
        yield f"foreign={block.foreign}"
        return
    names = ["layout", "scale", "bias", "twist"]
    if block.form == "softmax":
        names += ["product", "value_product", "transposed", "mask_first", "joined", "viewed", "softmax", "dropout"]
    yield from (f"{block.form} {name}={getattr(block, name)}" for name in names)
    yield f"{block.form} repeats={'/'.join(dict.fromkeys(block.repeats))}"
    for term in block.masks:
        yield from (f"{block.form} {name}={getattr(term, name)}" for name in ("mask", "offset", "applied", "fill"))
    if not block.masks:
        yield f"{block.form} mask=none"


def _is_listed(block: Block) -> bool:
    """Whether a site must be found, be it only to be refused; the weights' ``.mT`` is not looked through."""
    return block.form != "foreign" and block.twist == "none" and block.value_product != "reversed"


def _averages(planned: list[Any]) -> bool:
    """Whether rows without a visible key are to be as they are in the program, too."""
    return bool(planned) and all(site.averages and site.exact is not None for site, _ in planned)


def check(program: Program, find: Callable[..., Any] = find_sites) -> dict[str, list[str]]:
    """Run ``program`` as it is and rewritten by every policy; returns the verdicts. Raises ``AssertionError``.

    ``{}`` stands for a program whose own result is not finite, or that PyTorch cannot run.
    """
    functions = _compile(program)
    unfit = _unfit(program, functions)
    if unfit:
        VERDICTS["-", unfit, "skipped"] += 1
        return {}
    captured = Captured(find)
    run = _captured(program, functions, captured)
    words = f"\n{program}\n\n{source(program)}"
    if find is find_sites and all(_is_listed(block) for block in program.blocks):
        sites = captured.planned["exact"]
        assert len(sites) == len(program.blocks), f"{len(sites)} sites were found{words}"
    verdicts = {}
    for name in POLICIES:
        captured.chosen = name
        planned = captured.planned[name]
        verdicts[name] = [plan.verdict for _, plan in planned]
        whole = name == "exact" and len(program.blocks) == 1 and _averages(planned)
        rows = partial(_rows, program, functions, express="express" in {plan.method for _, plan in planned})
        rows = partial(lambda rows, at: torch.ones_like(rows(at)), rows) if whole else rows
        for at in _situations(program, captured.changed[name]):
            difference = _differs(program, functions["program"], run, rows, at)
            reasons = [f"{site.form}: {plan.verdict}, {plan.method}: {plan.reason}" for site, plan in planned]
            assert difference is None, f"policy {name!r}, {difference}; {reasons}, {at}{words}"
    if program.kept is not None and captured.changed["thinned"]:
        captured.chosen = "thinned"
        difference = _neighbours(program, functions["program"], run, _rows(program, functions, express=True))
        assert difference is None, f"depends on other sequences, {difference}{words}"
    _count(program, verdicts)
    return verdicts


def _unfit(program: Program, functions: dict[str, Any]) -> str:
    """Why a program cannot be compared with anything; ``""`` where it can."""
    try:
        plain = _run(functions["program"], program, _rows(program, functions))
    except RuntimeError as error:
        return f"no program: {str(error)[:60]}"
    return "" if _is_finite(plain) else "not finite"


def _is_finite(results: list[torch.Tensor | None]) -> bool:
    return all(x is None or bool(x.isfinite().all()) for x in results)


def _captured(program: Program, functions: dict[str, Any], captured: Captured) -> Callable[..., Any]:
    """The program as ``captured`` runs it."""
    function, rows = functions["program"], _rows(program, functions)
    breaks = any("graph break" in block.twist for block in program.blocks)
    compiled = torch.compile(function, backend=captured, fullgraph=not breaks, dynamic=program.dynamic == "all" or None)

    def run(**tensors: torch.Tensor) -> Any:
        if program.dynamic == "lengths":
            for name, birth in zip("qkv", program.births, strict=True):
                order = birth.split()[0]
                place = order.index("l") if set(order) == set("bhld") else 1
                torch._dynamo.maybe_mark_dynamic(tensors[name], place)
            torch._dynamo.maybe_mark_dynamic(tensors["real"], 1)
        return compiled(**tensors)

    with torch._dynamo.config.patch(fake_tensor_cache_enabled=False):  # half the time of a compilation
        if "number.c" in source(program).replace("number = ", ""):
            functions["number"].c = 0.45  # another model of the class, which Dynamo has seen before
            _run(torch.compile(function, backend="eager"), program, rows)
            functions["number"].c = 0.3
        _run(run, program, rows)
    return run


def _situations(program: Program, changed: bool) -> Iterator[Situation]:
    """With which inputs a program is compared; one whose graph is as it was only where it may be another graph."""
    if changed:
        yield AS_DRAWN
    if program.dynamic:
        yield Situation(longer=2)
    if changed and program.kept is not None:
        yield Situation(kept=program.kept)


def _differs(
    program: Program,
    function: Callable[..., Any],
    run: Callable[..., Any],
    rows_at: Callable[[Situation], torch.Tensor],
    at: Situation,
) -> str | None:
    """What is not as in the program itself, in words; None for no difference, or for results that are not finite."""
    rows = rows_at(at)
    expected = _run(function, program, rows, at)
    if not _is_finite(expected):
        return None
    got = _run(run, program, rows, at)
    difference = _difference(expected, got)
    if difference is not None and len(got) == len(expected):
        with contextlib.suppress(RuntimeError):  # float64 has a lowest number that float32 cannot hold
            truth = _run(function, program, rows, at, double=True)
            difference = None if _as_good(truth, expected, got) else difference
    return difference


def _neighbours(
    program: Program, function: Callable[..., Any], run: Callable[..., Any], rows: torch.Tensor
) -> str | None:
    """How the kept sequence differs between two runs with others beside it; None if it does so in the program, too."""
    beside = (AS_DRAWN, Situation(kept=program.kept))
    plain, got = (
        [[x[program.kept] for x in _run(f, program, rows, at, backward=False) if x is not None] for at in beside]
        for f in (function, run)
    )
    if not all(map(torch.equal, *plain)):
        return None
    VERDICTS["thinned", "other sequences beside it", "compared"] += 1
    return _difference(*got)


def _count(program: Program, verdicts: dict[str, list[str]]) -> None:
    for name, found in verdicts.items():
        told = found if len(found) == len(program.blocks) else ["several sites" if found else "no site"] * 2
        for block, verdict in zip(program.blocks, told, strict=False):
            for feature in (f"dynamic={program.dynamic}", *_features(block)):
                VERDICTS[name, feature, verdict] += 1


def table() -> str:
    """What became of every feature: sites per verdict and policy."""
    rows = []
    for feature in sorted({feature for _, feature, _ in VERDICTS}):
        for policy in ("-", *POLICIES):
            counts = {verdict: n for (p, f, verdict), n in VERDICTS.items() if (p, f) == (policy, feature)}
            if counts:
                rows.append(f"{feature:<60} {policy:<9} {', '.join(f'{v} {n}' for v, n in sorted(counts.items()))}")
    return "\n".join(rows)


# hypothesis varies an example five times before it draws a new one, but not among its first ten
_CHUNK = 10


def _fuzz(count: int, examine: Callable[[Program], Any]) -> None:
    """Draw ``count`` programs, the same ones at every call unless it is nightly."""
    for start in range(0, count, _CHUNK):

        @hypothesis.settings(
            max_examples=min(_CHUNK, count - start), suppress_health_check=list(hypothesis.HealthCheck)
        )
        @hypothesis.given(programs())
        def chunk(program: Program) -> None:
            examine(program)

        torch._dynamo.reset()
        (chunk if NIGHTLY else hypothesis.seed(start)(chunk))()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads cost more than they bring at these sizes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_what_is_rewritten_is_equal(capsys: pytest.CaptureFixture[str]) -> None:
    _fuzz(PROGRAMS, check)
    if NIGHTLY:
        with capsys.disabled():
            print(f"\n{table()}")
    rewritten = {(policy, feature) for policy, feature, verdict in VERDICTS if verdict == "rewritten"}
    assert rewritten >= {("thinning", "form=sdpa"), ("proven", "form=sdpa")}


def _claims_causal(gm: torch.fx.GraphModule, buffers: Buffers) -> list[Any]:
    """A matcher that takes every mask for a causal one."""
    found = []
    for site in find_sites(gm, buffers):
        offset = 0 if site.spec is None else site.spec.Lk - site.spec.Lq
        mask = Mask(causal=True, offset=offset)
        found.append(site if site.spec is None else replace(site, padding=None, spec=replace(site.spec, mask=mask)))
    return found


WRONG = [f"almost: {name}" for name in sorted(ALMOST)]
WRONG += [f"packed: {name}" for name in sorted(PACKED) if name != "one sequence"]


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_proof_is_noticed(name: str) -> None:
    sizes = {"B": 3, "H": 4, "Hk": 4, "Lq": 7, "Lk": 7, "given": "1111", "padding": (3, 0, 2)}
    term = Term(name, "0", "masked_fill", "-math.inf")
    program = Program(**sizes, blocks=(Block(form="sdpa", masks=(term,)),))
    verdicts = check(program)
    assert verdicts["thinning"] == ["refused"]
    with pytest.raises(AssertionError, match="relative error"):
        check(program, find=_claims_causal)


@pytest.mark.parametrize("scale", [-0.5, 0.0, 0.5])
def test_a_scale_of_any_sign(scale: float) -> None:
    block = Block(form="sdpa", masks=(Term("causal: tril"),), sdpa=(f"scale={scale}",))
    assert check(Program(blocks=(block,)))["proven"] == ["rewritten"]


@pytest.mark.parametrize("kept", [0, 2])
@pytest.mark.parametrize("form", ["sdpa", "softmax"])
@pytest.mark.parametrize("causal", [True, False])
def test_a_sequence_gets_the_same_whatever_is_beside_it(kept: int, form: str, causal: bool) -> None:
    masks = (Term("causal: tril"),) if causal else ()
    block = Block(form=form, masks=(*masks, Term("padding: index")))
    program = Program(B=3, Lq=64, Lk=64, blocks=(block,), padding=(1, 0, 3), gradients=False, kept=kept)
    functions, captured = _compile(program), Captured()
    run, rows = _captured(program, functions, captured), _rows(program, functions, express=True)
    captured.chosen = "thinned"
    assert [plan.verdict for _, plan in captured.planned["thinned"]] == ["rewritten"]
    assert _difference(*(_run(f, program, rows) for f in (functions["program"], run))) is not None  # it does thin
    compared = VERDICTS["thinned", "other sequences beside it", "compared"]
    assert _neighbours(program, functions["program"], run, rows) is None
    assert VERDICTS["thinned", "other sequences beside it", "compared"] == compared + 1


LOWEST = "torch.finfo(torch.float32).min"
ONCE_WRONG = {
    "key padding of three dimensions, for every head": Program(
        H=4, Hk=2, blocks=(Block(form="sdpa", layout="3d flatten", masks=(Term("padding: long"),)),), padding=(0, 2, 1)
    ),
    "a row whose keys are hidden by what is added and by what is filled in": Program(
        blocks=(
            Block(masks=(Term("causal: tril", "0", "add where", LOWEST), Term("padding: index", "0", "where", LOWEST))),
        ),
        padding=(99,),
        side="left",
        gradients=False,
    ),
}


@pytest.mark.parametrize("name", ONCE_WRONG)
def test_what_once_was_wrong_is_equal(name: str) -> None:
    assert "rewritten" in check(ONCE_WRONG[name])["proven"]


def test_what_depends_on_its_neighbours_is_noticed() -> None:
    program = Program(B=2, gradients=False, kept=1)
    function = _compile(program)["program"]
    rows = torch.ones(2, 5, dtype=torch.bool)

    def leaks(q: torch.Tensor, **others: torch.Tensor) -> Any:
        return function(q=q + 1e-3 * q.mean(0), **others)

    assert "relative error" in str(_neighbours(program, function, leaks, rows))
    assert _neighbours(program, leaks, leaks, rows) is None  # so it is in the program, too


def test_what_counts_as_a_difference() -> None:
    x = torch.tensor([1.0, -3.0])
    assert _difference([x, None], [x + 2e-5, None]) is None
    assert _difference([x, x], [x, x + 6e-5]) == "result 1: relative error 2.0e-05"
    assert _difference([x, None], [x, x]) == "result 1: a gradient"
    assert _difference([x, x], [x, None]) == "result 1: no gradient"
    assert _difference([x, x], [x]).startswith("1 results instead of 2")
    assert _difference([x], [x * math.nan]) == "result 0: relative error nan"
    assert _difference([x], [x.double()]).endswith("(2,) torch.float32")
