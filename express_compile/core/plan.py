"""What was decided: the plan of one site, and plans of all sites as plain data, to be followed by another copy."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from . import local
from .method import Refusal
from .plain import about, canonical, check_plain, entries, from_json, number, renamed, write_whole
from .rows import Rows, heads
from .spec import AttentionSpec

if TYPE_CHECKING:
    from .policy import Policy

Verdict = Literal["rewritten", "exact", "refused"]

_VERSION = 2
_SIZES = ("H", "H_kv", "D", "Dv")


@dataclass(frozen=True)
class Plan:
    """The decision for one site.

    ``method`` is what will run there (``"exact"`` when nothing else may); ``params`` are the keyword
    arguments of its op, plain data; ``rows`` are those that every head sees, where the method selects such;
    ``rejected`` holds one :class:`Refusal` for every other method that was
    considered; ``reason`` is one sentence for the report; ``predicted_ms`` are the times by which it was chosen, of
    each method, where lengths are known; ``policy`` is the one that decided: that of the site's module, its budget a
    number where the number of keys is known; ``nearest`` is what would be rewritten in place of a refused site, in
    words, if that is known.
    """

    method: str
    verdict: Verdict
    reason: str
    params: Mapping[str, Any] = field(default_factory=dict)
    rejected: tuple[Refusal, ...] = ()
    predicted_ms: Mapping[str, float] = field(default_factory=dict)
    nearest: str | None = None
    policy: Policy | None = field(default=None, repr=False, compare=False)
    rows: tuple[Rows, ...] = ()


@dataclass(frozen=True)
class SavedSite:
    """The decision for one site. Plain data; nothing in it is trusted, it is all proven again where it is followed.

    module, index: which site it is: its module path, and its place among the sites of that module.
    method, verdict, params, rows: as in :class:`Plan`. Files of version 1 have no rows, and other params; their
        options say the same, so both are left empty.
    facts: what it was decided under: ``mask`` (causal, window; offset and key padding may change from call to call)
        and the sizes ``H``, ``H_kv``, ``D`` and ``Dv``.
    options: those that decided, as one module may have them; of its methods this one and "exact".

    Raises ``ValueError`` or ``TypeError`` that name the field, its value and what is allowed.
    """

    module: str
    index: int
    method: str
    verdict: Verdict
    params: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    rows: tuple[Rows, ...] = ()

    def __post_init__(self) -> None:
        for name in ("module", "method", "verdict"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name}={getattr(self, name)!r}: must be of type str")
        object.__setattr__(self, "index", number("index", self.index, int))
        if self.index < 0:
            raise ValueError(f"index={self.index!r}: must be 0 or more, a place among the sites of a module")
        if self.verdict not in get_args(Verdict):
            raise ValueError(f"verdict={self.verdict!r}: must be one of {', '.join(get_args(Verdict))}")
        for name in ("params", "facts", "options"):
            if not isinstance(getattr(self, name), Mapping):
                raise TypeError(f"{name}={getattr(self, name)!r}: must be a mapping")
            with about(name):
                object.__setattr__(self, name, canonical(getattr(self, name)))
        object.__setattr__(self, "rows", heads(self.rows))
        local.check_all(self.options)

    @property
    def per(self) -> str:
        """What ``rows`` has an entry for: every ``"KV head"``, or every ``"query head"`` where these are more."""
        H_kv, H = (self.facts.get(name) for name in ("H_kv", "H"))
        return "query head" if len(self.rows) == H != H_kv else "KV head"

    @classmethod
    def from_plan(cls, module: str, index: int, spec: AttentionSpec | None, plan: Plan) -> SavedSite:
        """The entry of a site for which ``plan`` was made; ``spec`` is None where it was refused unseen."""
        if plan.verdict != "rewritten" or spec is None:
            return cls(module, index, plan.method, plan.verdict)
        options: dict[str, Any] = {"methods": (plan.method,)} if plan.policy is None else plan.policy.local()
        if options["methods"] is not None:  # whether exact attention may be chosen decides where the method runs
            options["methods"] = tuple(name for name in options["methods"] if name in (plan.method, "exact"))
        return cls(module, index, plan.method, plan.verdict, plan.params, facts_of(spec), options, plan.rows)


def facts_of(spec: AttentionSpec) -> dict[str, Any]:
    """The facts of a site that a saved plan relies on, as plain data; sizes that are not known as text."""
    sizes = {name: getattr(spec.whole, name) for name in _SIZES}
    mask = str(replace(spec.mask, offset=0, padding=False))
    return {"mask": mask, **{name: size if isinstance(size, int) else str(size) for name, size in sizes.items()}}


@dataclass(frozen=True)
class SavedPlan:
    """The decisions for all sites of a model, in order of execution; ``explain(...).plan`` is one.

    Follow it with ``torch.compile(model, backend="express", options={"plan": plan})`` or
    ``rewrite_attention(model, plan=plan)``; ``plan`` may also be the path of a file that :meth:`save` wrote.

    fitted: what it was fitted on, for :func:`express_compile.fit`: plain data that nothing is decided by.
    """

    sites: tuple[SavedSite, ...] = ()
    fitted: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        sites = tuple(self.sites)
        for site in sites:
            if not isinstance(site, SavedSite):
                raise TypeError(f"sites: {site!r} must be a SavedSite")
        object.__setattr__(self, "sites", sites)
        if not isinstance(self.fitted, Mapping):
            raise TypeError(f"fitted={self.fitted!r}: must be a mapping")
        check_plain("fitted", self.fitted)
        object.__setattr__(self, "fitted", canonical(self.fitted))

    @classmethod
    def of(cls, sites: Iterable[SavedSite]) -> SavedPlan:
        """A plan of these sites; one that was called more than once with the same decision has one entry."""
        kept: list[SavedSite] = []
        for site in sites:
            if site not in kept:
                kept.append(site)
        return cls(tuple(kept))

    @cached_property
    def _places(self) -> dict[tuple[str, int], list[SavedSite]]:
        places: dict[tuple[str, int], list[SavedSite]] = {}
        for site in self.sites:
            places.setdefault((site.module, site.index), []).append(site)
        return places

    def at(self, module: str, index: int = 0) -> list[SavedSite]:
        """The entries of one site: none, one, or one for each kind of call that was seen there."""
        return self._places.get((module, index), [])

    def to_json(self) -> str:
        """The plan as JSON. NaN and infinities are written as Python's ``json`` does."""
        sites = [{f.name: getattr(site, f.name) for f in fields(site)} for site in self.sites]
        for site in sites:
            site["rows"] = [rows.to_data() for rows in site["rows"]]
        check_plain("sites", sites)
        fitted = {"fitted": self.fitted} if self.fitted else {}
        return json.dumps({"version": _VERSION, **fitted, "sites": sites}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> SavedPlan:
        """The plan that :meth:`to_json` wrote. Raises ``ValueError`` or ``TypeError`` that names the entry."""
        return from_json("plan", text, lambda data: cls.from_data(data, "plan"))

    @classmethod
    def from_data(cls, data: Any, name: str) -> SavedPlan:
        """The plan in what :meth:`to_json` wrote, as ``json`` reads it; errors begin with ``name``."""
        with about(name):
            return cls._from_data(data)

    @classmethod
    def _from_data(cls, data: Any) -> SavedPlan:
        version, sites = (data.get("version"), data.get("sites")) if isinstance(data, dict) else (None, None)
        if type(version) is not int or not 1 <= version <= _VERSION or not isinstance(sites, list):
            raise ValueError(f"must be an object with version={_VERSION} and a list of sites, as save() writes it")
        if unknown := sorted({*data} - {"version", "sites", "fitted"}):
            raise ValueError(f"{', '.join(unknown)}: not allowed; allowed are version, sites and fitted")
        return cls(tuple(_site(i, entry, version) for i, entry in enumerate(sites)), data.get("fitted", {}))

    def save(self, path: str | PathLike[str]) -> None:
        """Write the plan to a file, in one step. Raises ``OSError`` if that cannot be."""
        write_whole(path, self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> SavedPlan:
        """The plan in a file. Raises ``OSError`` if it cannot be read, else as :meth:`from_json`; both name it."""
        name = f"plan={str(path)!r}"
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            words = f"{name}: {error.strerror}; must be the path of a file that save() wrote"
            raise OSError(error.errno, words) from None
        except ValueError as error:
            raise renamed(name, error) from None
        return from_json(name, text, lambda data: cls.from_data(data, name))


def _site(i: int, entry: Any, version: int) -> SavedSite:
    entry = entries(SavedSite, entry, f"sites[{i}]: ", but=("rows",) if version == 1 else ())
    with about(f"sites[{i}] ({entry['module']!r})"):
        site = SavedSite(**entry)
    return replace(site, params={}) if version == 1 else site
