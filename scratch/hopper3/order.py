"""The barrier protocol of hopper.py over several jobs, in random interleavings: no deadlock, no tile read that is not there.

mbarriers as PTX has them: ``wait(parity)`` passes when the phase of that parity has completed, i.e. the current phase
has the other parity. TMA completes some time after it is issued; wgmma reads its operands until it is waited for."""
import random, sys

class Bar:
    def __init__(self, count): self.count, self.pending, self.tx, self.phase = count, count, 0, 0
    def arrive(self): self.pending -= 1; assert self.pending >= 0, "more arrivals than the barrier takes"; self.done()
    def expect(self, n): self.tx += n; self.arrive()
    def complete(self, n): self.tx -= n; self.done()
    def done(self):
        if self.pending == 0 and self.tx == 0: self.phase ^= 1; self.pending = self.count
    def ok(self, parity): return self.phase != parity

def simulate(jobs, STAGES, seed, pingpong=False, SIDES=2, nest=False, ahead=False, rotate=False):
    turn = [Bar(1), Bar(1)]
    rnd = random.Random(seed)
    qf, qe = [Bar(1) for _ in range(4)], [Bar(1) for _ in range(4)]
    kf, vf = [Bar(1) for _ in range(STAGES)], [Bar(1) for _ in range(STAGES)]
    ke, ve = [Bar(2) for _ in range(STAGES)], [Bar(2) for _ in range(STAGES)]
    Q, K, V = [None] * 4, [None] * STAGES, [None] * STAGES
    readers = {}                      # buffer -> number of wgmmas in flight that read it
    flying, out = [], {}              # TMA copies in flight
    def land(buf, i, tag, bar):
        assert not readers.get((id(buf), i)), f"{tag} overwrites what is being read"
        buf[i] = tag; bar.complete(1)
    def begin(buf, i, tag, bar):
        assert not readers.get((id(buf), i)), f"{tag}: copy begins over a buffer that is being read"
        buf[i] = "in flight"
        flying.append((buf, i, tag, bar))
    def producer():
        count = 0
        for n, total in enumerate(jobs):
            for j in range(total):
                for buf, full, empty in ((K, kf, ke), (V, vf, ve)):
                    s = count % STAGES
                    yield lambda: empty[s].ok((count // STAGES) & 1 ^ 1)
                    full[s].expect(1); begin(buf, s, (n, j), full[s])
                    if j == 0 and buf is K:
                        for half in range(2):
                            at = n % SIDES * 2 + half
                            yield lambda: qe[at].ok((n // SIDES) & 1 ^ 1)
                            qf[at].expect(1); begin(Q, at, (n, half), qf[at])
                count += 1
    def producer_ahead():
        count = 0; last = None
        for n, total in enumerate(jobs):
            for j in range(total + (n + 1 == len(jobs))):
                if j < total:
                    s = count % STAGES
                    yield lambda: ke[s].ok((count // STAGES) & 1 ^ 1)
                    kf[s].expect(1); begin(K, s, (n, j), kf[s])
                if n + j > 0:
                    c = count - 1; b = c % STAGES
                    yield lambda: ve[b].ok((c // STAGES) & 1 ^ 1)
                    vf[b].expect(1); begin(V, b, last, vf[b])
                if j == 0:
                    for half in range(2):
                        yield lambda: qe[half].ok(n & 1 ^ 1)
                        qf[half].expect(1); begin(Q, half, (n, half), qf[half])
                last = (n, j); count += 1
    if ahead: producer = producer_ahead
    def use(buf, i, tag):
        assert buf[i] == tag, f"reads {buf[i]}, wants {tag}"
        readers[id(buf), i] = readers.get((id(buf), i), 0) + 1
    def used(buf, i, tag):
        assert buf[i] == tag, f"{tag} was overwritten by {buf[i]} while it was read"
        readers[id(buf), i] -= 1
    def consumer(half):
        yield lambda: qf[half].ok(0)
        yield lambda: kf[0].ok(0)
        use(Q, half, (0, half)); use(K, 0, (0, 0)); yield None
        used(Q, half, (0, half)); used(K, 0, (0, 0))
        ke[0].arrive()
        if jobs[0] == 1: qe[half].arrive()
        total = jobs[0]; done = 0
        n, j, count, added = 0, 1, 1, 0
        acc, tiles = [], [0]                    # tiles of the job whose values are being summed
        if total == 1: n, j = 1, 0; total = jobs[min(n, len(jobs) - 1)]
        job_of_last, tile_of_last = 0, 0
        while n < len(jobs):
            s, b = count % STAGES, (count - 1) % STAGES
            if j == 0: yield lambda: qf[n % 2 * 2 + half].ok((n // 2) & 1)
            yield lambda: kf[s].ok((count // STAGES) & 1)
            if pingpong: yield lambda: turn[half].ok((count - 1) & 1 ^ (1 - half))
            use(Q, n % 2 * 2 + half, (n, half)); use(K, s, (n, j))
            yield lambda: vf[b].ok(((count - 1) // STAGES) & 1)
            use(V, b, (job_of_last, tile_of_last))
            acc = acc + [tile_of_last] if added > 0 else [tile_of_last]
            if pingpong: turn[1 - half].arrive()
            yield None
            used(Q, n % 2 * 2 + half, (n, half)); used(K, s, (n, j))
            ke[s].arrive()
            if j + 1 == total: qe[n % 2 * 2 + half].arrive()
            yield None
            used(V, b, (job_of_last, tile_of_last)); ve[b].arrive()
            if j == 0: assert (half, done) not in out; out[half, done] = acc
            done, job_of_last, tile_of_last, added = n, n, j, j
            count += 1; j += 1
            if j == total: n += 1; j = 0; total = jobs[min(n, len(jobs) - 1)]
        s = (count - 1) % STAGES
        yield lambda: vf[s].ok(((count - 1) // STAGES) & 1)
        use(V, s, (job_of_last, tile_of_last)); acc = acc + [tile_of_last] if added > 0 else [tile_of_last]
        yield None
        used(V, s, (job_of_last, tile_of_last)); out[half, done] = acc
    def nested(half):
        count = 0; step = 0
        for n, total in enumerate(jobs):
            at = n % SIDES * 2 + half
            yield lambda: qf[at].ok((n // SIDES) & 1)
            acc = []
            for j in range(total + 1):
                s, b = count % STAGES, (count - 1) % STAGES
                if j < total:
                    yield lambda: kf[s].ok((count // STAGES) & 1)
                    if pingpong: yield lambda: turn[half].ok((step & 1) ^ (1 - half))
                    use(Q, at, (n, half)); use(K, s, (n, j))
                if j:
                    yield lambda: vf[b].ok(((count - 1) // STAGES) & 1)
                    use(V, b, (n, j - 1)); acc.append(j - 1)
                if j < total:
                    if pingpong: turn[1 - half].arrive(); step += 1
                    yield None
                    used(Q, at, (n, half)); used(K, s, (n, j)); ke[s].arrive()
                    if j + 1 == total: qe[at].arrive()
                yield None
                if j: used(V, b, (n, j - 1)); ve[b].arrive()
                if j < total: count += 1
            out[half, n] = acc
    def rotated(half):
        count = 0
        yield lambda: qf[half].ok(0)
        yield lambda: kf[0].ok(0)
        use(Q, half, (0, half)); use(K, 0, (0, 0)); yield None
        used(Q, half, (0, half)); used(K, 0, (0, 0)); ke[0].arrive()
        if jobs[0] == 1: qe[half].arrive()
        for n, total in enumerate(jobs):
            acc = []; count += 1
            for j in range(1, total):
                s, b = count % STAGES, (count - 1) % STAGES
                yield lambda: kf[s].ok((count // STAGES) & 1)
                use(Q, half, (n, half)); use(K, s, (n, j)); yield None
                yield lambda: vf[b].ok(((count - 1) // STAGES) & 1)
                use(V, b, (n, j - 1)); acc.append(j - 1); yield None
                used(Q, half, (n, half)); used(K, s, (n, j)); ke[s].arrive()
                if j + 1 == total: qe[half].arrive()
                yield None
                used(V, b, (n, j - 1)); ve[b].arrive(); count += 1
            s, b = count % STAGES, (count - 1) % STAGES
            yield lambda: vf[b].ok(((count - 1) // STAGES) & 1)
            use(V, b, (n, total - 1)); acc.append(total - 1); yield None
            other = n + 1 < len(jobs)
            if other:
                yield lambda: qf[half].ok((n + 1) & 1)
                yield lambda: kf[s].ok((count // STAGES) & 1)
                use(Q, half, (n + 1, half)); use(K, s, (n + 1, 0)); yield None
            used(V, b, (n, total - 1)); ve[b].arrive(); out[half, n] = acc; yield None
            if other:
                used(Q, half, (n + 1, half)); used(K, s, (n + 1, 0)); ke[s].arrive()
                if jobs[n + 1] == 1: qe[half].arrive()
    if nest: consumer = nested
    if rotate: consumer = rotated
    agents = {name: [g, None, True] for name, g in (("p", producer()), ("0", consumer(0)), ("1", consumer(1)))}
    speed = {k: rnd.random() + .02 for k in (*agents, "tma")}
    while agents or flying:
        can = [k for k, (g, c, _) in agents.items() if c is None or c()] + (["tma"] if flying else [])
        assert can, f"deadlock {jobs} stages {STAGES}: {list(agents)}"
        k = rnd.choices(can, [speed[x] for x in can])[0]
        if k == "tma": land(*flying.pop(rnd.randrange(len(flying)))); continue
        try: agents[k][1] = next(agents[k][0])
        except StopIteration: del agents[k]
    for half in range(2):
        for n, total in enumerate(jobs): assert out[half, n] == list(range(total)), (n, out[half, n])

if __name__ == "__main__":
    rnd = random.Random(0); N = int(sys.argv[1]) if len(sys.argv) > 1 else 3000
    for seed in range(N):
        jobs = [rnd.choice((1, 1, 2, 2, 3, 4, 5, 9)) for _ in range(rnd.choice((1, 1, 2, 3, 4, 5, 8, 13)))]
        for ahead in (False, True):
            for rotate in (False, True):
                simulate(jobs, rnd.choice((2, 2, 3)), seed, False, 1, not rotate, ahead, rotate)
    print(N, "interleavings: no deadlock, every tile in place, in order, once")
