"""Host time of ops, with what it is made of. python host.py FOLDER-OF-A-TREE [seconds per case]"""
import sys, time, statistics
tree = sys.argv[1]; sys.path.insert(0, tree)
import torch
from express_compile import METHODS, AttentionSpec, Mask, Policy, Rows, Site
from express_compile.kernels import op as O, prepared as P
from express_compile.kernels.attend.decode import decode_attention

dev = "cuda" if torch.cuda.is_available() else "cpu"
H, HK, D, N = 32, 8, 128, 4096 if dev == "cuda" else 300
dt = torch.bfloat16
MIX = (Rows(32, 256, selected=16), Rows(everything=True), Rows(32, 256, 128, 256), Rows(32, 256, 128)) * 2
CASES = {
    "express": ("express", dict(budget=256, sinks=32, recent=256, protected=0)),
    "express, protected": ("express", dict(budget=256, sinks=32, recent=256, protected=256)),
    "windows alone": ("heads", dict(rows=[Rows(32, 256)] * 8)),
    "thinformer": ("thinformer", dict(budget=256)),
    "heads, four kinds": ("heads", dict(rows=MIX)),
    "heads, last 64": ("heads", dict(rows=MIX, last=64)),
    "sparse, fixed": ("sparse", dict(pattern="fixed")),
    "sparse, strided": ("sparse", dict(pattern="strided")),
    "santa step": ("santa", dict(budget=256)),
}
if dev == "cpu":
    CASES = {"sparse, fixed": CASES["sparse, fixed"]}


def sync():
    if dev == "cuda":
        torch.cuda.synchronize()


def t(f, calls=10, rounds=40):
    """Median and least of microseconds a call."""
    for _ in range(5):
        f()
    out = []
    for _ in range(rounds):
        sync()
        a = time.perf_counter()
        for _ in range(calls):
            f()
        out.append((time.perf_counter() - a) / calls * 1e6)
    sync()
    return statistics.median(out), min(out)


def call_of(case):
    name, options = CASES[case]
    Lq = 1 if name == "santa" else N
    torch.manual_seed(0)
    x = [torch.randn(1, m, h, D, device=dev, dtype=dt).transpose(1, 2) for h, m in ((H, Lq), (HK, N), (HK, N))]
    mask = Mask() if name == "thinformer" else Mask(causal=True, offset=N - Lq)
    spec = AttentionSpec(1, H, HK, Lq, N, D, D, dt, dev, 0.1, mask)
    params = METHODS[name].params(Site(spec, "layers.3"), Policy(methods=(name,), min_length=0, method_options={name: options}))
    return name, (*x, None, torch.tensor(5, device=dev), 0.1, 3), params


codes, lines_of, made = [], [], P._code_of
def code_of(*args):
    code = made(*args)
    if code is None:
        return None
    def call(*given):
        codes[:] = [code, given]
        return code(*given)
    return call
P._code_of = code_of
init = P._Code.__init__
def record(self, *args):
    init(self, *args); lines_of[:] = [self]
P._Code.__init__ = record

with torch.no_grad():
    print(f"{tree}: torch {torch.__version__}; microseconds, median/least of 40 rounds of 10 calls")
    for case in CASES:
        codes.clear(), lines_of.clear(), P.forget()
        name, args, params = call_of(case)
        op, on = METHODS[name].op, O._ON_CUDA[name]
        f = lambda: op(*args, **params)
        P.ENABLED = False
        want = f()
        P.ENABLED = True
        full = t(f)
        got = f()
        same = all(torch.equal(a, b) for a, b in zip(got, want))
        row = f"{case:20s} whole {full[0]:6.1f}/{full[1]:6.1f}  bits {'equal' if same else 'DIFFER'}"
        if codes:
            code, given = codes
            below = t(lambda: on(*args, **params))  # without the dispatcher
            alone = t(lambda: code(*given))  # without checks
            steps = lines_of[0].steps
            launches = sum(isinstance(s, P._Launch) for s in steps)
            ops = [getattr(s.func, "_schema", s.func).name.split("::")[1] for s in steps if isinstance(s, P._Op) and s.kind == "computed"]
            names = [s.compiled.metadata.name if hasattr(s.compiled.metadata, "name") else "?" for s in steps if isinstance(s, P._Launch)]
            allocations = sum("= empty(" in line for line in lines_of[0].lines)
            row += f"  from checks {below[0]:6.1f}/{below[1]:6.1f}  code {alone[0]:6.1f}/{alone[1]:6.1f}  {launches} launches, {allocations} allocations, {ops}"
            # every launch of the code alone: its line with the tensors of a run, others left out
            if dev == "cuda":
                parts = [[n, 0.0] for n in names]
                ns = dict(code.__globals__) if hasattr(code, "__globals__") and "c1" not in code.__globals__ else {}
                inner = code
                for cell in (code.__closure__ or ()):
                    if callable(cell.cell_contents) and getattr(cell.cell_contents, "__code__", None) and cell.cell_contents.__code__.co_filename == "<a prepared call>":
                        inner = cell.cell_contents
                src, k, timed = [], 0, []
                for line in lines_of[0].lines:
                    is_launch = "stream(index), " in line or ", s, " in line
                    if is_launch:
                        src.append(f"t_ = clock(); {line}; spent[{k}].append(clock() - t_)"); k += 1
                    elif " = empty(" in line or line.startswith(("del", "p", "w", "return", "s =")):
                        src.append(line)
                    else:
                        src.append(f"t_ = clock(); {line}; others.append(clock() - t_)")
                spent, others = [[] for _ in range(k)], []
                space = dict(inner.__globals__, clock=time.perf_counter, spent=spent, others=others)
                exec("def call(layer, given, addresses):\n" + "".join(f"    {s}\n" for s in src), space)
                for _ in range(30):
                    sync()
                    for _ in range(10):
                        space["call"](*given)
                sync()
                row += "\n      " + ", ".join(f"{n} {statistics.median(s) * 1e6:.1f}" for n, s in zip(names, spent))
                row += f"; operators, deletions of {ops}: {sum(others) / 300 * 1e6:.1f}"
        print(row, flush=True)
    if dev == "cuda":
        q, k, v = (torch.randn(1, h, 1 if h == H else N, D, device=dev, dtype=dt) for h in (H, HK, HK))
        print(f"exact step           whole {t(lambda: decode_attention(q, k, v, 0.1))}")
        q, k, v = call_of("express")[1][:3]
        print(f"SDPA                 whole {t(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))}")
        print(f"empty                      {t(lambda: P._empty_strided_cuda((64,), (1,), torch.uint8))}, 32 MiB {t(lambda: P._empty_strided_cuda((1 << 24,), (1,), dt))}")
        z = torch.empty(4096, device=dev)
        print(f"zero_                      {t(lambda: z.zero_())}, contiguous 32 MiB {t(lambda: q.contiguous())}")
