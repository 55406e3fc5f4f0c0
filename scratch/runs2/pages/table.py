import json, os
found = {}
for t in ("main", "new"):
    try: found[t] = json.load(open(f"{os.environ['OUT']}/{t}.json"))
    except OSError as error: print(t, error)
print("us a layer")
for case in next(iter(found.values()), {}):
    for t, x in found.items():
        y = {k: v for k, v in x.get(case, {}).items() if k not in ("error", "unlike")}
        print(f"{case:22}{t:6}", " ".join(f"{k.lstrip('_')}={v}" for k, v in y.items()), " kernels in all", round(sum(v for k, v in y.items() if k != "step"), 2))
