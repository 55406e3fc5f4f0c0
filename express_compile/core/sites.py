"""What became of one attention site, in words, and where rewritten models put that while somebody records it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from .plain import canonical
from .plan import Plan, SavedSite
from .policy import Policy
from .rows import Rows
from .spec import AttentionSpec, layer_key

NOT_MATCHED = "not matched"  # the form of attention that is seen and not read
NOT_CAPTURED = "not captured"  # that of a call of a rewritten module of which Dynamo made no graph


@dataclass(frozen=True)
class SiteReport:
    """One attention site, in words.

    module: path from the root of the model, ``""`` for the root itself.
    source: ``file:line`` of the call, ``""`` if unknown.
    form: how attention is written there (``"sdpa"``, ``"softmax"``, ...); ``"not captured"`` for a call of a rewritten
        module of which Dynamo made no graph.
    mask: what is proven about its mask, ``""`` where that was not looked at.
    method: what runs there; ``"exact"`` is the model's own attention.
    verdict: ``"rewritten"``, ``"exact"`` (we chose exact) or ``"refused"`` (exact for want of a proof).
    reason: why, in one sentence.
    rejected: ``"method: reason"`` for every method that was considered and not used; given as strings or as
        :class:`Refusal`.
    nearest: what would be rewritten in place of a refused site; ``""`` where that is not known.
    shape: its sizes and dtype, e.g. ``"B=1 H=32/8 Lq=s0 Lk=s0 D=128 bfloat16"`` (heads of the query and of the keys),
        ``""`` where that was not looked at.
    params: the keyword arguments of the op that runs there, plain data.
    predicted_ms: milliseconds by method, where the choice went by them and lengths are known.
    measured_ms: milliseconds on this machine by method, where :meth:`Report.timed` measured them.
    error: what its output is off by, ``|o_hat - o| / |o|`` in the Frobenius norm, measured by ``explain(error=True)``;
        the largest one where it ran another number of times than it is listed.
    unmeasured: why that could not be measured.
    saved, spec, policy: its entry in a saved plan, what it computes, and what decided; neither printed nor in the JSON.
    """

    module: str
    source: str
    form: str
    mask: str
    method: str
    verdict: str
    reason: str
    rejected: tuple[str, ...] = ()
    shape: str = ""
    params: Mapping[str, Any] = field(default_factory=dict)
    predicted_ms: Mapping[str, float] = field(default_factory=dict)
    nearest: str = ""
    measured_ms: Mapping[str, float] = field(default_factory=dict)
    error: float | None = None
    unmeasured: str = ""
    saved: SavedSite | None = field(default=None, repr=False, compare=False)
    spec: AttentionSpec | None = field(default=None, repr=False, compare=False)
    policy: Policy | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rejected", tuple(map(str, self.rejected)))
        object.__setattr__(self, "params", canonical(self.params))

    @property
    def rows(self) -> tuple[Rows, ...]:
        """What every head sees, where the method selects rows."""
        return () if self.saved is None else self.saved.rows

    def is_inside(self, path: str) -> bool:
        """Whether it is in the module at ``path``, or in one inside of that."""
        return not path or f"{self.module}.".startswith(f"{path}.")

    @property
    def layer(self) -> int:
        """The key of the site for random numbers; of one that has an entry in a saved plan."""
        assert self.saved is not None, "a site of a graph"
        return layer_key(self.saved.module, self.saved.index)

    @classmethod
    def from_plan(
        cls,
        module: str,
        source: str,
        form: str,
        plan: Plan,
        *,
        spec: AttentionSpec | None = None,
        index: int = 0,
    ) -> SiteReport:
        """The report of a site for which ``plan`` was made; ``spec`` is None where it was refused unseen.

        ``index`` is its place among the sites of its module.
        """
        return cls(
            module=module,
            source=source,
            form=form,
            mask="" if spec is None else str(spec.mask),
            method=plan.method,
            verdict=plan.verdict,
            reason=plan.reason,
            rejected=tuple(map(str, plan.rejected)),
            nearest=plan.nearest or "",
            shape="" if spec is None else _shape(spec),
            params=plan.params,
            predicted_ms=plan.predicted_ms,
            spec=spec,
            policy=plan.policy,
            saved=SavedSite.from_plan(module, index, spec, plan),
        )


def _shape(spec: AttentionSpec) -> str:
    heads = f"{spec.H}" if str(spec.H) == str(spec.H_kv) else f"{spec.H}/{spec.H_kv}"
    D = f"{spec.D}" if str(spec.D) == str(spec.Dv) else f"{spec.D} Dv={spec.Dv}"
    return f"B={spec.B} H={heads} Lq={spec.Lq} Lk={spec.Lk} D={D} {str(spec.dtype).removeprefix('torch.')}"


# ---- the record of this thread -------------------------------------------------------------------------------------

_record: ContextVar[list[SiteReport] | None] = ContextVar("express_compile_sites", default=None)


def recording() -> list[SiteReport] | None:
    """Where attention that runs in this thread puts its reports; None while nobody records them."""
    return _record.get()


@contextmanager
def record_sites() -> Iterator[list[SiteReport]]:
    """While active, each attention call of a rewritten model in this thread appends one ``SiteReport`` to the list.

    A captured graph appends those of all its sites when it is run. Of several in force the innermost one has them.

    >>> with record_sites() as sites:
    ...     model(input_ids)
    >>> print(sites[0].module, sites[0].verdict, sites[0].reason)
    """
    sites: list[SiteReport] = []
    token = _record.set(sites)
    try:
        yield sites
    finally:
        _record.reset(token)
