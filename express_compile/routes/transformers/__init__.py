"""The way into models of transformers, which let themselves be told their attention by a name.

The name ``"express_compile"`` (an attention function *and* a mask function) is registered, and the attention modules of
one model instance are pointed to it; or to ``"express_compile_eager"``, where the model ran eager attention, for that
and sdpa may compute different things. What is proven about a mask travels with the mask itself (``ProvenMask``), so
models, threads and generate() calls cannot mix up each other's facts; a mask that arrives as anything else is a dense
tensor. Of that only one thing is proven, by its shape: that it is a key padding, the same row for all queries. Of
models that have eager attention only because sdpa knows no soft-caps and no sinks, the additive mask of a single query
is read. Everything else runs exactly.

Everything in here imports transformers, an optional package, and ``routes/eager.py`` is the only one to import it. A
rewritten model that is unpickled imports it as well, so the name is registered wherever there is such a model. Both
functions or none: with the attention function alone transformers would hand every site mask=None.
"""

from __future__ import annotations

import sys

from transformers import AttentionInterface, AttentionMaskInterface

from .attention import attend
from .configs import install, is_changed, let_ask_for_weights, remove
from .masks import BY_PLACES, NAMES, make_mask, make_mask_by_places
from .sites import find_sites, installed, rewritten_sites

__all__ = ["find_sites", "install", "installed", "is_changed", "remove", "rewritten_sites"]

# Some presses of NVIDIA's kvpress leave keys in the cache that heads must not see. A patch hides them, of all attention
# functions that kvpress finds when it is imported; if that was before, ours is not among them.
patch = getattr(sys.modules.get("kvpress.attention_patch"), "attention_patch", None)
for name in NAMES.values():
    AttentionInterface.register(name, attend if patch is None else patch(attend))
    AttentionMaskInterface.register(name, make_mask_by_places if BY_PLACES else make_mask)
let_ask_for_weights()
