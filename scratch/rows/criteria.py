"""GPU exploration: criteria of the profile (errors by query, by retrieval, by KL of layers) x (KL, recall). See NOTE-FROM-LEAD."""
import argparse, sys, time, collections, json
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, "examples/bench"); sys.path.insert(0, ".")
import numpy as np, torch
import plans as B
from models import haystacks, judged_texts, profiled_texts
from needles import NOISE, cases
from express_compile.core.call import run_by
from express_compile.core.rows import Rows
from express_compile.kernels.heads import EVERYTHING, PerHead
from express_compile.quality import profile as Q
from express_compile.quality.budgets import Exactly, logits_of, mean_kl

ap = argparse.ArgumentParser()
ap.add_argument("--model", default="smollm2")
ap.add_argument("--length", type=int, default=8192)
ap.add_argument("--rows", type=float, default=1350)
ap.add_argument("--each", type=int, default=3)
ap.add_argument("--texts", type=int, default=3)
ap.add_argument("--batch", type=int, default=8)
ap.add_argument("--few", action="store_true", help="five options, for a dry run")
ap.add_argument("--tables", type=Path, help="npz of all criteria: written, or read if it is there")
ap.add_argument("--plans", nargs="*", help="which plans are judged (see --list at the end of a run); default: a choice")
ap.add_argument("--seconds", type=float, default=110, help="no more plans are begun after so many")
a = ap.parse_args()
t0 = time.time()
def say(*x): print(f"[{time.time()-t0:5.1f}]", *x, flush=True)
dev = "cuda" if torch.cuda.is_available() else "cpu"
model, tok = B.MODELS[a.model][1](dev, torch.bfloat16 if dev == "cuda" else torch.float32)
if a.few: model.model.layers = model.model.layers[:2]; model.config.num_hidden_layers = 2
def tokens(text): return tok(text[:8 * a.length], return_tensors="pt").input_ids[:, :a.length].to(dev)
OPT = tuple(B.OPTIONS)
if a.few: OPT = (Rows(32, 64), Rows(32, 256), Rows(32, 128, selected=2), Rows(32, 128, protected=32), EVERYTHING)
REF = Rows(32, 256)
texts = {name: tokens(x) for name, x in profiled_texts().items()}
first = Q.late(a.length)

def retrieval(ids, gram=6, away=300):
    """Positions from `first` on at which the next token is what followed the same `gram` tokens, at least `away` before."""
    ids, seen, found = ids[0].tolist(), {}, []
    for i in range(gram - 1, len(ids) - 1):
        key = tuple(ids[i - gram + 1:i + 1])
        if i >= first and any(ids[j + 1] == ids[i + 1] and i - j >= away for j in seen.get(key, ())): found.append(i - first)
        seen.setdefault(key, []).append(i)
    return torch.tensor(found, dtype=torch.long, device=dev)

def by_query(x, y, groups, weight):
    """|W (x - y)|^2 of every late query by group: float32 [groups, n]."""
    out = []
    by_group = weight.detach().unflatten(1, (groups, -1)).transpose(0, 1).float()
    for i in range(first, x.shape[2], 512):
        p = x[:, :, i:i + 512].float()
        p = p if y is None else p - y[:, :, i:i + 512].float()
        p = p.unflatten(1, (groups, -1)).permute(1, 0, 3, 2, 4).flatten(3).flatten(1, 2) @ by_group.mT
        out.append(p.square().sum(2))
    return torch.cat(out, 1)

