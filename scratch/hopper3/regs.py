import re, sys, collections
def parse(path):
    ins = {}; labels = {}; order = []
    pend = []
    for line in open(path):
        m = re.match(r"\s*(\.L_x_\d+|\.L_\d+|\.text\.\S+):", line)
        if m: pend.append(m[1]); continue
        m = re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", line)
        if m:
            a = int(m[1], 16); ins[a] = m[2]; order.append(a)
            for p in pend: labels[p] = a
            pend = []
    return ins, labels, order
def succ(ins, labels, order):
    nxt = {a: b for a, b in zip(order, order[1:])}
    S = {}
    for a in order:
        t = ins[a]; s = []
        pred = t.startswith("@")
        body = re.sub(r"^@!?U?P\w+\s+", "", t)
        op = body.split()[0]
        tg = re.search(r"`\((\.L_x?_?\d+)\)", body)
        if op.startswith("BRA") or op.startswith("BRA.U"):
            if tg and tg[1] in labels: s.append(labels[tg[1]])
            cond = pred or re.match(r"BRA\S*\s+!?U?P\d", body)
            if cond and a in nxt: s.append(nxt[a])
        elif op.startswith("EXIT"):
            if pred and a in nxt: s.append(nxt[a])
        elif op.startswith("BRX"):
            s += [labels[l] for l in labels if l.startswith(".L_x_")] ; print("BRX", hex(a), t)
        elif op.startswith("CALL"):
            if tg and tg[1] in labels: s.append(labels[tg[1]])
            s.append(nxt[a])
        elif op.startswith("RET"): pass
        else:
            if a in nxt: s.append(nxt[a])
        S[a] = s
    return S
def maxreg(t):
    t2 = t
    r = [int(x) for x in re.findall(r"(?<![A-Za-z])R(\d+)", t2)]
    m = max(r, default=-1)
    if r:
        if re.search(r"HGMMA|\.128", t2): m = m + 3 if ".128" in t2 else m
        elif ".64" in t2 or "WIDE" in t2: m += 1
    if "HGMMA" in t2:
        m = max([int(x) + (63 if "64x128" in t2 else 0) for x in re.findall(r"HGMMA\S*\s+R(\d+)", t2)] + r)
    return m
if __name__ == "__main__":
    for path in sys.argv[1:]:
        ins, labels, order = parse(path); S = succ(ins, labels, order)
        print("==", path)
        for a in order:
            if "USETMAXREG" in ins[a]:
                # flood until the next USETMAXREG
                seen = set(); todo = list(S[a]); top = (-1, None)
                while todo:
                    b = todo.pop()
                    if b in seen: continue
                    seen.add(b)
                    if "USETMAXREG" in ins[b]: continue
                    m = maxreg(ins[b])
                    if m > top[0]: top = (m, b)
                    todo += S[b]
                n = sum("HGMMA" in ins[b] for b in seen); u = sum("UTMA" in ins[b] for b in seen); loc = sum(bool(re.search(r"\b(STL|LDL)", ins[b])) for b in seen)
                v = int(re.search(r"0x([0-9a-f]+)\s*$", ins[a])[1], 16)
                print(f"{a:#06x} {ins[a]:50s} {v}: {len(seen)} instr, HGMMA {n} UTMA {u} local {loc}; max R{top[0]} at {top[1] and hex(top[1])} {ins.get(top[1],'')[:70]}", "***" if top[0] >= v else "")
