"""Sub-quadratic attention for PyTorch models you already have.

``torch.compile(model, backend="express")`` needs no import of this package; everything else starts here.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .core.method import METHODS, Method, Refusal, register
    from .core.plan import Plan, SavedPlan, SavedSite
    from .core.policy import Policy
    from .core.rows import Rows
    from .core.sites import SiteReport, record_sites
    from .core.spec import AttentionSpec, Mask, Site
    from .quality.budgets import Calibration, calibrate_error
    from .quality.fit import Fit, fit, rewrite_attention
    from .quality.profile import Profile, profile
    from .quality.watch import Watch, watch
    from .report.explain import Report, explain
    from .routes.eager import is_rewritten, restore_attention
    from .routes.transformers.cache import ExpressCache

__version__ = "0.1.0"

# kernels/ and passes/ lie beside this folder in a checkout and inside it in a wheel. When Python runs from the
# root of a checkout, this folder is found before an installed copy, so it must find its two sisters itself.
_HERE = Path(__file__).resolve().parent
if not (_HERE / "kernels").is_dir() and (_HERE.parent / "kernels").is_dir():
    __path__.append(str(_HERE.parent))

_HOMES = {
    "core.method": ("METHODS", "Method", "Refusal", "register"),
    "core.plan": ("Plan", "SavedPlan", "SavedSite"),
    "core.policy": ("Policy",),
    "core.sites": ("SiteReport", "record_sites"),
    "core.rows": ("Rows",),
    "core.spec": ("AttentionSpec", "Mask", "Site"),
    "quality.budgets": ("Calibration", "calibrate_error"),
    "quality.fit": ("Fit", "fit", "rewrite_attention"),
    "quality.profile": ("Profile", "profile"),
    "quality.watch": ("Watch", "watch"),
    "report.explain": ("explain", "Report"),
    "routes.eager": ("restore_attention", "is_rewritten"),
    "routes.transformers.cache": ("ExpressCache",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "METHODS",
    "AttentionSpec",
    "Calibration",
    "ExpressCache",
    "Fit",
    "Mask",
    "Method",
    "Plan",
    "Policy",
    "Profile",
    "Refusal",
    "Report",
    "Rows",
    "SavedPlan",
    "SavedSite",
    "Site",
    "SiteReport",
    "Watch",
    "calibrate_error",
    "explain",
    "fit",
    "is_rewritten",
    "profile",
    "record_sites",
    "register",
    "restore_attention",
    "rewrite_attention",
    "watch",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