class Meter(Exactly):
    def __init__(self, projections, at): self.w, self.at, self.tables = projections, at, {}
    def see(self, op, call, exact):
        H, W = call.key.shape[1], self.w[call.layer]
        whole = by_query(exact, None, 1, W)[0]
        rows = []
        for o in OPT:
            e = by_query(Q.with_rows(call, [o]).run(op)[0], exact, H, W)  # [H, n]
            rel = e / whole.clamp(min=1e-12)
            k = max(1, rel.shape[1] // 50)
            crit = [e.sum(1) / whole.sum(), rel.clamp(max=1).mean(1), rel.clamp(max=1).square().mean(1), rel.clamp(max=1).topk(k, 1).values.mean(1)]
            r = self.at
            crit.append(e[:, r].sum(1) / whole[r].sum() if len(r) else torch.zeros_like(crit[0]))
            rows.append(torch.stack(crit))
        self.tables[call.layer] = torch.stack(rows, 2).double().cpu()  # [crit, H, options]
NAMES = ["sum", "query", "square", "worst 2%", "retrieval"]

with torch.no_grad():
    if a.tables and a.tables.exists():
        z = np.load(a.tables, allow_pickle=True); T, K, paths = z["T"], z["K"], list(z["paths"])
    else:
        T, K = [], []
        base = PerHead(EVERYTHING, block=128)
        with Q.rewritten(model, base):
            finder, reports = Q._found(model, next(iter(texts.values())))
            of = {x.layer: x for x in reports if x.saved is not None and x.verdict == "rewritten"}
            for name, ids in texts.items():
                at = retrieval(ids)
                meter = Meter(finder.projections, at)
                with run_by(meter): exact = logits_of(model, ids)
                layers = list(meter.tables)
                T.append(torch.stack([meter.tables[l] for l in layers]).numpy())
                say(f"errors of {name}, {len(at)} retrieval positions of {a.length - first}")
                kls, rkls = [], []
                for l in layers:
                    with run_by(Q.Chosen({l: [REF] * T[-1].shape[2]})): kls.append(mean_kl(exact, logits_of(model, ids), first))
                K.append(kls)
                say(f"KL of single layers with {REF}: ", " ".join(f"{x:.4f}" for x in kls))
                del exact
        T, K = np.stack(T), np.array(K)  # [texts, layers, crit, H, options], [texts, layers]
        paths = [of[l].saved.module for l in layers]
        if a.tables: np.savez(a.tables, T=T, K=K, paths=np.array(paths))

ref = OPT.index(REF)
E = {n: T[:, :, i] for i, n in enumerate(NAMES)}  # [texts, layers, H, options]
alpha = K / np.maximum(E["sum"][..., ref].sum(-1), 1e-9)  # nats per relative error of a layer: [texts, layers]
rec = list(texts).index("records"); nat = [i for i in range(len(texts)) if i != rec]
pred = E["sum"] * alpha[:, :, None, None]
anat = (K[nat].mean(0) / np.maximum(E["sum"][nat][..., ref].sum(-1).mean(0), 1e-9))[:, None, None]
def norm(x): return x / x[..., ref].sum()
CRIT = {
    "sum": E["sum"].mean(0),
    "query": E["query"].mean(0),
    "square": E["square"].mean(0),
    "worst 2%": E["worst 2%"].mean(0),
    "worst text": E["sum"].max(0),
    "sum+retrieval": norm(E["sum"][nat].mean(0)) + norm(E["retrieval"].max(0)),
    "KL": pred.mean(0),
    "KL natural": pred[nat].mean(0),
    "KL+.1 records": pred[nat].mean(0) + .1 * pred[rec],
    "KL normalised": sum(norm(p) for p in pred),
    "layer KL x sum": E["sum"].mean(0) * anat,
    "layer KL x query": E["query"].mean(0) * anat,
    "layer KL x worst 2%": E["worst 2%"].mean(0) * anat,
    "layer KL x retrieval": norm(E["sum"][nat].mean(0) * anat) + norm(E["retrieval"].max(0) * anat),
    "sqrt layer KL x sum": E["sum"].mean(0) * np.sqrt(anat),
}
rows_at = tuple(Q.rows_of(OPT, a.length, B.base(0)))
def prof(errors):
    sites = tuple(Q.SiteProfile(p, 0, None, tuple(map(tuple, e.tolist()))) for p, e in zip(paths, errors))
    return Q.Profile(OPT, a.length, 3, rows_at, sites)
def plan_of(name, last):
    crit, _, without = name.partition(" - ")
    found = prof(CRIT[crit])
    if without: found = B.only(found, lambda x: not getattr(x, without))
    return B.chosen(found, a.rows, a.length, last)

order = a.plans or ["sum", "KL normalised", "layer KL x sum", "sum - selected", "layer KL x retrieval", "KL normalised - selected", "layer KL x query", "KL natural", "sum+retrieval", "worst 2%", "query", "KL+.1 records", "worst text", "layer KL x worst 2%", "sqrt layer KL x sum", "square", "KL"]
asked = [c for c in cases(tok, a.length + 1, {"noise": NOISE, **haystacks()}, a.each) if c.task in ("single", "among four", "two values")]
ids = {name: tokens(x) for name, x in list(judged_texts().items())[-a.texts:]}
judge = B.Judge(model, ids, asked, a.batch, dev)
say(f"{len(judge.cases)} of {len(asked)} solved by exact:", dict(judge.solved))
lines = []
for name in order:
    if time.time() - t0 > a.seconds: say("no time for", name); continue
    plan = plan_of(name, 16)
    with judge.following(plan):
        stats = [judge.statistics(x) for x in judge.ids]
        right = judge.found(judge.cases)
    with judge.following(plan_of(name, 0)): right0 = judge.found(judge.cases)
    kl = [float(s.kl.mean()) for s in stats]
    by = collections.Counter(f"{c.task[:3]}/{c.haystack}" for c, r in zip(judge.cases, right0) if r)
    kinds = collections.Counter("selected" if x.selected else "everything" if x.everything else "both" if x.protected and x.thinned else "protected" if x.protected else "thinned" if x.thinned else "window" for x in B.rows_by_head(plan))
    lines.append(f"{name:28s} rows {B.average_rows(plan, a.length):6.0f} KL {np.mean(kl):.4f} ({' '.join(f'{x:.4f}' for x in kl)}) recall last16 {sum(right)} last0 {sum(right0)} of {len(right)} {dict(by)} heads {dict(kinds)}")
    say(lines[-1])
print("\n".join(lines))
say("done")
