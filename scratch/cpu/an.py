import json,sys,math
for f in sys.argv[1:]:
    R=[json.loads(l) for l in open(f)]
    if not R: continue
    V=[k for k in R[0] if isinstance(R[0][k],list) and k not in("tasks","depth")]
    print(f,len(R))
    for v in V:
        d=[[x[0]-e[0] for x,e in zip(r[v],r["exact"])] for r in R]
        fl=sum(d,[]); hit=sum(x[1] for r in R for x in r[v])
        lost=sum(e[1] and not x[1] for r in R for x,e in zip(r[v],r["exact"]))
        four=[q for r,dd in zip(R,d) for t,q in zip(r["tasks"],dd) if t=="four"]
        two=[q for r,dd in zip(R,d) for t,q in zip(r["tasks"],dd) if t=="two"]
        abs_=sum(map(abs,fl))/len(fl)
        print(f"{v:6s} dNLL {sum(fl)/len(fl):+.3f} four {sum(four)/len(four):+.3f} two {sum(two)/len(two):+.3f} |d| {abs_:.3f} hits {hit}/{len(fl)} lost {lost}")
