import sys, time, json
sys.path.insert(0, "examples/bench")
import torch
from pathlib import Path
from models import load_smollm2, profiled_texts, profiled_haystacks
from needles import profiled_questions, PROFILED_NOISE
from express_compile.core.rows import Rows
from express_compile.quality import profile as P
torch.set_grad_enabled(False); torch.set_num_threads(1)
n = 1024
model, tok = load_smollm2("cpu", torch.float32)
S = 16
options = (*(Rows(S, r) for r in (32, 64, 128, 256)), Rows(S, 32, 16), Rows(S, 64, 32, 32), Rows(S, 64, protected=64), Rows(S, 128, protected=128), Rows(S, 32, selected=1), Rows(S, 64, selected=4), Rows(everything=True))
orig, got = P.joined, []
P.joined = lambda each: (got.append(list(each)), orig(each))[1]
samples = {k: tok(x[: 8*n], return_tensors="pt").input_ids[:, :n] for k, x in profiled_texts().items()}
samples |= {"q " + k: torch.tensor([x]) for k, x in profiled_questions(tok, n, {"noise": PROFILED_NOISE, **profiled_haystacks()}, most=128).items()}
t = time.time()
for k, ids in samples.items():
    P.profile(model, ids, options, block=64, last=256)
    for kind, x in zip(("late", "last"), got[-1]): Path(f"/tmp/e1/{k}.{kind}.json").write_text(x.to_json())
    print(k, len(got[-1]), time.time() - t, flush=True)
